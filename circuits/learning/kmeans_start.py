"""Where learning of latent structure starts: at clusters of the data, in place of random weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError
from circuits.families import Bernoulli, Categorical
from circuits.learning.clusters import kmeans
from circuits.learning.em import check_em_options
from circuits.learning.fit import fit
from circuits.learning.optimizers import EM
from circuits.learning.samples import Rows, Samples, checked_samples
from circuits.precision import own_precision
from circuits.symbolic import Circuit, Input, Node, Product, Sum, parameter_owner

if TYPE_CHECKING:
    import numpy as np

_NUM_STARTS = 4


@dataclass(frozen=True)
class _Latent:
    """A latent variable whose states are the units of input nodes."""

    place: Node
    """What its states generate: the product of these input nodes with all else, or one input node."""
    leaves: list[Input]

    @property
    def first_var(self) -> int:
        return min(leaf.var for leaf in self.leaves)


@own_precision
def initialize_by_kmeans(
    pc: CompiledCircuit,
    data: Rows,  # shape: (N, D)
    *,
    observed: Rows | None = None,  # shape: (N, D)
    labels: Tensor | np.ndarray | None = None,  # shape: (N,)
    ordered: bool = False,
    max_samples: int = 10_000,
    pseudocount: float = 1.0,
    seed: int = 0,
) -> None:
    """Set the weights to those that k-means clusters of the data, as states of the latents, make most likely, in place.

    Call it before :func:`fit`, which then starts near a good solution. The latents are those whose K states are the
    units of input nodes: that of a mixture, of a hidden Markov model, of a latent tree. A latent's samples are
    clustered by the variables below it; latents that share input nodes, such as those of a homogeneous hidden Markov
    model, are clustered together, each by the variables of its input nodes and of the latents beside it. Units that
    get no cluster keep their weights.

    Args:
        pc: the circuit.
        data: (N, D), like that of :func:`fit`.
        observed: bool (N, D), False where a value is missing.
        labels: the class of each sample, int64 (N,), for a circuit with ``num_classes``. Clusters are those of all
            classes together; which of them a class has is counted.
        ordered: whether categories are numbers, such as grey values, rather than names; names are as far from each
            other as they can be.
        max_samples: how many random rows are clustered at most per latent.
        pseudocount: a >= 0, see :func:`em_step`.
        seed: for the choice of samples and the clusters.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, or no latent's states are units of input nodes.
    """
    check_compiled(pc)
    check_em_options(pseudocount=pseudocount)
    checked_count("max_samples", max_samples)
    groups = _latent_groups(pc.circuit)
    if not groups:
        raise ArgumentError(
            f"pc: {pc.circuit} has no product of an input node of several units with its other parts, so no latent to "
            "cluster for; use ct.learning.initialize_inputs"
        )
    samples = checked_samples(pc, "data", Samples(data, observed, labels=labels))
    count = max(1, max_samples // max(map(len, groups)))
    chosen = samples.rows(torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count])
    x = chosen.x[:]
    known = ~x.isnan() if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)
    known = known if chosen.observed is None else known & chosen.observed[:].to(x.device)
    columns = _features(pc, x, known, ordered)
    states: dict[str | Input | Sum, Tensor] = {}
    for number, group in enumerate(groups):
        found = _clusters(group, columns, known, seed + number)
        states |= {latent.leaves[0]: part for latent, part in zip(group, found.split(len(x)), strict=True)}
    supervised = Samples(x, known, labels=chosen.labels, latents=states)
    fit(pc, supervised, optimizer=EM(pseudocount=pseudocount), num_epochs=1, progress=False)


def _clusters(latents: Sequence[_Latent], columns: Mapping[int, Tensor], known: Tensor, seed: int) -> Tensor:
    """Return the cluster of every sample of every latent, latent by latent; -1 where nothing of it is known."""
    contexts = _contexts(latents)
    widths = {place: columns[var].shape[1] for context in contexts for place, var in context if var is not None}
    nothing = {place: known.new_zeros(len(known), width, dtype=torch.float64) for place, width in widths.items()}
    rows = torch.cat(
        [
            torch.cat([nothing[place] if var is None else columns[var] for place, var in context], 1)
            for context in contexts
        ]
    )
    asked = [
        [leaf.var for leaf in latent.leaves] if len(latents) > 1 else sorted(latent.place.scope) for latent in latents
    ]
    is_known = torch.cat([known[:, variables].any(1) for variables in asked])  # padding is no cluster
    clusters = torch.full((len(rows),), -1)
    if bool(is_known.any()):
        num_states = latents[0].leaves[0].num_units
        clusters[is_known.cpu()] = _best_clusters(rows[is_known], num_states, seed).cpu()
    return clusters


def _best_clusters(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Return the clusters, of several starts of k-means, whose samples are closest to their means."""
    tries = [kmeans(rows, num_clusters, seed=_NUM_STARTS * seed + start) for start in range(_NUM_STARTS)]
    return max(tries, key=lambda labels: _explained(rows, labels, num_clusters))


def _explained(rows: Tensor, labels: Tensor, num_clusters: int) -> float:
    totals = rows.new_zeros(num_clusters, rows.shape[1]).index_add_(0, labels, rows)
    sizes = labels.bincount(minlength=num_clusters).clamp_min(1).unsqueeze(1)
    return float((totals.square() / sizes).sum())


def _latent_groups(circuit: Circuit) -> list[list[_Latent]]:
    """Return the latents whose states are units of input nodes, those whose input nodes share parameters together."""
    parents: dict[Node, Product] = {}
    for node in circuit.nodes:
        if isinstance(node, Product) and node.mode == "elementwise":
            for child in node.children:
                parents.setdefault(child, node)
    leaves: dict[Node, list[Input]] = defaultdict(list)
    for leaf in circuit.inputs:
        place: Node = leaf
        while place in parents:
            place = parents[place]
        if leaf.num_units > 1:
            leaves[place].append(leaf)
    places: dict[Node, list[Node]] = defaultdict(list)
    for place, own in leaves.items():
        for leaf in own:
            places[parameter_owner(leaf)].append(place)
    groups: list[list[_Latent]] = []
    done: set[Node] = set()
    for place in leaves:
        if place in done:
            continue
        together = [place]
        for one in together:
            for leaf in leaves[one]:
                together += [other for other in places[parameter_owner(leaf)] if other not in together]
        done.update(together)
        if len(together) > 1 or isinstance(place, Product):
            groups.append(sorted((_Latent(one, leaves[one]) for one in together), key=lambda latent: latent.first_var))
    return groups


def _contexts(latents: Sequence[_Latent]) -> list[list[tuple[Node, int | None]]]:
    """Return what the samples of each latent are clustered by: variables, None for one that is not there.

    Each comes with the node that stands for its column: equal ones have columns of equal widths. A latent alone has
    all variables below it; latents that share input nodes have those of these nodes, and of the latents beside them.
    """
    if len(latents) == 1:
        (latent,) = latents
        return [[(latent.place, var) for var in sorted(latent.place.scope)]]
    owners = Counter(parameter_owner(leaf) for latent in latents for leaf in latent.leaves)
    shared = [owner for owner, count in owners.items() if count > 1]
    own: list[dict[Node, int]] = [{parameter_owner(leaf): leaf.var for leaf in one.leaves} for one in latents]
    beside = [{}, *own, {}]
    return [
        [(owner, variables.get(owner)) for variables in beside[position : position + 3] for owner in shared]
        for position in range(len(latents))
    ]


def _features(pc: CompiledCircuit, x: Tensor, known: Tensor, ordered: bool) -> dict[int, Tensor]:
    """Return numbers to cluster by per variable, 0 on average and where nothing is known."""
    columns: dict[int, Tensor] = {}
    families = {node.var: node.distribution for node in pc.circuit.inputs}
    for var, family in families.items():
        values, is_known = x[:, var].double(), known[:, var].unsqueeze(1)
        values = torch.where(is_known[:, 0], values, 0.0).unsqueeze(1)
        is_named = isinstance(family, Categorical) and family.num_values > 2 and not ordered
        if is_named:
            values = torch.nn.functional.one_hot(values[:, 0].long(), family.num_values).double() / 2**0.5
        count = is_known.sum().clamp_min(1)
        centred = torch.where(is_known, values - (values * is_known).sum(0) / count, 0.0)
        if not is_named and not isinstance(family, Bernoulli) and family.num_values != 2:
            scale = (centred.square().sum() / count).sqrt()
            centred = centred / scale if scale > 0 else centred
        columns[var] = centred
    return columns
