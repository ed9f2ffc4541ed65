"""Where learning of latent structure starts: at clusters of the data, in place of random weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.engine import passes
from circuits.engine.compile import CompiledCircuit, check_compiled
from circuits.engine.conditioning import LayerValues
from circuits.errors import ArgumentError, ImpossibleEvidenceError
from circuits.families import Bernoulli, Categorical
from circuits.learning import em
from circuits.learning._arrays import Table
from circuits.learning.clusters import kmeans
from circuits.learning.em_options import check_em_options
from circuits.learning.samples import Batch, checked_samples
from circuits.precision import own_precision
from circuits.symbolic import Input, Node, Product, parameter_owner

if TYPE_CHECKING:
    import numpy as np

_NUM_STARTS = 4


@own_precision
def distill_latents(
    pc: CompiledCircuit,
    data: Tensor | np.ndarray | Table,  # shape: (N, D)
    states: Mapping[str | Input, Tensor],  # each of shape: (N,)
    *,
    observed: Tensor | np.ndarray | Table | None = None,  # shape: (N, D)
    sample_weights: Tensor | np.ndarray | None = None,  # shape: (N,)
    labels: Tensor | np.ndarray | None = None,  # shape: (N,)
    pseudocount: float = 1.0,
    batch_size: int = 256,
) -> None:
    """Do one EM step in which some latent variables are known, in place: latent variable distillation.

    The states may come from any model that sees more than the circuit does, such as clusters of a neural network's
    features (Liu, Zhang, Van den Broeck 2023, "Scaling Up Probabilistic Circuits by Latent Variable Distillation").
    Latents without states are inferred as always.

    Args:
        pc: the circuit.
        data: (N, D), like that of :func:`fit`.
        states: which unit of an input node is used in every sample, int64 (N,) by input node or its name; -1 where that
            is unknown. In a mixture, a hidden Markov model or a latent tree, the unit of the input node of a variable
            is the state of its latent.
        observed: bool (N, D), False where a value is missing.
        sample_weights: how often each sample counts, (N,) >= 0.
        labels: the class of each sample, int64 (N,), for a circuit with ``num_classes``.
        pseudocount: a >= 0, see :func:`em_step`.
        batch_size: the greatest number of samples a batch.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
        ImpossibleEvidenceError: all samples have probability zero with these states.
    """
    check_em_options(pseudocount=pseudocount)
    checked_count("batch_size", batch_size)
    samples = checked_samples(pc, "data", data, observed, sample_weights, labels)
    known = _checked_states(pc, states, len(samples.x))
    order = torch.arange(len(samples.x))
    total: em.BankFlows = {}
    num_possible = 0
    batches = zip(
        samples.batches(batch_size, pc.device, order), order.tensor_split(-(-len(order) // batch_size)), strict=True
    )
    for batch, index in batches:
        flows, is_possible = _supervised_flows(pc, batch, {node: state[index] for node, state in known.items()})
        total = {name: flow + total.get(name, 0) for name, flow in flows.items()}
        num_possible += int(is_possible.sum())
    if not num_possible:
        raise ImpossibleEvidenceError(
            "states: all samples have probability zero with these states; look for zeros in the circuit's weights"
        )
    em.em_step(pc, total, pseudocount=pseudocount)


@own_precision
def initialize_by_kmeans(
    pc: CompiledCircuit,
    data: Tensor | np.ndarray | Table,  # shape: (N, D)
    *,
    observed: Tensor | np.ndarray | Table | None = None,  # shape: (N, D)
    labels: Tensor | np.ndarray | None = None,  # shape: (N,)
    ordered: bool = False,
    max_samples: int = 10_000,
    pseudocount: float = 1.0,
    seed: int = 0,
) -> None:
    """Set the weights to those that k-means clusters of the data, as states of the latents, make most likely, in place.

    Call it before :func:`fit`, which then starts near a good solution. The latents are those whose K states are the
    units of input nodes: that of a mixture, of a hidden Markov model, of a latent tree. A latent's samples are
    clustered by the variables below it; latents that share their input units, such as those of a homogeneous hidden
    Markov model, are clustered together, each by its own variable and the two beside it. Units that get no cluster
    keep their weights.

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
    checked_count("max_samples", max_samples)
    groups = _latent_groups(pc)
    if not groups:
        raise ArgumentError(
            f"pc: {pc.circuit} has no product of an input node of several units with its other parts, so no latent to "
            "cluster for; use ct.learning.initialize_inputs"
        )
    samples = checked_samples(pc, "data", data, observed, None, labels)
    count = max(1, max_samples // max(map(len, groups)))
    chosen = torch.randperm(len(samples.x), generator=torch.Generator().manual_seed(seed))[:count]
    x, is_observed = (
        None if tensor is None else tensor[chosen.to(tensor.device)] for tensor in (samples.x, samples.observed)
    )
    assert x is not None
    known = ~x.isnan() if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)
    known = known if is_observed is None else known & is_observed.to(x.device)
    columns = _features(pc, x, known, ordered)
    states: dict[str | Input, Tensor] = {}
    for number, group in enumerate(groups):
        rows = torch.cat([torch.cat([columns[var] for var in context], 1) for _, context in group])
        asked = [
            [leaf.var] if len(group) > 1 else [var for var in context if var is not None] for leaf, context in group
        ]
        is_known = torch.cat([known[:, variables].any(1) for variables in asked])  # padding is no cluster
        if not bool(is_known.any()):
            continue
        clusters = torch.full((len(rows),), -1)
        clusters[is_known] = _best_clusters(rows[is_known], group[0][0].num_units, seed + number).cpu()
        states |= {leaf: part for (leaf, _), part in zip(group, clusters.split(len(x)), strict=True)}
    chosen_labels = None if samples.labels is None else samples.labels[chosen.to(samples.labels.device)]
    distill_latents(pc, x, states, observed=known, labels=chosen_labels, pseudocount=pseudocount)


def _best_clusters(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Return the clusters, of several starts of k-means, whose samples are closest to their means."""
    tries = [kmeans(rows, num_clusters, seed=_NUM_STARTS * seed + start) for start in range(_NUM_STARTS)]
    return max(tries, key=lambda labels: _explained(rows, labels, num_clusters))


def _explained(rows: Tensor, labels: Tensor, num_clusters: int) -> float:
    totals = rows.new_zeros(num_clusters, rows.shape[1]).index_add_(0, labels, rows)
    sizes = labels.bincount(minlength=num_clusters).clamp_min(1).unsqueeze(1)
    return float((totals.square() / sizes).sum())


def _supervised_flows(pc: CompiledCircuit, batch: Batch, states: Mapping[Input, Tensor]) -> tuple[em.BankFlows, Tensor]:
    """Return expected flows given the evidence and the units of some input nodes, and which samples are possible."""
    with torch.inference_mode(False), torch.enable_grad():
        banks, sources = em.traced_weights(pc)
        leaf_values = pc.leaves(batch.evidence, banks)
        others = [torch.zeros_like(value, requires_grad=False) for value in leaf_values]
        is_silent = passes.silent_inputs(pc, batch.evidence.says_nothing(pc.num_categories))
        for node, state in states.items():
            layer, row = pc.address(node)
            state = state.to(pc.device)
            is_other = torch.arange(node.num_units, device=pc.device).unsqueeze(1) != state
            others[layer][row].masked_fill_(is_other & (state >= 0), -torch.inf)
            is_silent[layer][row] &= state < 0
        known = [value + other for value, other in zip(leaf_values, others, strict=True)]
        conditions = passes.silent_sums(pc, is_silent, pc.conditions(batch.evidence), banks)
        log_z = passes.log_root(pc, LayerValues(known, conditions), banks)
        is_possible = log_z != -torch.inf
        counts = is_possible.to(log_z.dtype)
        if batch.weights is not None:
            counts = counts * batch.weights.to(log_z)
        flows = torch.autograd.grad(log_z, list(sources.values()), counts, allow_unused=True, materialize_grads=True)
    return dict(zip(banks, flows, strict=True)), is_possible


def _checked_states(pc: CompiledCircuit, states: Mapping[str | Input, Tensor], num_samples: int) -> dict[Input, Tensor]:
    if not isinstance(states, Mapping):
        raise ArgumentError(f"states: expected tensors by input node or its name, got {type(states).__name__}")
    checked: dict[Input, Tensor] = {}
    for key, state in states.items():
        node = pc.circuit.node(key) if isinstance(key, str) else key
        if not isinstance(node, Input):
            raise ArgumentError(f"states: expected input nodes or their names, got {key!r}")
        pc.address(node)
        is_valid = isinstance(state, Tensor) and state.dtype == torch.int64 and tuple(state.shape) == (num_samples,)
        if not is_valid or not bool(((state >= -1) & (state < node.num_units)).all()):
            raise ArgumentError(
                f"states: expected int64 of shape ({num_samples},), from -1 (unknown) to {node.num_units - 1}, for "
                f"{node}, got {state!r:.80}"
            )
        checked[node] = state
    return checked


def _latent_groups(pc: CompiledCircuit) -> list[list[tuple[Input, Sequence[int | None]]]]:
    """Return, per latent or group of tied ones, an input node whose units are its states, and what to cluster by.

    That are variables in an order that is the same for all latents of a group; None: there is none at that place.
    """
    parents: dict[Node, Product] = {}
    for node in pc.circuit.nodes:
        if isinstance(node, Product) and node.mode == "elementwise":
            for child in node.children:
                parents.setdefault(child, node)
    tied: dict[Node, list[Input]] = defaultdict(list)
    for leaf in pc.circuit.inputs:
        if leaf.num_units > 1:
            tied[parameter_owner(leaf)].append(leaf)
    groups: list[list[tuple[Input, Sequence[int | None]]]] = []
    done: set[Node] = set()
    for leaves in tied.values():
        parent = parents.get(leaves[0])
        if (parent is None and len(leaves) == 1) or parent in done:
            continue
        if len(leaves) == 1:
            assert parent is not None
            groups.append([(leaves[0], sorted(parent.scope))])
            done.add(parent)
        else:
            around = [[leaf.var + step for step in (-1, 0, 1)] for leaf in leaves]
            last = pc.circuit.num_vars - 1
            groups.append(
                [
                    (leaf, [var if 0 <= var <= last else None for var in window])
                    for leaf, window in zip(leaves, around, strict=True)
                ]
            )
    return groups


def _features(pc: CompiledCircuit, x: Tensor, known: Tensor, ordered: bool) -> dict[int | None, Tensor]:
    """Return numbers to cluster by per variable, 0 on average and where nothing is known; None: a place outside."""
    columns: dict[int | None, Tensor] = {}
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
    widest = max((column.shape[1] for column in columns.values()), default=1)
    columns[None] = torch.zeros(len(x), widest, dtype=torch.float64, device=x.device)
    return columns
