"""Weights of a mixture's components that depend on the noise, on the context, and on what the components say.

A circuit whose root mixes K components, ``p = sum_k w_k p_k``, is multiplied with a prediction q like any other. Then
component k weighs as much as ``w_k Z_k``, with ``Z_k`` the sum of ``p_k(x) q(x)`` over the texts that are possible:
these differ by tens of nats, so the tokens that are visible decide alone. Factors on what the root chooses,

    log f_k = a_k(h, r) + b_k(r) - beta_k(r) log Z_k,

let the context decide too, with h the mean of the denoiser's hidden states at masked positions, r the share of the
block that is masked, and b and beta piecewise linear in r. At a = b = beta = 0, as at first, it is the plain product.
At beta = 1 it is a mixture of normalised products,

    p_hat(x) = sum_k g_k p_k(x) q(x) / Z_k,      g = softmax(log w + a + b),

a gate between components (Jacobs, Jordan, Nowlan, Hinton 1991, "Adaptive Mixtures of Local Experts"). A component of
independent tokens, :meth:`MixtureWeights.with_independent`, adds nothing to q: so the gate is between the coupled
product and the plain prediction, and a head that is trained well is no worse than either. The factors are those of a
block when it is first asked about; tokens that are committed later condition the same joint distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import circuits as ct
from circuits import CompiledCircuit
from circuits.arguments import checked_count, checked_number, is_number, kind_of
from circuits.precision import own_precision
from diffusion.blocks import check_circuit
from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.conditioners.context import at_mask_ratio, check_sizes, is_zero, network, read_block
from diffusion.conditioners.noise_calibration import NoiseCalibration
from diffusion.coupling import CoupledDistribution
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction


@register("mixture_weights")
class MixtureWeights(Conditioner):
    """Log-factors ``a_k(h, r) + b_k(r) - beta_k(r) log Z_k`` on the components that a circuit's root mixes.

    While all of them are 0 none are given but where gradients are asked for: the head is the static one to the last
    bit.

    Args:
        num_components: K, the units that the root mixes.
        num_features: H; None: a is 0, and no hidden states are looked at.
        num_knots: M >= 2; b and beta are given at M evenly spaced mask ratios from 0 to 1, and linear in between.
        hidden: units of a hidden layer between features and a; None: a is linear.
        power: beta at first; at 1 the components' products are normalised before they are mixed.
        seed: of the hidden layer's first weights.

    Attributes:
        bias: b at the knots, (M, K); 0 at first.
        power: beta at the knots, (M, K).
        network: from features and mask ratio, (H + 1), to a, (K), 0 at first; or None.
    """

    needs_observed = False

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        num_knots: int = 5,
        hidden: int | None = None,
        power: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checked_count("num_knots", num_knots, 2)
        checked_number("power", power)
        counts = {} if num_features is None else {"num_features": num_features}
        check_sizes(num_components=num_components, hidden=hidden, seed=seed, **counts)
        self.num_features, self.hidden, self.seed = num_features, hidden, seed
        self.bias = nn.Parameter(torch.zeros(num_knots, num_components))
        self.power = nn.Parameter(torch.full((num_knots, num_components), float(power)))
        self.network = None
        if num_features is not None:
            self.needs_features = True
            self.network = network(num_features + 1, num_components, hidden, seed=seed, is_zero=True)

    @classmethod
    def for_mixture(cls, pc: CompiledCircuit, num_features: int | None = None, **options: Any) -> MixtureWeights:
        """Build it for the components of a circuit's root.

        Args:
            pc: the circuit, such as one of :func:`circuits.structures.mixture_of` or :meth:`with_independent`.
            num_features: H, or None.
            **options: the constructor's options.

        Raises:
            ArgumentError: the root is no mixture.
        """
        check_circuit(pc)
        return cls(_num_components(pc), num_features, **options)

    @staticmethod
    def with_independent(
        pc: CompiledCircuit, calibration: NoiseCalibration | None = None, *, share: float = 0.5
    ) -> CompiledCircuit:
        """Return the mixture of a circuit and of a component with independent tokens, the same at every position.

        Their nodes are called ``member0.{name}`` and ``member1.{name}`` in it.

        Args:
            pc: a circuit over L positions; a copy of it is the first component.
            calibration: that goes before; the component's tokens undo what it adds to their log-probabilities, so that
                the product with the calibrated prediction is the prediction, as far as the calibration's bias does not
                depend on the mask ratio and its scale is 1. None: all tokens are equally probable.
            share: of the component in the mixture, between 0 and 1.

        Raises:
            ArgumentError: the calibration is for another number of tokens, or the share is out of range.
        """
        check_circuit(pc)
        if not is_number(share) or not 0 < share < 1:
            raise ArgumentError(f"share: expected a number between 0 and 1, got {share!r}")
        num_tokens = max(pc.circuit.num_categories)
        table = torch.full((num_tokens, 1), 1 / num_tokens, dtype=torch.float64)
        if calibration is not None:
            if not isinstance(calibration, NoiseCalibration):
                raise ArgumentError(f"calibration: expected df.NoiseCalibration or None, got {kind_of(calibration)}")
            calibration.check(pc)
            table = (-calibration.bias.detach().double().cpu().mean(0)).softmax(0).unsqueeze(1)
        leaves: list[ct.Input] = []
        for var in range(pc.circuit.num_vars):
            tie: dict[str, Any] = {"tied_to": leaves[0]} if leaves else {"weights": table}
            leaves.append(ct.inputs(var, 1, ct.Categorical(num_tokens), name=f"emission{var}", **tie))
        independent = ct.compile(ct.Circuit(ct.product(*leaves)), device=pc.device, dtype=pc.dtype)
        return ct.batteries.convex_combination([pc, independent], torch.tensor([1 - share, share], dtype=torch.float64))

    @property
    def is_static(self) -> bool:
        """Whether all factors are 1, whatever the block is."""
        is_still = not bool(self.bias.any()) and not bool(self.power.any())
        return is_still and (self.network is None or is_zero(self.network))

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction as it is: the factors are those that :meth:`refined` adds."""
        return Conditioned(prediction)

    @own_precision
    def refined(self, dist: CoupledDistribution) -> CoupledDistribution:
        """Return the distribution with log-factors (B, K) on what the root chooses.

        Raises:
            ArgumentError: the prediction has no features, or of another number.
        """
        if not torch.is_grad_enabled() and self.is_static:
            return dist
        bias, power = at_mask_ratio(dist.masked, self.bias, self.power)
        if self.network is not None:
            assert self.num_features is not None
            bias = bias + self.network(read_block(self.num_features, dist.prediction, dist.masked, self.bias))
        log_z = dist.query(ct.queries.component_log_partition)
        log_z = log_z.masked_fill(log_z == -torch.inf, 0.0)  # what is impossible stays so
        factors = bias.to(log_z) - power.to(log_z) * log_z
        given: dict[Any, Tensor] = dict(dist.evidence.latents or {})
        root: Any = dist.pc.circuit.root
        key = next((key for key in given if dist.pc.sum_node(key) is root), root)
        return dist.with_latents({**given, key: given[key] + factors if key in given else factors})

    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the network's."""
        return [] if self.network is None else list(self.network.parameters())

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        num_knots, num_components = self.bias.shape
        own = {"num_components": num_components, "num_features": self.num_features, "num_knots": num_knots}
        return {**own, "hidden": self.hidden, "seed": self.seed}

    def check(self, pc: CompiledCircuit) -> None:
        """Raise ArgumentError unless the circuit's root mixes as many components."""
        if _num_components(pc) != self.bias.shape[1]:
            raise ArgumentError(
                f"conditioners: expected a circuit whose root mixes {self.bias.shape[1]} components for mixture "
                f"weights, got {_num_components(pc)} in {pc.circuit}; build them for this circuit"
            )


def _num_components(pc: CompiledCircuit) -> int:
    root = pc.circuit.root
    if not isinstance(root, ct.Sum) or pc.circuit.num_classes is not None:
        raise ArgumentError(
            f"pc: expected a circuit whose root is a mixture, got {pc.circuit}; ct.structures.mixture_of builds one"
        )
    return root.parameter_shape[1]
