"""The best path of latents, with the variables summed out: Viterbi's algorithm on any circuit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring, MaxSemiring
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.evidence import Evidence
from circuits.queries.common import query


@dataclass(frozen=True, eq=False)
class Viterbi:
    """The most probable latents of B queries.

    Attributes:
        states: by the name of a sum node, which of its children's units is used, int64 (B,); -1 where the node is not
            used, or where nothing is known of what is below it.
        log_score: ``max_z log p(z, e)``, (B,), in nats.
        path: of a model built by ``ct.structures.hmm`` the states z_0 .. z_L-1, int64 (B, L); -1 from the step on from
            which nothing is known. None of other circuits.
    """

    states: dict[str, Tensor]
    log_score: Tensor
    path: Tensor | None


@query
@torch.no_grad()
def viterbi(pc: CompiledCircuit, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None) -> Viterbi:
    """Return the most probable latents ``argmax_z p(z, e)``, with the variables summed out (Viterbi 1967).

    That is what HMM libraries call decoding. Latents of which nothing is known, as behind the end of a padded
    sequence, are summed out too, so padding changes neither path nor score. :func:`best_latents` chooses the same way,
    and returns what the variables are given the latents; :func:`mpe` maximises over latents and values together, so
    missing values lower its score.

    Args:
        pc: the circuit; also with variables of infinitely many values.
        evidence: for B queries; None: no evidence, B = 1.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        ``.states`` by name, ``.log_score`` and, of HMMs, ``.path``; of a model per class the path is that of the class
        that the evidence names, or of the best one under its prior.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
        PropertyError: the root has a unit per class, and the evidence does not name the class.
    """
    semiring, question = MaxSemiring(), Question(pc, evidence, weights).silenced()
    question = question.with_inputs(question.inputs(LogSemiring()))  # the values are summed out
    found = question.climb(semiring)
    chosen = question.choose(semiring, 1, None, found=found).children
    states = {}
    for node in pc.circuit.sums:
        if node.name is not None:
            layer, row = pc.address(node)
            states[node.name] = chosen[layer][row]
            if layer in question.silent:
                states[node.name] = states[node.name].masked_fill(question.silent[layer][row, 0], -1)
    return Viterbi(states, question.mixed(semiring, found.root), _path(states))


def _path(states: dict[str, Tensor]) -> Tensor | None:
    """Return the states of an HMM, (B, L), from those of its nodes; of a model per class those of the one used."""
    paths = []
    for first in (name for name in states if name.endswith("initial")):
        prefix = first.removesuffix("initial")
        names, transitions = [first], set()
        while (transition := f"{prefix}transition{len(names) - 1}") in states:
            factor = f"{prefix}factor{len(names) - 1}"  # transitions of low rank mix factors, and these mix the states
            names.append(factor if factor in states else transition)
            transitions.add(transition)
        if not {name for name in states if name.startswith(prefix)} <= {*names, *transitions}:
            return None  # the latents of a step are several nodes
        paths.append(torch.stack([states[name] for name in names], 1))
    return torch.stack(paths).amax(0) if paths and len({path.shape for path in paths}) == 1 else None
