"""Circuits over region graphs have the likelihoods of libcirkit's (Loconte et al.) with the same weights."""

import numpy
import pytest
import torch

import circuits as ct
from circuits.region_graphs import Partition, RegionGraph

pytest.importorskip("cirkit", reason="libcirkit is not installed; it comes with the extra [peers]")
pytestmark = [pytest.mark.filterwarnings("ignore")]  # what libcirkit warns of on import is not ours

from cirkit.pipeline import PipelineContext  # noqa: E402
from cirkit.symbolic import layers as peer_layers  # noqa: E402
from cirkit.symbolic.parameters import ConstantParameter, Parameter  # noqa: E402
from cirkit.templates.region_graph import graph as peer_graph  # noqa: E402
from cirkit.templates.region_graph.algorithms import poon_domingos, quad, random  # noqa: E402

UNITS, CATEGORIES = 3, 3


class Weights:
    """Random normalised weights that are handed to the peer and remembered."""

    def __init__(self, seed):
        self.rng = numpy.random.default_rng(seed)
        self.tables = {}

    def __call__(self, shape):
        table = self.rng.random(shape) + 0.05
        table /= table.sum(-1, keepdims=True)
        parameter = Parameter.from_input(ConstantParameter(*shape, value=table))
        self.tables[id(parameter)] = parameter, torch.from_numpy(table)
        return parameter

    def of(self, parameter):
        return self.tables[id(parameter)][1]


def as_peer(graph):
    regions = [peer_graph.RegionNode(graph.scope(region)) for region in range(graph.num_regions)]
    below = {regions[region]: [] for region in range(graph.num_regions) if graph.partitions_of[region]}
    nodes = list(regions)
    for partition in graph.partitions:
        node = peer_graph.PartitionNode(graph.scope(partition.region))
        nodes.append(node)
        below[regions[partition.region]].append(node)
        below[node] = [regions[part] for part in partition.parts]
    return peer_graph.RegionGraph(nodes, below, outputs=[regions[graph.root]])


def as_ours(peer):
    regions = list(peer.region_nodes)
    position = {region: i for i, region in enumerate(regions)}
    partitions = [
        Partition(position[region], tuple(position[part] for part in peer.partition_inputs(partition)))
        for region in regions
        for partition in peer.region_inputs(region)
    ]
    return RegionGraph(tuple(sum(1 << var for var in region.scope) for region in regions), tuple(partitions))


def copy_weights(pc, node, peer, layer, weights):
    """Walk down both circuits; sums of the peer over sums are one dense sum of ours."""
    below = peer.layer_inputs(layer)
    if isinstance(node, ct.Input):
        pc.set_weights(node, weights.of(layer.probs).t())
        return
    if isinstance(node, ct.Sum):
        assert isinstance(layer, peer_layers.SumLayer)
        table = weights.of(layer.weight)
        if all(isinstance(child, peer_layers.SumLayer) for child in below) and isinstance(node.children[0], ct.Product):
            mixes = table.chunk(len(below), 1)
            table = torch.cat([mix @ weights.of(child.weight) for mix, child in zip(mixes, below, strict=True)], 1)
            below = [peer.layer_inputs(child)[0] for child in below]
        pc.set_weights(node, table)
    if all(isinstance(child, ct.Input) for child in node.children):
        by_variable = {tuple(lower.scope): lower for lower in below}  # the peer's order within a leaf may differ
        below = [by_variable[(child.var,)] for child in node.children]
    for child, lower in zip(node.children, below, strict=True):
        copy_weights(pc, child, peer, lower, weights)


GRAPHS = {
    "quad graph": lambda: RegionGraph.quad_graph((3, 4)),
    "quad graph with channels": lambda: RegionGraph.quad_graph((2, 2, 3)),
    "quad tree": lambda: RegionGraph.quad_tree((4, 3)),
    "quad tree, four splits": lambda: RegionGraph.quad_tree((4, 4), num_splits=4),
    "random binary tree": lambda: RegionGraph.random_binary_tree(10, 3, 2, seed=0),
    "random binary tree, shallow": lambda: RegionGraph.random_binary_tree(10, 2, 3, seed=0),
    "Poon-Domingos": lambda: RegionGraph.poon_domingos((3, 3), 1),
    "linear tree": lambda: RegionGraph.linear_tree(5, num_repetitions=2, seed=0),
    "tree": lambda: RegionGraph.from_tree([(0, 1), (1, 2), (1, 3), (3, 4)]),
}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "sum_product", "num_input_units"),
    [(name, "cp", 4) for name in GRAPHS]
    + [(name, "tucker", UNITS) for name in GRAPHS if name not in ("quad tree, four splits", "tree")],
)
def test_likelihoods_equal_libcirkits(name, sum_product, num_input_units):
    graph, weights = GRAPHS[name](), Weights(0)
    peer = as_peer(graph).build_circuit(
        input_factory=lambda scope, num_units: peer_layers.CategoricalLayer(
            scope, num_units, num_categories=CATEGORIES, probs_factory=weights
        ),
        sum_product=sum_product,
        sum_weight_factory=weights,
        num_input_units=num_input_units,
        num_sum_units=UNITS,
    )
    compiled = PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True).compile(peer)
    circuit = ct.structures.from_region_graph(
        graph, UNITS, CATEGORIES, num_input_units=num_input_units, sum_product=sum_product
    )
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    copy_weights(pc, circuit.root, peer, next(iter(peer.outputs)), weights)
    x = torch.randint(CATEGORIES, (16, graph.num_vars), generator=torch.Generator().manual_seed(0))
    expected = compiled(x).flatten()
    torch.testing.assert_close(pc(x), expected, rtol=1e-10, atol=0)


def structure_of(graph):
    """Return the graph as nested sets: which regions there are, and how each is split."""
    return sorted(
        (sorted(graph.scope(partition.region)), sorted(sorted(graph.scope(part)) for part in partition.parts))
        for partition in graph.partitions
    )


@pytest.mark.parametrize("shape", [(2, 2), (3, 4), (5, 3), (7, 7), (1, 6)])
def test_grids_are_split_as_by_libcirkit(shape):
    with_channel = (1, *shape)
    pairs = [
        (RegionGraph.quad_graph(shape), quad.QuadGraph(with_channel)),
        (RegionGraph.quad_tree(shape), quad.QuadTree(with_channel)),
        (RegionGraph.quad_tree(shape, num_splits=4), quad.QuadTree(with_channel, num_patch_splits=4)),
        (RegionGraph.poon_domingos(shape, 2), poon_domingos.PoonDomingos(with_channel, delta=2)),
        (RegionGraph.poon_domingos(shape, [3, 1]), poon_domingos.PoonDomingos(with_channel, delta=[3, 1])),
    ]
    for ours, peer in pairs:
        assert structure_of(ours) == structure_of(as_ours(peer))
        assert ours.num_regions == len(list(peer.region_nodes))


@pytest.mark.parametrize("num_vars", [1, 5, 8, 13])
def test_random_binary_trees_have_the_shape_of_libcirkits(num_vars):
    ours = RegionGraph.random_binary_tree(num_vars, None, 2, seed=0)
    peer = as_ours(random.RandomBinaryTree(num_vars, num_repetitions=2))
    sizes = [sorted(scope.bit_count() for scope in graph.scope_bits) for graph in (ours, peer)]
    assert sizes[0] == sizes[1]
