"""Factors under which the product's own marginals become what the denoiser predicts.

Prediction and circuit both know what the visible tokens say, and their product counts it twice. What the prediction
lacks is how tokens depend on each other, and what the circuit lacks is the rest. Of all distributions with given
marginals q, the one nearest to the circuit, its I-projection (Csiszár 1975), is again a product with a factor for every
token, ``p(x) prod_i f_i(x_i) / Z``; iterative proportional fitting (Deming and Stephan 1940) finds the factors: step by
step it divides them by the marginals m of the product that they make, and multiplies them with q. Discrete copula
diffusion (Liu et al. 2024, arXiv 2410.01949) couples a denoiser to a language model so. Here a few damped steps are
taken, and how far they go is learnt:

    log f^0 = 0,      log f^{k+1} = log f^k + a_k(r) log q - c_k(r) log m(f^k),

with log a_k and c_k piecewise linear in the share r of the block that is masked. With many steps ``a = c`` gives
marginals of exactly q; one step with ``a = 1, c = 0`` is the plain product. A circuit of maximum likelihood needs no
more than this to be a good head: where little is masked m is near q, and the product near the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from circuits import CircuitWeights
from circuits.arguments import checked_count, is_number
from circuits.precision import own_precision
from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.conditioners.context import at_mask_ratio
from diffusion.coupling import CoupledDistribution
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction

_LEAST = 1e-8
"""Of the marginals whose logarithm a step takes: what is less probable counts as this."""


@register("marginal_matching")
class MarginalMatching(Conditioner):
    """A few steps of iterative proportional fitting, whose sizes depend on the mask ratio.

    Every step costs the circuit's forward and backward pass, whenever the denoiser is asked. Gradients go through all
    of them: each step then costs another pass, and its gradient twice. The product has to be normalised globally, and a
    head has one of these. What conditioners before it say, potentials for example, holds in the marginals too.

    Args:
        num_steps: K.
        num_knots: M >= 2; log a and c are given at M evenly spaced mask ratios from 0 to 1, and linear in between.
        step: a and c at first, 0 < step <= 1: the exact algorithm has 1, one position at a time; all positions at
            once need less.

    Attributes:
        log_scale: log a at the knots, (M, K).
        discount: c at the knots, (M, K).
    """

    needs_observed = False

    def __init__(self, num_steps: int = 4, num_knots: int = 5, *, step: float = 0.3) -> None:
        super().__init__()
        checked_count("num_steps", num_steps)
        checked_count("num_knots", num_knots, 2)
        if not is_number(step) or not 0 < step <= 1:
            raise ArgumentError(f"step: expected a number above 0 and at most 1, got {step!r}")
        self.log_scale = nn.Parameter(torch.full((num_knots, num_steps), math.log(step)))
        self.discount = nn.Parameter(torch.full((num_knots, num_steps), float(step)))

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction as it is: :meth:`refined` changes it, which knows the circuit."""
        return Conditioned(prediction)

    @own_precision
    def refined(self, dist: CoupledDistribution) -> CoupledDistribution:
        """Return the circuit with the factors in place of the prediction.

        Raises:
            ArgumentError: the normalisation is local.
        """
        if dist.normalization != "global":
            raise ArgumentError(
                f"normalization: expected 'global' for MarginalMatching, got {dist.normalization!r}; leave it out, or "
                "normalise the head globally"
            )
        said, log_q = dist.said, dist.said.log_q
        is_free = log_q > -torch.inf
        if said.where is None:
            is_free = is_free & dist.masked.unsqueeze(-1)
        sizes = at_mask_ratio(dist.masked, self.log_scale, self.discount, where=said.where)  # (B or n, K) each
        dim = 1 if said.where is None else 0
        scales, discounts = (one.to(log_q).T.unsqueeze(1 + dim).unsqueeze(-1) for one in (sizes[0].exp(), sizes[1]))
        weights, latents = cast(CircuitWeights, dist.weights), dist.evidence.latents or {}
        tensors = [*weights.tensors(), *latents.values()]
        base = _coupled(
            dist, said.log_q.detach(), weights.detached(), {key: log.detach() for key, log in latents.items()}
        )
        factors = log_q.masked_fill(is_free, 0.0)
        log_q = log_q.masked_fill(~is_free, 0.0)
        for scale, discount in zip(scales, discounts, strict=True):  # (B, 1, 1) or (1, n, 1)
            marginals: Tensor = _Marginals.apply(base, factors, *tensors)
            log_m = marginals.nan_to_num(1.0).clamp_min(_LEAST).log().masked_fill(~is_free, 0.0)
            factors = torch.log_softmax(factors + scale * log_q - discount * log_m, -1)
        return _coupled(dist, factors, weights, latents)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        num_knots, num_steps = self.discount.shape
        return {"num_steps": num_steps, "num_knots": num_knots}


class _Marginals(torch.autograd.Function):
    """Marginals ``p_hat(x_i = v) = d log Z / d log f_i(v)`` (Darwiche 2003), in the shape of the factors.

    Its own gradient computes them again: of a step nothing is kept but the factors.
    """

    @staticmethod
    def forward(ctx: Any, base: CoupledDistribution, factors: Tensor, *tensors: Tensor) -> Tensor:
        ctx.base = base
        ctx.save_for_backward(factors)
        log_z, leaves = _log_z(base, factors, [True, *(False for _ in tensors)])
        return torch.autograd.grad(log_z, leaves[0])[0]

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        (factors,) = ctx.saved_tensors
        log_z, leaves = _log_z(ctx.base, factors, [True, *needs[1:]])
        (marginals,) = torch.autograd.grad(log_z, leaves[0], create_graph=True)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found = iter(torch.autograd.grad(marginals, wanted, grad, allow_unused=True))
        return None, *(next(found) if need else None for need in needs)


def _log_z(base: CoupledDistribution, factors: Tensor, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """Return the sum of all log Z, and the leaves that it depends on: factors, weights and latents."""
    with torch.inference_mode(False), torch.enable_grad():
        factors, weights = factors.detach().clone(), cast(CircuitWeights, base.weights).detached()
        latents = {key: log.detach() for key, log in (base.evidence.latents or {}).items()}
        leaves = [factors, *weights.tensors(), *latents.values()]
        for leaf, need in zip(leaves, needs, strict=True):
            leaf.requires_grad_(need)
        return _coupled(base, factors, weights, latents).log_partition.sum(), leaves


def _coupled(
    dist: CoupledDistribution, factors: Tensor, weights: CircuitWeights, latents: Mapping[Any, Tensor]
) -> CoupledDistribution:
    """Return the distribution with other factors on tokens, other weights and latents."""
    said, absent = replace(dist.said, log_q=factors), dist.summed_out
    return CoupledDistribution.of(
        dist.pc, said, dist.tokens, dist.masked, latents=latents, weights=weights, absent=absent
    )
