"""Exchange circuits with PyJuice (Liu, Ahmed, Van den Broeck 2024): our circuits to its nodes, and back."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError, PropertyError
from circuits.families import Bernoulli, Categorical, Distribution
from circuits.interop._build import build_circuit
from circuits.interop._nodes import JuiceNode, list_nodes
from circuits.queries.common import one_root_needed
from circuits.symbolic import Circuit
from circuits.symbolic.flat import below_first
from circuits.transforms.rebuild import check_is_table

Reader = Literal["pyjuice", "codd"]
"""Whom nodes are made for."""
_CATEGORICAL = ("Categorical", "ExternProductCategorical", "ExternSoftEvidenceCategorical")


def to_pyjuice(pc: CompiledCircuit, *, block_size: int | None = None, for_: Reader = "pyjuice") -> Any:
    """Return PyJuice's nodes of a circuit, with its weights; ``pyjuice.compile`` takes them where CUDA is there.

    PyJuice groups units in blocks. Where a node's number of units is no multiple of the block size, its last block is
    filled up with copies of its first unit that nothing has a weight for. Sums of sums and products of products get a
    node in between that changes nothing. Zero weights are masked, so PyJuice's EM keeps them zero. Tied parameters stay
    tied, unless the units of tied sums' children fall into different blocks.

    Args:
        pc: the circuit; its inputs are categorical or Bernoulli.
        block_size: units per block, a power of two; None: the largest that divides every node's number of units.
        for_: "pyjuice", or "codd": inputs are ``ExternProductCategorical``, the only ones whose soft evidence CoDD's
            decoder (Li et al. 2026) does not silently ignore; they need categorical inputs alone.

    Returns:
        The root, a ``pyjuice.nodes.SumNodes`` on the CPU, in float32 as PyJuice keeps them.

    Raises:
        ArgumentError: a wrong block size or reader, or PyJuice is not installed.
        PropertyError: another input family, or a circuit with classes.
    """
    if for_ not in get_args(Reader):
        raise ArgumentError(f"for_: expected 'pyjuice' or 'codd', got {for_!r}")
    juice = import_pyjuice()
    check_compiled(pc)
    check_has_one_root(pc.circuit)
    for node in pc.circuit.inputs:
        check_is_table(node, "PyJuice")
    built: list[Any] = []
    for listed in list_nodes(pc, block_size):
        children = [built[child] for child in listed.children]
        source = None if listed.source is None else built[listed.source]
        options: dict[str, Any] = {"block_size": listed.block_size, "source_node": source}
        if listed.kind == "input":
            family = _family_of(listed.distribution, juice, for_)
            new = juice.inputs(listed.var, num_node_blocks=listed.num_blocks, dist=family, **options)
        elif listed.kind == "product":
            assert listed.edges is not None
            is_sparse = len(listed.edges) != listed.num_blocks
            new = juice.multiply(*children, edge_ids=listed.edges, sparse_edges=is_sparse)
        else:
            new = juice.summate(*children, num_node_blocks=listed.num_blocks, edge_ids=listed.edges, **options)
        if isinstance(listed.parameters, Tensor):
            if listed.kind == "sum" and bool((listed.parameters == 0).any()):
                new.set_zero_param_mask(listed.parameters == 0)
            new.set_params(listed.parameters, normalize=False)
        built.append(new)
    return built[-1]


def from_pyjuice(
    root: Any, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int | None = None
) -> CompiledCircuit:
    """Return the circuit of PyJuice's nodes, with their weights; those that have none yet are drawn.

    Inputs that take soft evidence there are categorical here, where any input takes it; of sums with external
    parameters the shared weights are read. Edges between blocks that are missing become zero weights. Products that are
    neither elementwise nor outer get sums below them that pick the units. PyJuice's padding units stay:
    ``ct.transforms.trim`` drops them.

    Args:
        root: a ``pyjuice.nodes.CircuitNodes`` with one unit, or a ``pyjuice.TensorCircuit``.
        device: where the parameters go.
        dtype: torch.float32 or torch.float64.
        seed: for weights that are not initialised; fresh entropy when omitted.

    Raises:
        ArgumentError: ``root`` is something else.
        PropertyError: an input family other than categorical and Bernoulli.
        StructureError: the nodes are no circuit of ours: variables are missing, or the root has several units.
    """
    if hasattr(root, "root_ns"):
        root.update_parameters()
        root = root.root_ns
    if not (hasattr(root, "chs") and hasattr(root, "num_node_blocks")):
        raise ArgumentError(f"root: expected nodes of PyJuice, or a TensorCircuit, got {type(root).__name__}")
    order = _children_first(root)
    position = {node: place for place, node in enumerate(order)}
    listed = [_listed(node, position) for node in order]
    return build_circuit(listed, device=device, dtype=dtype, seed=seed)


def check_has_one_root(circuit: Circuit) -> None:
    """Raise PropertyError if the circuit has one root unit per class, which PyJuice does not know."""
    if circuit.num_classes is not None:
        raise one_root_needed("PyJuice", circuit)


def import_pyjuice() -> Any:
    """Import PyJuice, or raise an ArgumentError that says how to install it."""
    try:
        import pyjuice
    except ImportError as error:
        raise ArgumentError(
            f"pyjuice: expected the package pyjuice (Linux on x86-64), which is not there: {error}; pip install pyjuice"
        ) from error
    return pyjuice


def _family_of(distribution: Distribution | None, juice: Any, reader: Reader) -> Any:
    if isinstance(distribution, Bernoulli):
        if reader == "codd":
            raise PropertyError(
                "pc: expected categorical inputs, which CoDD's decoder gives evidence to, got Bernoulli"
            )
        return juice.distributions.Bernoulli()
    assert isinstance(distribution, Categorical)
    if reader == "codd":
        return juice.distributions.ExternProductCategorical(num_cats=distribution.num_categories)
    return juice.distributions.Categorical(num_cats=distribution.num_categories)


def _children_first(root: Any) -> list[Any]:
    """List all nodes below the root, and before them the sources outside of it, each after its children; root last."""
    roots = [root]
    while True:
        order = dict.fromkeys(below_first(None, lambda node, roots=roots: roots if node is None else node.chs))  # type: ignore[misc]
        del order[None]
        sources = (node._source_node for node in order if node._source_node is not None)
        outside = list(dict.fromkeys(source for source in sources if source not in order))
        if not outside:
            return list(order)
        roots = outside + roots


def _listed(node: Any, position: dict[Any, int]) -> JuiceNode:
    source = None if node._source_node is None else position[node._source_node]
    if node.is_input():
        return JuiceNode(
            "input",
            node.num_node_blocks,
            node.block_size,
            parameters=_tensor(node._params),
            var=_variable_of(node),
            distribution=_distribution_of(node),
            source=source,
        )
    children = tuple(position[child] for child in node.chs)
    edges = node.edge_ids.detach().cpu().long()
    if node.is_prod():
        return JuiceNode("product", node.num_node_blocks, node.block_size, children, edges)
    return JuiceNode(
        "sum", node.num_node_blocks, node.block_size, children, edges, _tensor(node._params), source=source
    )


def _tensor(parameters: Any) -> Tensor | None:
    return None if parameters is None else parameters.detach().cpu()


def _variable_of(node: Any) -> int:
    variables = node.scope.to_list()
    if len(variables) != 1:
        raise PropertyError(f"root: {node!r} is a distribution on the variables {variables}; input units have one")
    return int(variables[0])


def _distribution_of(node: Any) -> Distribution:
    signature = node.dist.get_signature()
    if signature in _CATEGORICAL:
        return Categorical(int(node.dist.num_cats))
    if signature == "Bernoulli":
        return Bernoulli()
    raise PropertyError(f"root: {node!r} is of the family {signature}; expected Categorical or Bernoulli")
