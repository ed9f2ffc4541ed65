"""Pictures are drawn, their vertices do not overlap, and what cannot be drawn is told why."""

import itertools
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import circuits as ct
from circuits.plot import drawing
from circuits.plot.layout import INCHES, Diagram, Vertex, placed

CIRCUIT = ct.structures.rat_spn(4, 2, 2, 2, 2, seed=0)
GRAPHS = {
    "boxes": ct.RegionGraph.random_binary_tree(20, 2, 2, seed=0),
    "cells": ct.RegionGraph.quad_graph((2, 4)),
    "channels": ct.RegionGraph.quad_tree((3, 2, 2)),
}
MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", MAGIC)
@pytest.mark.parametrize("engine", ["matplotlib", "graphviz", None])
def test_a_circuit_is_drawn(suffix, engine, tmp_path):
    if engine == "graphviz" and shutil.which("dot") is None:
        pytest.skip("Graphviz's program dot is not installed")
    path = tmp_path / f"circuit{suffix}"
    ct.plot.structure(CIRCUIT, path, engine=engine)
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_region_graph_is_drawn(name, tmp_path):
    ct.plot.region_graph(GRAPHS[name], tmp_path / "graph.png")
    ct.plot.region_graph(GRAPHS[name], tmp_path / "again.png", engine="matplotlib")
    assert (tmp_path / "graph.png").stat().st_size > 1000


def test_the_same_picture_is_the_same_file(tmp_path):
    for name in ("one.png", "other.png"):
        ct.plot.structure(CIRCUIT, tmp_path / name, engine="matplotlib")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def random_diagram(seed):
    generator = torch.Generator().manual_seed(seed)
    count = 30
    edges = [
        (upper, lower)
        for upper, lower in itertools.combinations(range(count), 2)
        if float(torch.rand((), generator=generator)) < 0.08
    ]
    labels = ["x" * int(torch.randint(1, 12, (), generator=generator)) for _ in range(count)]
    return Diagram([Vertex(label, "box", "white") for label in labels], edges)


def boxes(diagram):
    """Return the corners of every vertex, in inches: left, right, low, high."""
    places, width, height = placed(diagram)
    assert all(0 < x < width and 0 < y < height for x, y in places)
    halves = [(INCHES * vertex.width / 2, INCHES * min(vertex.width, 0.6) / 2) for vertex in diagram.vertices]
    return [(x - w, x + w, y - h, y + h) for (x, y), (w, h) in zip(places, halves, strict=True)]


@pytest.mark.parametrize("is_chain", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_vertices_do_not_overlap(seed, is_chain):
    diagram = replace(random_diagram(seed), is_chain=is_chain)
    for one, other in itertools.combinations(boxes(diagram), 2):
        assert one[1] < other[0] or other[1] < one[0] or one[3] < other[2] or other[3] < one[2]


@pytest.mark.parametrize("seed", range(5))
def test_edges_go_down(seed):
    diagram = random_diagram(seed)
    places, _, _ = placed(diagram)
    assert all(places[upper][1] > places[lower][1] for upper, lower in diagram.edges)


def drawn(monkeypatch, draw, *args):
    """Return the diagram that a function would draw."""
    seen = []
    monkeypatch.setattr(drawing, "_draw", lambda argument, diagram, path, engine: seen.append(diagram))
    draw(*args, "picture.png")
    return seen[0]


def test_a_chain_is_a_line_from_left_to_right_with_its_inputs_below(monkeypatch):
    circuit = ct.structures.hmm(6, 2, 3)
    places, _, _ = placed(drawn(monkeypatch, ct.plot.structure, circuit))
    place = dict(zip(circuit.nodes, places, strict=True))
    node, line = circuit.root, []
    while not isinstance(node, ct.Input):
        line.append(node)
        node = node.children[-1]
    assert len(line) == 11
    assert len({round(place[node][1], 9) for node in line}) == 1
    assert all(place[left][0] < place[right][0] for left, right in itertools.pairwise(line))
    for node in line[1::2]:
        leaf = node.children[0]
        assert place[leaf][0] == pytest.approx(place[node][0])
        assert place[leaf][1] < place[node][1]


@pytest.mark.parametrize(
    ("draw", "built", "is_chain"),
    [
        (ct.plot.structure, ct.structures.hmm(3, 2, 3), True),
        (ct.plot.structure, ct.structures.hmm(3, 2, [3, 2]), True),
        (ct.plot.structure, ct.structures.second_order_hmm(4, 2, 3), True),
        (ct.plot.structure, ct.structures.linear_tree(5, 2, 3), True),
        (ct.plot.region_graph, ct.RegionGraph.linear_tree(5), True),
        (ct.plot.structure, ct.structures.mixture(4, 2, 3), False),
        (ct.plot.structure, ct.structures.latent_tree([(0, 1), (0, 2), (1, 3), (2, 4)], 2, 2), False),
        (ct.plot.structure, ct.structures.poon_domingos((1, 4), 1, 2, 2), False),
        (ct.plot.region_graph, ct.RegionGraph.quad_tree((4, 4)), False),
    ],
)
def test_chains_are_told_from_trees(draw, built, is_chain, monkeypatch):
    assert drawn(monkeypatch, draw, built).is_chain == is_chain


def test_no_two_pictures_of_the_documentation_are_the_same():
    pictures = sorted((Path(__file__).parents[2] / "docs").rglob("*.png"))
    contents = [picture.read_bytes() for picture in pictures]
    assert len(pictures) > 20
    assert [
        [a.name, b.name] for (a, x), (b, y) in itertools.combinations(zip(pictures, contents, strict=True), 2) if x == y
    ] == []


def test_graphviz_gets_every_node_and_edge(monkeypatch, tmp_path):
    seen = {}

    def run(command, **options):
        seen["text"] = options["input"]
        return subprocess.CompletedProcess(command, 1, "", "out of paper")

    monkeypatch.setattr(drawing.shutil, "which", lambda program: "/usr/bin/dot")
    monkeypatch.setattr(drawing.subprocess, "run", run)
    with pytest.raises(ct.UnfactorError, match="Graphviz: it failed with code 1: out of paper"):
        ct.plot.structure(CIRCUIT, tmp_path / "circuit.png")
    assert seen["text"].count("label=") == len(CIRCUIT.nodes)
    assert seen["text"].count(" -> ") == sum(len(node.children) for node in CIRCUIT.nodes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda path: ct.plot.structure(CIRCUIT, path / "a.txt"),
            "path: expected a file that ends in .png, .svg, .pdf",
        ),
        (lambda path: ct.plot.structure("circuit", path / "a.png"), "circuit: expected ct.Circuit"),
        (lambda path: ct.plot.region_graph(CIRCUIT, path / "a.png"), "graph: expected a ct.RegionGraph"),
        (lambda path: ct.plot.structure(ct.structures.hmm(200, 2, 2), path / "a.png"), "circuit: .* are too many"),
        (lambda path: ct.plot.structure(CIRCUIT, path / "a.png", engine="pencil"), "engine: expected 'graphviz'"),
    ],
)
def test_what_cannot_be_drawn_is_told_why(draw, message, tmp_path):
    with pytest.raises(ct.ArgumentError, match=message):
        draw(tmp_path)


def test_graphviz_that_is_not_installed_is_an_error_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing.shutil, "which", lambda program: None)
    with pytest.raises(ct.ArgumentError, match="engine: Graphviz's program `dot` is not installed"):
        ct.plot.structure(CIRCUIT, tmp_path / "a.png", engine="graphviz")
    ct.plot.structure(CIRCUIT, tmp_path / "a.png")
