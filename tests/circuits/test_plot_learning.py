"""Pictures of learning show the numbers that they are given."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
from circuits import learning
from circuits.learning import FitResult
from circuits.plot import charts
from circuits.plot.edge_flows import edge_flows

CIRCUIT = ct.structures.mixture(3, 2, num_components=4)
RESULT = FitResult(
    train_log_likelihood=(-9.0, -3.0, -2.5),
    validation_log_likelihood=(-4.0, -3.5, -float("inf")),
    best_epoch=1,
    stopped="num_epochs",
    num_impossible=0,
)


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


@given(st.data())
def test_flows_of_edges_are_those_of_em(data):
    circuit = data.draw(ct.testing.circuits(max_classes=data.draw(st.sampled_from([None, 3]))))
    pc = ct.compile(circuit, dtype=torch.float64, seed=data.draw(st.integers(0, 99)))
    evidence = data.draw(ct.testing.evidence(circuit, batch_size=3))
    if circuit.num_classes is not None:
        evidence = evidence.with_class(torch.arange(3) % circuit.num_classes)
    expected, log_likelihood = learning.expected_flows(pc, evidence)
    num_possible = int((log_likelihood > -torch.inf).sum())
    flows = edge_flows(pc, evidence)
    found = dict.fromkeys(pc.bank, 0.0)
    for node, shares in zip(circuit.nodes, flows, strict=True):
        assert len(shares) == len(node.children)
        if isinstance(node, ct.Sum):
            found[f"sum_{node.parameter_shape[0]}x{node.parameter_shape[1]}"] += sum(shares)
    for name in pc.sum_banks:  # tied nodes add up
        assert found[name] == pytest.approx(float(expected[name].sum()) / max(1, num_possible), abs=1e-9)
    is_known = not bool(evidence.levelled(pc.num_categories)[0].says_nothing(pc.num_categories).any())
    if num_possible and circuit.root.children and is_known:
        assert sum(flows[-1]) == pytest.approx(1.0 if isinstance(circuit.root, ct.Sum) else len(flows[-1]))


def test_the_flow_of_a_mixture_is_its_responsibility():
    leaves = [ct.inputs(0, 1, ct.Categorical(2), weights=torch.tensor([[p], [1 - p]])) for p in (0.9, 0.2)]
    pc = ct.compile(ct.Circuit(ct.sum(*leaves, num_units=1, weights=torch.tensor([[0.5, 0.5]]))), dtype=torch.float64)
    first = (0.9 / 1.1 + 0.1 / 0.9) / 2
    flows = edge_flows(pc, ct.Evidence.observe(torch.tensor([[0], [1]])))
    assert flows[-1] == pytest.approx((first, 1 - first))


def test_flows_of_classes_are_drawn_with_labels(tmp_path):
    pc = ct.compile(ct.structures.rat_spn(3, 1, 1, 2, 2, num_classes=2, seed=0), seed=0)
    data = torch.zeros(4, 3, dtype=torch.int64)
    ct.plot.flows(pc, data, tmp_path / "flows.png", labels=torch.tensor([0, 1, 1, 0]), engine="matplotlib")
    assert (tmp_path / "flows.png").exists()
    with pytest.raises(ct.ArgumentError, match=r"labels: .*give the class of every sample"):
        ct.plot.flows(pc, data, tmp_path / "flows.png")


@pytest.mark.parametrize("engine", [None, "matplotlib"])
def test_lines_are_as_wide_as_their_flow(engine, tmp_path):
    pc = ct.compile(CIRCUIT, seed=0)
    ct.plot.flows(pc, torch.zeros(5, 3, dtype=torch.int64), tmp_path / "flows.png", engine=engine)
    ct.plot.structure(CIRCUIT, tmp_path / "structure.png", engine=engine)
    red, none = (pixels(tmp_path / f"{name}.png") for name in ("flows", "structure"))
    is_red = [(np.abs(p - np.array([0xC0, 0x50, 0x4D]) / 255).max(2) < 0.1).sum() for p in (red, none)]
    assert is_red[0] > 50
    assert is_red[1] == 0


def test_learning_curves_are_drawn(tmp_path):
    ct.plot.learning_curves(RESULT, tmp_path / "one.png")
    ct.plot.learning_curves({"em": RESULT, "adam": RESULT}, tmp_path / "two.svg")
    assert pixels(tmp_path / "one.png").shape == (400, 640, 3)
    assert pixels(tmp_path / "one.png").min() < 0.5
    first = (tmp_path / "two.svg").read_bytes()
    assert b"<svg" in first


def drawn_figure(results, monkeypatch):
    """The figure of learning curves, laid out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures = []
    monkeypatch.setattr(charts, "save", lambda figure, path: figures.append(figure))
    ct.plot.learning_curves(results, "curves.png")
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("count", [1, 2, 14, 40])
def test_the_legend_of_many_results_leaves_room_for_them(count, monkeypatch):
    figure = drawn_figure({f"run {number}": RESULT for number in range(count)}, monkeypatch)
    (axes,) = figure.axes
    legend = axes.get_legend() or figure.legends[0]
    bounds, box = figure.bbox, legend.get_window_extent()
    assert bounds.x0 <= box.x0 <= box.x1 <= bounds.x1
    assert bounds.y0 <= box.y0 <= box.y1 <= bounds.y1
    assert axes.get_window_extent().height > 0.7 * bounds.height
    assert axes.get_window_extent().width > 400


def test_epochs_are_whole_numbers(monkeypatch):
    one = ct.learning.fit(ct.compile(CIRCUIT, seed=0), torch.zeros(5, 3).long(), num_epochs=1, progress=False)
    ticks = drawn_figure(one, monkeypatch).axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks)


def test_infinite_pixels_do_not_hide_the_others(tmp_path):
    images = torch.tensor([[[0.0, 1.0, 2.0, torch.inf, -torch.inf]]], dtype=torch.bfloat16)
    ct.plot.samples(images, tmp_path / "grid.png", zoom=1)
    assert pixels(tmp_path / "grid.png")[2, 2:7, 0] == pytest.approx([0, 0.5, 1, 1, 0], abs=0.01)


def test_a_grid_shows_every_image(tmp_path):
    images = torch.tensor([[[0.0, 1.0]], [[2.0, torch.nan]], [[4.0, 4.0]]])
    ct.plot.samples(images, tmp_path / "grid.png", num_columns=2, zoom=3)
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (2 * (3 + 2) + 2, 2 * (6 + 2) + 2, 3)
    assert grid[3, 3] == pytest.approx(np.zeros(3))
    assert grid[3, 6] == pytest.approx(np.full(3, 0.25), abs=0.01)
    assert grid[3, 11] == pytest.approx(np.full(3, 0.5), abs=0.01)
    assert grid[3, 14] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert grid[8, 3] == pytest.approx(np.ones(3))
    ct.plot.samples(images.numpy()[..., None].repeat(3, 3), tmp_path / "color.png", num_columns=2, zoom=3)
    assert np.array_equal(pixels(tmp_path / "color.png"), grid)
    ct.plot.samples(np.zeros((1, 2, 2), dtype=bool), tmp_path / "constant.pdf", value_range=(0, 1))


def test_grids_are_about_square():
    assert charts._grid(torch.zeros(5, 4, 4, 3), 3, 1).shape == (2 * 6 + 2, 3 * 6 + 2, 3)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: ct.plot.learning_curves([], path / "a.png"), "results: expected a ct.learning.FitResult"),
        (lambda path: ct.plot.learning_curves({}, path / "a.png"), "results: expected"),
        (lambda path: ct.plot.learning_curves(RESULT, path / "a.txt"), "path: expected a file that ends in"),
        (lambda path: ct.plot.samples(torch.zeros(3, 4), path / "a.png"), r"images: expected numbers \(N, H, W\)"),
        (lambda path: ct.plot.samples(torch.zeros(0, 4, 4), path / "a.png"), "images: expected"),
        (lambda path: ct.plot.samples(torch.zeros(1, 4, 4), path / "a.png", zoom=0), "zoom: expected"),
        (lambda path: ct.plot.samples(torch.zeros(1, 4, 4), path / "a.png", value_range=(1, 0)), "value_range"),
        (lambda path: ct.plot.samples(torch.zeros(1, 4, 4), path / "a.png", value_range=3), "value_range"),
        (lambda path: ct.plot.samples(torch.zeros(1, 4, 4), path / "a.png", value_range=(0, math.inf)), "value_range"),
        (lambda path: ct.plot.samples(torch.zeros(1, 4, 4), path / "a"), "path: expected"),
        (
            lambda path: ct.plot.flows(CIRCUIT, torch.zeros(1, 3).long(), path / "a.png"),
            "pc: expected a compiled circuit",
        ),
        (lambda path: ct.plot.flows(ct.compile(CIRCUIT), torch.zeros(1, 2).long(), path / "a.png"), "data: expected"),
        (lambda path: ct.plot.flows(ct.compile(CIRCUIT), torch.zeros(1, 3).long(), path / "a.gif"), "path: expected"),
    ],
)
def test_what_cannot_be_drawn_is_told_why(draw, message, tmp_path):
    with pytest.raises(ct.ArgumentError, match=message):
        draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_circuits_are_refused(tmp_path):
    pc = ct.compile(ct.structures.hmm(200, 2, 2), seed=0)
    with pytest.raises(ct.ArgumentError, match=r"pc: .* are too many"):
        ct.plot.flows(pc, torch.zeros(1, 200).long(), tmp_path / "a.png")
