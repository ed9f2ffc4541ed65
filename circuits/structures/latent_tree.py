"""Latent trees, and hidden Chow-Liu trees from data."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.families import Distribution
from circuits.region_graphs.chow_liu import chow_liu_tree, known_values
from circuits.region_graphs.rooted import rooted_tree
from circuits.structures.options import families_of
from circuits.symbolic import Circuit, Node, inputs, product, sum

if TYPE_CHECKING:
    import networkx


def latent_tree(
    tree: networkx.Graph | Iterable[tuple[Hashable, Hashable]],
    num_latents: int,
    num_categories: int | Distribution | Sequence[int | Distribution] | Mapping[int, int | Distribution],
    *,
    variables: Mapping[Any, int] | None = None,
    root: Hashable | None = None,
) -> Circuit:
    """Build a latent tree model: a tree of hidden variables, each of which emits what is observed at its node.

    ``p(x) = sum_z p(z_root) prod_i p(z_i | z_parent(i)) p(x_i | z_i)`` (Zhang 2004; Choi, Tan, Anandkumar, Willsky
    2011). A leaf of the tree needs no hidden variable: it hangs on its parent's. The sum node ``transition{i}`` is over
    the subtree of node i and has one unit per state of its parent; ``emission{i}`` are the input nodes, by variable.

    Args:
        tree: a networkx graph that is a tree, or the pairs of nodes of its edges.
        num_latents: K, states of every hidden variable.
        num_categories: C, or an input family; one for all variables, or one per variable.
        variables: which variable each node observes; nodes that are not named observe nothing and are purely
            hidden. By default the nodes are the variables 0 .. D - 1.
        root: the node at the top; None: the tree's centre, so that the depth is least.

    Raises:
        ArgumentError: an argument has a wrong type or value.
        StructureError: the edges are not one tree, or a leaf of it observes nothing.
    """
    checked_count("num_latents", num_latents)
    edges = _edges_of(tree)
    if variables is None:
        variables = {node: node for edge in edges for node in edge if isinstance(node, int)} or {0: 0}
    root = 0 if root is None and not edges else root
    _check_variables(variables)
    families = families_of("num_categories", num_categories, len(variables))
    return Circuit(sum(_tree_root(edges, num_latents, families, variables, root, prefix=""), num_units=1, name="root"))


def hclt(
    data: Tensor,
    num_latents: int,
    num_categories: int | Distribution | Sequence[int | Distribution] | None = None,
    *,
    root: int | None = None,
    pseudocount: float = 0.01,
    weights: Tensor | None = None,
    observed: Tensor | None = None,
    num_bins: int | None = None,
    num_trees: int = 1,
    seed: int | None = None,
) -> Circuit:
    """Build a hidden Chow-Liu tree (Liu and Van den Broeck 2021, "Tractable Regularization of Probabilistic Circuits").

    The Chow-Liu tree of the data (see ``RegionGraph.chow_liu_tree``) becomes a :func:`latent_tree`. The circuit's
    weights are not fitted: learn them with ``ct.learning.fit``.

    Args:
        data: integers (N, D), or floating point with NaN for missing values; only the tree depends on it.
        num_latents: K, states of every hidden variable.
        num_categories: C, or an input family; one for all variables, or one per variable; by default one more than
            each variable's largest value.
        root: the variable at the top; None: the tree's centre, so that the depth is least.
        pseudocount: as in :func:`empirical_mutual_information`, like ``weights``, ``observed`` and ``num_bins``.
        num_trees: T > 1 builds a mixture of T trees: the first is that of the data, the others those of bootstrap
            samples of it. With T > 1 the names of nodes start with ``tree{t}_``.
        seed: of the bootstrap samples.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    checked_count("num_latents", num_latents)
    checked_count("num_trees", num_trees)
    data, observed = known_values(data, observed)
    if data.dim() != 2 or 0 in data.shape:
        raise ArgumentError(f"data: expected an int64 tensor (N, D) that is not empty, got {tuple(data.shape)}")
    num_vars = data.shape[1]
    if num_categories is None:
        num_categories = [int(largest) + 1 for largest in data.amax(0).tolist()]
    families = families_of("num_categories", num_categories, num_vars)
    counts = [family.num_values for family in families]
    variables: dict[Hashable, int] = {var: var for var in range(num_vars)}
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    roots = []
    for position in range(num_trees):
        row_weights = weights if position == 0 else _bootstrapped(len(data), weights, generator)
        edges = chow_liu_tree(
            data,
            num_categories=counts if all(counts) else None,
            pseudocount=pseudocount,
            weights=row_weights,
            observed=observed,
            num_bins=num_bins,
        )
        prefix = f"tree{position}_" if num_trees > 1 else ""
        top = root if edges else 0
        roots.append(_tree_root(edges, num_latents, families, variables, top, prefix))
    return Circuit(sum(*roots, num_units=1, name="root"))


def _tree_root(
    edges: Sequence[tuple[Hashable, Hashable]],
    num_latents: int,
    families: Sequence[Distribution],
    observed: Mapping[Hashable, int],
    root: Hashable | None,
    prefix: str,
) -> Node:
    """Build the node of the root's hidden variable, one unit per state."""
    rooted = rooted_tree(edges, root)
    unknown = [node for node in observed if node not in rooted.children]
    if unknown:
        raise ArgumentError(f"variables: {unknown[0]!r} is not a node of the tree")
    states: dict[Hashable, Node] = {}
    for node in reversed(rooted.order):
        parts: list[Node] = []
        if node in observed:
            var = observed[node]
            parts.append(inputs(var, num_latents, families[var], name=f"{prefix}emission{var}"))
        for child in rooted.children[node]:
            if rooted.children[child]:
                mixed = sum(states[child], num_units=num_latents, name=f"{prefix}transition{child}")
                parts.append(mixed)
            else:
                parts.append(states[child])
        if not parts:
            raise StructureError(f"variables: the leaf {node!r} of the tree observes nothing; leave it out of the tree")
        states[node] = parts[0] if len(parts) == 1 else product(*parts)
    return states[rooted.order[0]]


def _edges_of(tree: networkx.Graph | Iterable[tuple[Hashable, Hashable]]) -> list[tuple[Hashable, Hashable]]:
    edges = tree.edges() if hasattr(tree, "edges") else tree
    pairs = []
    for edge in edges:
        if not isinstance(edge, (tuple, list)) or len(edge) != 2:
            raise ArgumentError(f"tree: expected pairs of nodes, got {edge!r}")
        pairs.append((edge[0], edge[1]))
    return pairs


def _check_variables(observed: Mapping[Hashable, int]) -> None:
    if set(observed.values()) != set(range(len(observed))):
        raise StructureError(
            f"tree: expected nodes that observe the variables 0 to {len(observed) - 1}, each once, got "
            f"{sorted(observed.values(), key=repr)[:8]}; name them with `variables`"
        )


def _bootstrapped(num_rows: int, weights: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw how often each row occurs in a sample of as many rows, with replacement."""
    chances = torch.ones(num_rows, dtype=torch.float64) if weights is None else weights.double().cpu()
    cumulative = chances.cumsum(0)
    draws = torch.rand(num_rows, generator=generator, dtype=torch.float64) * cumulative[-1]
    drawn = torch.searchsorted(cumulative, draws, right=True).clamp_max(num_rows - 1)
    return torch.bincount(drawn, minlength=num_rows).double()
