"""Inner products of, and divergences between, compatible circuits.

All are one joint recursion over pairs of nodes with the same scope (Vergari et al. 2021). Evidence, where given,
conditions both circuits, so the divergence is the one between their posteriors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.arguments import checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.queries.common import dense_factors, query
from circuits.queries.determinism import is_deterministic, require_deterministic
from circuits.queries.entropy import latent_entropy
from circuits.queries.power_sums import Power, log_sum_of_powers
from circuits.queries.structural import require_compatible

_ROUNDING = 64.0


@query
def log_inner_product(p: CompiledCircuit, q: CompiledCircuit, evidence: Evidence | None = None) -> Tensor:
    """Return ``log sum_x p(x) q(x) prod_i e_i(x_i)``: the log-probability that two draws agree.

    Needs compatible circuits; their units may differ in number. Differentiable in the weights of both and the evidence.
    Of Gaussian variables, see :func:`circuits.transforms.multiply`, which returns the same number without evidence.

    Args:
        p: a circuit.
        q: a circuit over the same variables.
        evidence: for B queries; None: no evidence, B = 1.

    Returns:
        (B,), in nats; -inf where the supports are disjoint.

    Raises:
        PropertyError: the circuits are not compatible; names the two products that decompose a scope differently.
    """
    require_compatible(p.circuit, q.circuit, "log_inner_product")
    return log_sum_of_powers([_power(p), _power(q)], _factors(p, q, evidence, "log_inner_product"))[0]


@query
def cauchy_schwarz_divergence(p: CompiledCircuit, q: CompiledCircuit, evidence: Evidence | None = None) -> Tensor:
    """Return ``-log(sum_x p q / sqrt(sum_x p^2 sum_x q^2))``, at least 0, and 0 exactly where p = q (Jenssen 2006).

    Needs two structured-decomposable and compatible circuits. Differentiable in the weights of both and the evidence.

    Args:
        p: a circuit.
        q: a circuit over the same variables.
        evidence: for B queries, conditions both; None: no evidence, B = 1.

    Returns:
        (B,), in nats; +inf where the supports are disjoint.

    Raises:
        PropertyError: a circuit is not structured decomposable, or the two are not compatible; names the products.
        ImpossibleEvidenceError: the evidence has probability zero under p or q.
    """
    for left, right in ((p, p), (q, q), (p, q)):
        require_compatible(left.circuit, right.circuit, "cauchy_schwarz_divergence")
    factors = _factors(p, q, evidence, "cauchy_schwarz_divergence")
    for pc in (p, q):
        checked_possible(pc.log_partition(Evidence.soft(factors)))
    powers = [_power(p), _power(q)]
    doubled = 2.0 * factors  # the evidence is part of both posteriors
    cross, own_p, own_q = (log_sum_of_powers([powers[i], powers[j]], doubled)[0] for i, j in ((0, 1), (0, 0), (1, 1)))
    return 0.5 * (own_p + own_q) - cross


@query
def cross_entropy(p: CompiledCircuit, q: CompiledCircuit, evidence: Evidence | None = None) -> Tensor:
    """Return the cross-entropy ``-sum_x p(x | e) log q(x | e)``.

    Needs a deterministic q that is compatible with p: then log q is a sum along the one explanation of x.
    Differentiable in the weights of both and the evidence.

    Args:
        p: the circuit that the expectation is under.
        q: a deterministic circuit over the same variables.
        evidence: for B queries, conditions both; None: no evidence, B = 1.

    Returns:
        (B,), in nats; +inf where p has mass outside the support of q, more than the rounding of log-values can hide
        (64 units of the type's resolution per variable and per nat of log Z).

    Raises:
        PropertyError: q is not deterministic, or the circuits are not compatible; names the nodes.
        ImpossibleEvidenceError: the evidence has probability zero under p or q.
    """
    require_deterministic(q, "cross_entropy")
    return _cross_entropy(p, q, evidence, "cross_entropy")


@query
def kl_divergence(p: CompiledCircuit, q: CompiledCircuit, evidence: Evidence | None = None) -> Tensor:
    """Return the Kullback-Leibler divergence ``sum_x p(x | e) log(p(x | e) / q(x | e))``.

    Needs two deterministic and compatible circuits: the entropy of p and the cross-entropy are then exact.
    Differentiable in the weights of both and the evidence.

    Args:
        p: a deterministic circuit.
        q: a deterministic circuit over the same variables.
        evidence: for B queries, conditions both; None: no evidence, B = 1.

    Returns:
        (B,), in nats, >= 0 up to rounding; +inf as for :func:`cross_entropy`.

    Raises:
        PropertyError: a circuit is not deterministic, or they are not compatible; names the nodes.
        ImpossibleEvidenceError: the evidence has probability zero under p or q.
    """
    for pc in (p, q):
        require_deterministic(pc, "kl_divergence")
    return _cross_entropy(p, q, evidence, "kl_divergence") - latent_entropy(p, evidence)


@query
def renyi_divergence(p: CompiledCircuit, q: CompiledCircuit, alpha: float, evidence: Evidence | None = None) -> Tensor:
    """Return Renyi's divergence ``log(sum_x p(x | e)^alpha q(x | e)^(1 - alpha)) / (alpha - 1)`` (Renyi 1961).

    Needs a deterministic q, for the power of it, and compatible circuits. p is either deterministic too, then any
    alpha > 0 but 1 will do; or structured decomposable, then alpha must be an integer > 1, and p^alpha is a product of
    alpha copies, at a cost that grows like the units of p to the power alpha. Differentiable in the weights of both and
    the evidence.

    Args:
        p: a circuit.
        q: a deterministic circuit over the same variables.
        alpha: the order; 1 is :func:`kl_divergence`.
        evidence: for B queries, conditions both; None: no evidence, B = 1.

    Returns:
        (B,), in nats, >= 0 up to rounding; +inf for alpha > 1 where p has mass outside the support of q (see
        :func:`cross_entropy`), for alpha < 1 where the supports are disjoint.

    Raises:
        ArgumentError: alpha is not a positive number, or is 1.
        PropertyError: a property is missing; names it and the nodes.
        ImpossibleEvidenceError: the evidence has probability zero under p or q.
    """
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < torch.inf or alpha == 1:
        raise ArgumentError(f"alpha: expected a positive number other than 1 (that is kl_divergence), got {alpha!r}")
    require_deterministic(q, "renyi_divergence")
    require_compatible(p.circuit, q.circuit, "renyi_divergence")
    if is_deterministic(p):
        powers = [_power(p, alpha)]
    elif alpha > 1 and alpha == int(alpha):
        require_compatible(p.circuit, p.circuit, "renyi_divergence with a p that is not deterministic")
        powers = [_power(p)] * int(alpha)
    else:
        require_deterministic(p, f"renyi_divergence of an order that is not an integer > 1, alpha={alpha},")
        powers = []
    factors = _factors(p, q, evidence, "renyi_divergence")
    log_p, log_q = (checked_possible(pc.log_partition(Evidence.soft(factors))) for pc in (p, q))
    total, _ = log_sum_of_powers([*powers, _power(q, 1.0 - alpha)], factors)  # e^alpha e^(1 - alpha) = e
    divergence = (total - alpha * log_p - (1.0 - alpha) * log_q) / (alpha - 1.0)
    if alpha < 1:
        return divergence
    inside, _ = log_sum_of_powers([_power(p), _power(q, 0.0)], factors)
    return torch.where(_is_all(inside, log_p, p.circuit.num_vars), divergence, torch.inf)


def _cross_entropy(p: CompiledCircuit, q: CompiledCircuit, evidence: Evidence | None, query: str) -> Tensor:
    require_compatible(p.circuit, q.circuit, query)
    factors = _factors(p, q, evidence, query)
    log_p, log_q = (checked_possible(pc.log_partition(Evidence.soft(factors))) for pc in (p, q))
    inside, average = log_sum_of_powers([_power(p), _power(q, 0.0)], factors, averaged=1)
    assert average is not None
    return torch.where(_is_all(inside, log_p, p.circuit.num_vars), log_q - average, torch.inf)


def _is_all(log_inside: Tensor, log_p: Tensor, num_vars: int) -> Tensor:
    """Return whether the mass of p inside the support of q is all of it, up to what rounding can hide."""
    tolerance = _ROUNDING * torch.finfo(log_p.dtype).eps * (num_vars + log_p.detach().abs())
    return log_inside.detach() - log_p.detach() > -tolerance


def _power(pc: CompiledCircuit, exponent: float = 1.0) -> Power:
    return Power(pc, pc.weights(), exponent)


def _factors(p: CompiledCircuit, q: CompiledCircuit, evidence: Evidence | None, query: str) -> Tensor:
    if p.dtype != q.dtype or p.device != q.device:
        raise ArgumentError(
            f"q: expected the dtype and device of p, {p.dtype} on {p.device}, got {q.dtype} on {q.device}; move "
            "it with q.to(...)"
        )
    dense_factors(q, evidence, query)
    return dense_factors(p, evidence, query)
