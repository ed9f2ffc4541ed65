"""Pictures are drawn, their vertices do not overlap, and what cannot be drawn is told why."""

import itertools
import shutil
import subprocess

import pytest
import torch

import circuits as ct
from circuits import plot
from circuits.plot.layout import Diagram, Vertex, placed

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
    GRAPHS[name].draw(tmp_path / "graph.png")
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


@pytest.mark.parametrize("seed", range(5))
def test_vertices_do_not_overlap_and_edges_go_down(seed):
    diagram = random_diagram(seed)
    places, width, height = placed(diagram)
    for upper, lower in diagram.edges:
        assert places[upper][1] > places[lower][1]
    for (x0, y0), (x1, y1) in itertools.combinations(places, 2):
        assert y0 != y1 or x0 != x1
    for i, j in itertools.combinations(range(len(places)), 2):
        if places[i][1] == places[j][1]:
            room = (diagram.vertices[i].width + diagram.vertices[j].width) / 2
            assert abs(places[i][0] - places[j][0]) > room
    for vertex, (x, y) in zip(diagram.vertices, places, strict=True):
        assert vertex.width / 2 <= x + 1e-9
        assert x + vertex.width / 2 <= width + 1e-9
        assert 0 <= y < height


def test_graphviz_gets_every_node_and_edge(monkeypatch, tmp_path):
    seen = {}

    def run(command, **options):
        seen["text"] = options["input"]
        return subprocess.CompletedProcess(command, 1, "", "out of paper")

    monkeypatch.setattr(plot.shutil, "which", lambda program: "/usr/bin/dot")
    monkeypatch.setattr(plot.subprocess, "run", run)
    with pytest.raises(ct.UnfactorError, match="Graphviz failed with code 1: out of paper"):
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
    monkeypatch.setattr(plot.shutil, "which", lambda program: None)
    with pytest.raises(ct.ArgumentError, match="engine: Graphviz's program `dot` is not installed"):
        ct.plot.structure(CIRCUIT, tmp_path / "a.png", engine="graphviz")
    ct.plot.structure(CIRCUIT, tmp_path / "a.png")
