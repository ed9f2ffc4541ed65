"""Condition a circuit on evidence: the posterior is a circuit of the same structure with other weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.errors import ArgumentError, ImpossibleEvidenceError
from circuits.evidence import Evidence, Factors, Listed, Where
from circuits.precision import own_precision
from circuits.symbolic import Input, Node, Product, Sum
from circuits.transforms.rebuild import Rebuild, check_is_finite, normalise
from circuits.transforms.variables import compile_without

Kept = Literal["remaining", "all"]


@own_precision
def condition(pc: CompiledCircuit, evidence: Evidence, *, variables: Kept = "remaining") -> CompiledCircuit:
    """Return the conditional distribution ``p(x | e) = p(x) prod_i e_i(x_i) / Z(e)`` as a circuit.

    With Z_n the value of unit n under the evidence, the new weights are ``w_nc Z_c / Z_n`` and, at the inputs,
    ``w_n(v) e(v) / Z_n``: these inputs become categorical ones. Parameters that were tied stay tied only where they are
    equal.

    A circuit with classes becomes one with the same classes, ``p(x | e, class)`` each. If the evidence names the class,
    the result is this one distribution; if it has a prior of the classes, it is ``sum_r p(x, class r | e)``.
    Units that only other classes use stay until :func:`trim` drops them.

    Args:
        pc: the circuit.
        evidence: for one query, B = 1: hard, missing, soft or mixed, perhaps with a class or a prior of the classes.
        variables: "remaining" leaves out the variables that the evidence fixes to one value and renumbers the others in
            their order; "all" keeps them, as input units that give this value probability 1.

    Raises:
        ArgumentError: the evidence is not of one query or does not fit, or every variable is fixed.
        ImpossibleEvidenceError: Z(e) = 0, of some class where the evidence does not say which.
        PropertyError: evidence on a variable with infinitely many values, unless it is hard and the variable left out.
    """
    rebuild = Rebuild(pc)
    if variables not in get_args(Kept):
        raise ArgumentError(f"variables: expected 'remaining' or 'all', got {variables!r}")
    if not isinstance(evidence, Evidence) or evidence.batch_size != 1:
        got = f"B = {evidence.batch_size}" if isinstance(evidence, Evidence) else type(evidence).__name__
        raise ArgumentError(
            f"evidence: expected ct.Evidence of one query, B = 1, got {got}; one circuit is one conditional "
            "distribution: use evidence.rows(slice(i, i + 1))"
        )
    if evidence.latents:
        raise ArgumentError("evidence: expected evidence on variables only, got some on latents")
    if evidence.reference is not None:
        raise ArgumentError("evidence: expected evidence that is relative to no other; leave relative_to out")
    with torch.no_grad():
        question = Question(pc, evidence)
        leaves, class_factors = question.inputs(LogSemiring()), question.class_factors
        is_finite = pc.num_categories > 0
        listed = Evidence.where(is_finite, evidence, Evidence.nothing(1, evidence.num_vars, pc.device))
        factors = listed.dense(max(1, *pc.circuit.num_categories), torch.float64)[0]
        is_fixed = torch.where(is_finite, (factors > -torch.inf).sum(1) == 1, _has_one_value(evidence.factors)[0]).cpu()
    is_missing = ~evidence.factors.known()[0].cpu()
    fixed = is_fixed & ~is_missing
    kept = [var for var in range(evidence.num_vars) if variables == "all" or not fixed[var]]
    if not kept:
        raise ArgumentError("evidence: it fixes every variable, so none remains; use variables='all'")

    values: dict[Node, Tensor] = {}
    changed: dict[Node, Tensor] = {}
    for node in pc.circuit.nodes:
        if isinstance(node, Input):
            layer, row = pc.address(node)
            values[node] = leaves[layer][row, :, 0].double()
            if not is_missing[node.var] and node.var in kept:
                check_is_finite(node, "conditioning on soft evidence")
                log_weights = rebuild.log_weights(node)
                weighted = log_weights + factors[node.var, : len(log_weights)].unsqueeze(1)
                changed[node], values[node] = normalise(weighted, 0)
        elif isinstance(node, Product):
            values[node] = _product_values(node, values)
        elif isinstance(node, Sum):
            children = node.mixed([values[child] for child in node.children])
            changed[node], values[node] = normalise(rebuild.log_weights(node, wide=False) + children, 1)
    if class_factors is None:
        _check_is_possible(pc, values[pc.circuit.root])
        return compile_without(rebuild, kept, changed)
    class_weights, log_z = normalise((values[pc.circuit.root] + class_factors[:, 0].double()).unsqueeze(0), 1)
    _check_is_possible(pc, log_z)
    return compile_without(rebuild, kept, changed, class_weights)


def _check_is_possible(pc: CompiledCircuit, log_z: Tensor) -> None:
    """Raise ImpossibleEvidenceError if one of the log Z is -inf."""
    impossible = (log_z == -torch.inf).nonzero().flatten().tolist()
    if not impossible:
        return
    if len(log_z) == 1:
        raise ImpossibleEvidenceError("evidence: it has probability zero, so nothing can be conditioned on it")
    raise ImpossibleEvidenceError(
        f"evidence: it has probability zero under {len(impossible)} of {len(log_z)} classes of {pc.circuit} (the first "
        f"is {impossible[0]}); say which class with evidence.with_class(label), or mix those that are possible with "
        "evidence.with_class_prior(log_prior)"
    )


def _product_values(node: Product, values: dict[Node, Tensor]) -> Tensor:
    total = values[node.children[0]]
    for child in node.children[1:]:
        other = values[child]
        total = (total.unsqueeze(1) + other).flatten() if node.mode == "outer" else total + other
    return total


def _has_one_value(factors: Factors) -> Tensor:
    """Return on which variables a single value is listed, bool (B, D)."""
    if isinstance(factors, Where):
        return torch.where(factors.condition, _has_one_value(factors.one), _has_one_value(factors.other))
    is_hard = isinstance(factors, Listed) and factors.values.shape[2] == 1
    return torch.full(factors.stored.shape[:2], is_hard, device=factors.stored.device)
