"""The few-step curve where its numbers are known by enumeration, and what it counts."""

import json
import math

import numpy as np
import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.errors import ArgumentError, CorpusError
from diffusion.evaluation.few_step_curve import distinct_share, few_step_curve, few_step_sketch, gram_divergence
from diffusion.evaluation.plots import draw_few_step_curve, few_step_curve_figure
from diffusion.testing import Table, decoder_law, reference, worlds
from diffusion.testing.reference import Rule
from diffusion.text.corpus import windows_and_rest

pytestmark = pytest.mark.usefixtures("one_thread")


def samples(world, count, seed):
    return world.sample(count, generator=torch.Generator().manual_seed(seed))


def undoing(world):
    """Return a circuit that makes the truth of its denoiser's marginals in one call: p(x) over their product."""
    marginals = torch.softmax(world.denoiser().logits(world.blank.unsqueeze(0))[0].double(), -1)
    apart = marginals[torch.arange(world.length), world.support].prod(1)
    return worlds.World(world.support, world.probs / apart / (world.probs / apart).sum(), world.words).circuit()


@pytest.fixture(scope="module")
def known():
    """The curve of a world with its Bayes-optimal denoiser."""
    world = worlds.random(3, length=3, concentration=1.0)
    data, rest = samples(world, 700, 1), samples(world, 1500, 2)
    return world, few_step_curve(world.denoiser(), df.CoupledHead(undoing(world)), data, rest, steps=(1, 2, 3))


def contains(estimate, value):
    spread = (estimate.high - estimate.low) / 2  # two intervals: one in twenty of single ones misses
    return estimate.low - spread - 1e-9 <= value <= estimate.high + spread + 1e-9


def test_losses_are_the_cross_entropies_of_the_enumerated_laws(known):
    world, table = known
    assert contains(table.true_text.loss, world.entropy / 3)
    losses = {}
    for point in table.points[:6]:
        rule = Rule(strategy="entropy", num_steps=point.num_steps)
        step_law = reference.independent(world.denoiser(), rule)
        if point.curve == "with circuit (joint)":
            step_law = reference.coupled(world.denoiser(), undoing(world), rule)
        law = decoder_law(step_law, world.blank)
        losses[point.curve, point.num_steps] = -float((law.probs * world.log_prob(law.support)).sum()) / 3
        assert contains(point.quality.loss, losses[point.curve, point.num_steps]), point
    assert losses["with circuit (joint)", 1] == pytest.approx(world.entropy / 3, rel=1e-4)
    assert losses["without circuit", 3] == pytest.approx(world.entropy / 3, rel=1e-4)
    assert losses["without circuit", 1] > 1.2 * world.entropy / 3  # there is a barrier to see


def test_a_sketch_has_the_same_expected_losses_in_fewer_calls(known):
    world, curve = known
    data, rest = samples(world, 700, 1), samples(world, 200, 2)
    calls = []

    class Counted:
        spec = world.denoiser().spec

        def logits(self, tokens, **options):
            calls.append(len(tokens))
            return world.denoiser().logits(tokens, **options)

    table = few_step_sketch(Counted(), df.CoupledHead(undoing(world)), data, rest, steps=(1, 3), judge_samples=2)
    assert contains(table.true_text.loss, world.entropy / 3)
    assert [(point.curve, point.num_steps) for point in table.points] == [
        (name, count) for name in ("without circuit", "with circuit (joint)") for count in (1, 3)
    ]
    whole = {(point.curve, point.num_steps): point.quality.loss for point in curve.points}
    for point in table.points:
        found, expected = point.quality.loss, whole[point.curve, point.num_steps]
        assert max(found.low, expected.low) <= min(found.high, expected.high)
    assert sum(calls) == 700 * (5 * 2 + 2 * (1 + 3))  # five judgements at two noise levels, and what was written
    assert "judged at 2 noise levels" in few_step_curve_figure(table).axes[0].get_title("left")


def test_varied_are_the_texts_of_the_law(known):
    world, table = known
    for n, share in enumerate(table.true_text.distinct, 1):
        texts = world.support.tolist()
        expected = [len({tuple(x[i : i + n]) for i in range(4 - n)}) / (4 - n) for x in texts]
        assert contains(share, float((world.probs * torch.tensor(expected)).sum()))


def test_trigrams_of_what_one_call_writes_diverge_from_held_out_text(known):
    world, table = known
    law = decoder_law(reference.independent(world.denoiser(), Rule(num_steps=1)), world.blank)
    grid = torch.cartesian_prod(*[torch.arange(3)] * 3)
    p, q = law.prob(grid), world.prob(grid)
    expected = Table(grid, (p + q) / 2).entropy - Table(grid, p).entropy / 2 - Table(grid, q).entropy / 2
    one_call = table.curves["without circuit"][0].quality.divergence
    assert one_call.value == pytest.approx(expected, rel=0.3)
    assert one_call.low > 3 * table.true_text.divergence.high
    assert table.curves["with circuit (joint)"][0].quality.divergence.value < 0.01


def test_calls_are_those_that_a_text_took():
    """ABAB or BABA: after one token all others are certain, so threshold and entropy bound need two calls."""
    world = worlds.alternating(4)
    head, texts = df.CoupledHead(world.circuit()), world.support.repeat(20, 1)
    table = few_step_curve(world.denoiser(), head, texts, texts, steps=(1, 4))
    calls = {name: [point.num_calls for point in points] for name, points in table.curves.items()}
    assert calls == {
        "without circuit": [1, 4],
        "with circuit (joint)": [1, 4],
        "without circuit, threshold 0.9": [2],
        "without circuit, entropy bound 0.1": [2],
    }
    one_call, *others = (point.quality.loss.value for point in table.points)
    assert one_call > 100  # most are no texts of this world
    assert [*others, table.true_text.loss.value] == pytest.approx([math.log(2) / 4] * 6, abs=1e-5)
    assert [share.value for share in table.true_text.distinct] == pytest.approx([1 / 2, 2 / 3, 1])


def test_the_same_seed_gives_the_same_table_whatever_the_batches(known):
    world, _ = known
    head, data = df.CoupledHead(world.circuit()), samples(world, 20, 3)
    one, two = (few_step_curve(world.denoiser(), head, data, data, steps=(1, 2), batch_size=b) for b in (7, 20))
    assert str(one) == str(two)
    assert str(one) != str(few_step_curve(world.denoiser(), head, data, data, steps=(1, 2), seed=1))


def test_repetition_has_few_different_ngrams():
    texts = np.array([[7, 7, 7, 7], [1, 2, 1, 2], [1, 2, 3, 4]])
    assert distinct_share(texts, 1).tolist() == [1 / 4, 1 / 2, 1]
    assert distinct_share(texts, 2).tolist() == [1 / 3, 2 / 3, 1]
    assert distinct_share(texts, 3).tolist() == [1 / 2, 1, 1]


def divergence_of(texts, others, n):
    """Return the Jensen-Shannon divergence, counted one by one."""
    laws = []
    for rows in (texts, others):
        grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        laws.append({gram: grams.count(gram) / len(grams) for gram in grams})
    p, q = laws
    total = 0.0
    for gram in {*p, *q}:
        a, b = p.get(gram, 0.0), q.get(gram, 0.0)
        total += sum(x / 2 * math.log(2 * x / (a + b)) for x in (a, b) if x)
    return total


def test_the_divergence_of_ngrams_and_its_jackknife():
    rng = np.random.default_rng(0)
    texts, others = rng.integers(3, size=(40, 6)), rng.integers(3, size=(9, 8))
    for n in (1, 2, 3):
        found = gram_divergence(texts, others, n)
        assert found.value == pytest.approx(divergence_of(texts.tolist(), others.tolist(), n))
        rows = texts.tolist()
        without = np.array([divergence_of(rows[:i] + rows[i + 1 :], others.tolist(), n) for i in range(40)])
        error = math.sqrt(39 / 40 * ((without - without.mean()) ** 2).sum())
        assert found.high == pytest.approx(found.value + 1.959964 * error)
    assert gram_divergence(texts, texts, 3).value == pytest.approx(0, abs=1e-12)
    assert gram_divergence(texts, texts + 9, 3).value == pytest.approx(math.log(2))


def test_the_table_is_saved_printed_and_drawn(known, tmp_path):
    _, table = known
    table.save(tmp_path / "few_steps.json")
    content = json.loads((tmp_path / "few_steps.json").read_text())
    assert len(content["points"]) == 8
    assert content["points"][0]["quality"]["loss"]["value"] == table.points[0].quality.loss.value
    assert str(table).count("\n") == 1 + 8 + 1
    assert "| true text |  |" in str(table)
    draw_few_step_curve(table, tmp_path / "few_steps.png")
    assert (tmp_path / "few_steps.png").stat().st_size > 10_000
    figure = few_step_curve_figure(table)
    for axes, name in zip(figure.axes, ("loss", "divergence"), strict=True):
        low, high = axes.get_ylim()
        for quality in (*(point.quality for point in table.points), table.true_text):
            estimate = getattr(quality, name)
            assert low <= estimate.low <= estimate.high <= high
        drawn = [line.get_ydata().tolist() for line in axes.lines if line.get_label() in table.curves]
        assert drawn == [[getattr(point.quality, name).value for point in points] for points in table.curves.values()]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
        assert axes.get_xscale() == "log"


def test_windows_and_the_rest_are_all_windows():
    chosen, rest = windows_and_rest(torch.arange(103), length=10, max_windows=3)
    assert chosen[:, 0].tolist() == [0, 30, 60]
    assert sorted([*chosen[:, 0].tolist(), *rest[:, 0].tolist()]) == list(range(0, 100, 10))
    assert len(windows_and_rest(torch.arange(103), length=10, max_windows=99)[0]) == 5
    with pytest.raises(CorpusError, match="expected at least 40 held-out tokens to compare text with, got 39"):
        windows_and_rest(torch.arange(39), length=10, max_windows=3)


@pytest.mark.parametrize(
    ("data", "others", "steps", "message"),
    [
        (
            torch.zeros(1, 2, dtype=torch.int64),
            None,
            (1,),
            r"data: expected int64 \(N >= 2, at least 2\), got \(1, 2\)",
        ),
        (None, torch.zeros(3, 1, dtype=torch.int64), (1,), r"reference: expected int64 \(M >= 1, at least 2\)"),
        (None, torch.zeros(0, 5, dtype=torch.int64), (1,), "reference: "),
        (None, torch.zeros(5, dtype=torch.int64), (1,), "reference: "),
        (None, None, (), "steps: expected integers from 1 to the block length, 2"),
        (None, None, (1, 3), "steps: "),
    ],
)
def test_what_does_not_fit_is_refused(data, others, steps, message):
    world = worlds.cities()
    with pytest.raises(ArgumentError, match=message):
        few_step_curve(
            world.denoiser(),
            df.CoupledHead(ct.compile(ct.structures.hmm(2, 2, 5), seed=0)),
            world.support if data is None else data,
            world.support if others is None else others,
            steps=steps,
        )
