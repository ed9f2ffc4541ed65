"""The best path of latents, with the variables summed out: Viterbi's algorithm on any circuit."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring, MaxSemiring
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.evidence import Evidence
from circuits.queries.common import Rows, places_of_sums, query


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

    states: Mapping[str, Tensor]
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
    if pc not in _PLANS:
        _PLANS[pc] = _plan(pc)
    plan, places = _PLANS[pc], places_of_sums(pc)
    tables = {name: places.table(chosen, name) for name in plan.tables}
    if question.silent:
        silent = {name: torch.cat([question.silent[at] for at in places.layers[name]])[:, 0] for name in tables}
        tables = {name: table.masked_fill(silent[name], -1) for name, table in tables.items()}
    paths = [
        torch.cat([tables[name] for name in names]).index_select(0, rows.to(pc.device)).t()
        for names, rows in plan.paths
    ]
    path = torch.stack(paths).amax(0) if paths else None
    return Viterbi(Rows(tables, plan.rows), question.mixed(semiring, found.root), path)


class _Plan(NamedTuple):
    """Where the states of a circuit's nodes are found."""

    rows: dict[str, tuple[int, int]]
    """Of named sum nodes: which table, and which of its rows."""
    tables: list[int]
    """Those of all named nodes."""
    paths: list[tuple[list[int], Tensor]]
    """Tables, and which of all their rows are the steps of an HMM; of a model per class those of all."""


_PLANS: weakref.WeakKeyDictionary[CompiledCircuit, _Plan] = weakref.WeakKeyDictionary()


def _plan(pc: CompiledCircuit) -> _Plan:
    places = places_of_sums(pc)
    rows = {node.name: place for node, place in places.rows.items() if node.name is not None}
    paths = []
    for names in _names_of_paths(rows):
        tables = sorted({rows[name][0] for name in names})
        sizes = [max(len(places.layers[table]), pc.sum_layers[table]) for table in tables]
        starts = dict(zip(tables, itertools.accumulate(sizes, initial=0), strict=False))
        paths.append((tables, torch.tensor([starts[rows[name][0]] + rows[name][1] for name in names])))
    return _Plan(rows, sorted({table for table, _ in rows.values()}), paths)


def _names_of_paths(states: Collection[str]) -> list[list[str]]:
    """Return the nodes of an HMM's steps; of a model per class those of each; nothing of other circuits."""
    paths = []
    for first in (name for name in states if name.endswith("initial")):
        prefix = first.removesuffix("initial")
        names, transitions = [first], set()
        while (transition := f"{prefix}transition{len(names) - 1}") in states:
            factor = f"{prefix}factor{len(names) - 1}"  # transitions of low rank mix factors, and these mix the states
            names.append(factor if factor in states else transition)
            transitions.add(transition)
        if not {name for name in states if name.startswith(prefix)} <= {*names, *transitions}:
            return []  # the latents of a step are several nodes
        paths.append(names)
    return paths if len({len(names) for names in paths}) == 1 else []
