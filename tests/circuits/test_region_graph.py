"""Region graphs: what the builders make, what is refused, and what comes back from a file."""

import itertools
import json
import os

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
from circuits.region_graphs import Partition
from circuits.region_graphs.rooted import rooted_tree

GRAPHS = {
    "fully factorized": lambda: ct.RegionGraph.fully_factorized(5, num_repetitions=2),
    "linear tree": lambda: ct.RegionGraph.linear_tree(5, num_repetitions=2, seed=0),
    "random binary tree": lambda: ct.RegionGraph.random_binary_tree(11, 3, 2, seed=0),
    "Poon-Domingos": lambda: ct.RegionGraph.poon_domingos((3, 4), 1),
    "Poon-Domingos, coarse first": lambda: ct.RegionGraph.poon_domingos((5, 5), [3, 1]),
    "Poon-Domingos with channels": lambda: ct.RegionGraph.poon_domingos((2, 3, 3), 2),
    "Poon-Domingos on a line": lambda: ct.RegionGraph.poon_domingos((6,), 2, max_depth=2),
    "quad tree": lambda: ct.RegionGraph.quad_tree((5, 3)),
    "quad tree, four splits": lambda: ct.RegionGraph.quad_tree((5, 3), num_splits=4),
    "quad graph": lambda: ct.RegionGraph.quad_graph((5, 3)),
    "quad graph with channels": lambda: ct.RegionGraph.quad_graph((3, 2, 2)),
    "Chow-Liu tree": lambda: ct.RegionGraph.chow_liu_tree(torch.randint(3, (20, 6))),
    "Chow-Liu tree of one variable": lambda: ct.RegionGraph.chow_liu_tree(torch.randint(3, (20, 1))),
    "tree": lambda: ct.RegionGraph.from_tree([(0, 1), (1, 2), (1, 3)]),
    "one variable": lambda: ct.RegionGraph.fully_factorized(1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_parts_are_disjoint_and_cover_their_region(name):
    graph = GRAPHS[name]()
    assert graph.scope(graph.root) == frozenset(range(graph.num_vars))
    for partition in graph.partitions:
        parts = [graph.scope(part) for part in partition.parts]
        assert all(not one & other for one, other in itertools.combinations(parts, 2))
        assert frozenset().union(*parts) == graph.scope(partition.region)
        order = graph.parts_first
        assert all(order.index(part) < order.index(partition.region) for part in partition.parts)
    reached = networkx.descendants(graph.to_networkx(), ("region", graph.root))
    assert len(reached) == graph.num_regions + len(graph.partitions) - 1


@pytest.mark.parametrize("name", GRAPHS)
def test_a_region_graph_comes_back_from_its_file_and_from_networkx(name, tmp_path):
    graph = GRAPHS[name]()
    graph.save(tmp_path / "graph.json")
    assert ct.RegionGraph.load(tmp_path / "graph.json") == graph
    assert os.listdir(tmp_path) == ["graph.json"]
    again = ct.RegionGraph.from_networkx(graph.to_networkx(), shape=graph.shape)
    assert again.scope_bits == graph.scope_bits
    assert set(again.partitions) == set(graph.partitions)


@pytest.mark.parametrize(
    ("graph", "num_regions", "num_partitions"),
    [
        (ct.RegionGraph.fully_factorized(5), 6, 1),
        (ct.RegionGraph.fully_factorized(5, num_repetitions=3), 16, 3),
        (ct.RegionGraph.linear_tree(5), 9, 4),
        (ct.RegionGraph.random_binary_tree(8, 3, 1, seed=0), 15, 7),
        (ct.RegionGraph.random_binary_tree(8, 2, 3, seed=0), 1 + 3 * 6, 3 * 3),
        (ct.RegionGraph.random_binary_tree(8, 0, 3, seed=0), 1, 0),
        (ct.RegionGraph.quad_tree((4, 4)), 31, 15),
        (ct.RegionGraph.quad_tree((4, 4), num_splits=4), 21, 5),
        (ct.RegionGraph.quad_graph((2, 2)), 4 + 4 + 1, 6),
        (ct.RegionGraph.quad_graph((4, 4)), 16 + 4 * 5 + 5, 5 * 6),
        (ct.RegionGraph.quad_tree((3, 2)), 6 + 3 + 1 + 1, 5),
        # rectangles of a grid of h x w cells: h(h+1)/2 * w(w+1)/2, each cut along every inner line
        (ct.RegionGraph.poon_domingos((2, 3), 1), 3 * 6, 18),
        (ct.RegionGraph.poon_domingos((4, 6), 2), 3 * 6, 18),
        (ct.RegionGraph.poon_domingos((3, 4, 6), 2), 3 * 6, 18),
        (ct.RegionGraph.poon_domingos((4, 4), 1, max_depth=1), 1 + 12, 6),
        (ct.RegionGraph.from_tree([(0, 1), (1, 2), (1, 3)]), 5, 1),
    ],
)
def test_small_graphs_have_the_known_numbers_of_regions(graph, num_regions, num_partitions):
    assert (graph.num_regions, len(graph.partitions)) == (num_regions, num_partitions)


def test_the_rectangles_of_a_grid_are_the_regions_of_poon_domingos():
    height, width = 3, 4
    graph = ct.RegionGraph.poon_domingos((height, width), 1)
    rows = list(itertools.combinations(range(height + 1), 2))
    columns = list(itertools.combinations(range(width + 1), 2))
    rectangles = {
        frozenset(i * width + j for i in range(*r) for j in range(*c)) for r, c in itertools.product(rows, columns)
    }
    assert {graph.scope(region) for region in range(graph.num_regions)} == rectangles


def test_the_root_of_a_tree_of_variables_is_split_off_first():
    edges = [(0, 1), (1, 2), (2, 3), (3, 4)]
    for root, depth in ((None, 2), (2, 2), (0, 4)):
        graph = ct.RegionGraph.from_tree(edges, root=root)
        first = graph.partitions_of[graph.root][0]
        assert frozenset({2 if root is None else root}) in {graph.scope(part) for part in first.parts}
        regions = [node for node in graph.to_networkx() if node[0] == "region"]
        lengths = networkx.single_source_shortest_path_length(graph.to_networkx(), ("region", graph.root))
        assert max(lengths[region] for region in regions) == 2 * depth


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(*(st.integers(0, i) for i in range(n - 1)))))
def test_the_centre_of_a_tree_is_networkxs(parents):
    edges = [(parent, var) for var, parent in enumerate(parents, start=1)]
    tree = rooted_tree(edges)
    assert tree.order[0] in networkx.center(networkx.Graph(edges))
    assert sorted((min(a, b), max(a, b)) for a in tree.children for b in tree.children[a]) == sorted(edges)


def test_structured_decomposability_is_told_apart():
    assert ct.RegionGraph.quad_tree((4, 4)).is_structured_decomposable
    assert not ct.RegionGraph.quad_graph((4, 4)).is_structured_decomposable


def test_the_same_seed_gives_the_same_graph():
    one, same, other = (ct.RegionGraph.random_binary_tree(16, 3, 2, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other


@given(st.integers(1, 6), st.integers(1, 6))
def test_quad_graphs_of_all_shapes_are_valid(height, width):
    graph = ct.RegionGraph.quad_graph((height, width))
    assert graph.num_vars == height * width
    assert len(graph.leaves) == height * width


def test_a_graph_of_your_own_by_its_edges():
    graph = ct.RegionGraph.from_edges([({0, 1, 2}, [{0}, {1, 2}]), ({0, 1, 2}, [{0, 1}, {2}]), ({1, 2}, [{1}, {2}])])
    assert graph.num_regions == 6
    assert len(graph.partitions_of[graph.root]) == 2
    assert {graph.scope(leaf) for leaf in graph.leaves} == {
        frozenset({0}),
        frozenset({1}),
        frozenset({2}),
        frozenset({0, 1}),
    }
    pc = ct.compile(ct.structures.from_region_graph(graph, 3, [2, 3, 4]), dtype=torch.float64, seed=0)
    assert ct.testing.enumerate_joint(pc).exp().sum() == pytest.approx(1)


def test_region_graphs_are_immutable():
    graph = ct.RegionGraph.linear_tree(3)
    with pytest.raises(AttributeError):
        graph.partitions = ()
    with pytest.raises(networkx.NetworkXError):
        graph.to_networkx().add_node(0)


def no_scope():
    graph = networkx.DiGraph()
    graph.add_node("r", scope={0, 1})
    graph.add_edge("r", "p")
    graph.add_edge("p", "q")
    return ct.RegionGraph.from_networkx(graph)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ct.RegionGraph.from_edges([({0, 1, 2}, [{0, 1}, {1, 2}])]),
            ct.StructureError,
            r"partition of \{0, 1, 2\}: expected disjoint parts, got \{1\}",
        ),
        (
            lambda: ct.RegionGraph.from_edges([({0, 1, 2}, [{0}, {1}])]),
            ct.StructureError,
            r"partition of \{0, 1, 2\}: expected the same variables in its parts, got \{0, 1\}",
        ),
        (
            lambda: ct.RegionGraph.from_edges([({0, 1}, [{0, 1}])]),
            ct.StructureError,
            "expected at least 2 parts, got 1",
        ),
        (
            lambda: ct.RegionGraph.from_edges([({0, 1}, [{0}, {1}]), ({2, 3}, [{2}, {3}])]),
            ct.StructureError,
            r"no single root: 2 of 6 regions are part of no other, \{0, 1\}, \{2, 3\}",
        ),
        (lambda: ct.RegionGraph.from_edges([]), ct.StructureError, "no single root: 0 of 0"),
        (
            lambda: ct.RegionGraph.from_edges([({0, 2}, [{0}, {2}])]),
            ct.StructureError,
            r"root: expected all .* got \{0, 2\}",
        ),
        (lambda: ct.RegionGraph.from_edges([({0, "a"}, [{0}, {"a"}])]), ct.StructureError, "unknown variable 'a'"),
        (lambda: ct.RegionGraph((1, 0), ()), ct.StructureError, "region 1: expected variables, got none"),
        (lambda: ct.RegionGraph((3,), (Partition(0, (1, 2)),)), ct.StructureError, "unknown region 1"),
        (
            lambda: ct.RegionGraph((3,), (), shape=(3,)),
            ct.ArgumentError,
            r"shape: expected 2 cells, one per variable, got \(3,\)",
        ),
        (no_scope, ct.StructureError, "expected one region above the partition '[pq]'"),
        (lambda: ct.RegionGraph.from_tree([(0, 1), (1, 3)]), ct.StructureError, "a tree over the variables 0 to 2"),
        (lambda: ct.RegionGraph.linear_tree(3, order=[0, 1]), ct.ArgumentError, "order: expected every variable"),
        (lambda: ct.RegionGraph.random_binary_tree(4, 3), ct.ArgumentError, "depth: 4 variables can be halved 2 times"),
        (lambda: ct.RegionGraph.random_binary_tree(0), ct.ArgumentError, "num_vars: expected an integer >= 1, got 0"),
        (lambda: ct.RegionGraph.quad_tree(4), ct.ArgumentError, r"shape: expected \(height, width\) or"),
        (lambda: ct.RegionGraph.quad_tree((4, 0)), ct.ArgumentError, "shape: expected an integer >= 1, got 0"),
        (
            lambda: ct.RegionGraph.quad_tree((4, 4), num_splits=3),
            ct.ArgumentError,
            "num_splits: expected 2 or 4, got 3",
        ),
        (lambda: ct.RegionGraph.poon_domingos((4, 4), 0), ct.ArgumentError, "delta: expected an integer >= 1, got 0"),
        (lambda: ct.RegionGraph.poon_domingos((), 1), ct.ArgumentError, r"shape: expected \(length,\)"),
    ],
)
def test_what_is_not_a_region_graph_is_told_why(build, error, message):
    with pytest.raises(error, match=message):
        build()


def edited(**changes):
    def edit(record):
        return {**record, **changes}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: [], "format: expected unfactor-region-graph"),
        (edited(format="other"), "format: expected unfactor-region-graph"),
        (edited(format_version=2), "format version: expected 1, got 2"),
        (edited(format_version=True), "format version: expected 1, got True"),
        (edited(extra=1), "keys: expected no others, got 'extra'"),
        (lambda record: {k: v for k, v in record.items() if k != "shape"}, "keys: expected shape, got none"),
        (edited(regions=3), "regions: expected a list, got 3"),
        (edited(regions=[], partitions=[]), "no single root"),
        (edited(regions=[[1 << 62]]), "a region: expected integers from 0 to 0"),
        (edited(regions=[["a", "b"]]), "a region: expected integers from 0 to 1, got 'a'"),
        (edited(partitions=[[0]]), "a partition: expected a region and its parts"),
        (edited(partitions=[[0, [1, 99]]]), "a partition: expected integers from 0 to 4, got 99"),
        (edited(partitions=[[0, [1, 1]]]), "region graph: partition of"),
        (edited(shape=[5]), "shape: expected integers from 0 to 3, got 5"),
        (edited(shape=[2]), "region graph: shape"),
    ],
)
def test_a_bad_file_is_a_checkpoint_error(edit, message, tmp_path):
    path = tmp_path / "graph.json"
    ct.RegionGraph.linear_tree(3).save(path)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ct.CheckpointError, match=message):
        ct.RegionGraph.load(path)


def test_a_file_that_is_no_json_or_missing_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "graph.json"
    with pytest.raises(ct.CheckpointError, match="expected a file that can be read, got No such file"):
        ct.RegionGraph.load(path)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ct.CheckpointError, match=r"graph.json: expected JSON, got"):
        ct.RegionGraph.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ct.CheckpointError, match=r"graph.json: expected JSON, got"):
        ct.RegionGraph.load(path)
