"""Worlds: their tables, their true circuits and their Bayes-optimal denoisers are what plain enumeration says."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import circuits as ct
from diffusion.testing import Table, chi_square, random_worlds, total_variation, worlds
from diffusion.testing.worlds import World

ALL = {
    "cities": worlds.cities(),
    "unequal cities": worlds.cities(3, probs=[0.5, 0.3, 0.2]),
    "alternating": worlds.alternating(5),
    "hidden Markov": worlds.hidden_markov(4, num_states=3, num_words=3, seed=1),
    "parity": worlds.parity(5),
    "sums": worlds.sums(4),
    "endings": worlds.endings(4),
    "short or long": worlds.endings(3, num_words=3, lengths=[0.3, 0, 0, 0.7]),
    "random": worlds.random(0),
    "one word": World(torch.zeros(1, 1, dtype=torch.int64)),
    "one bit of parity": worlds.parity(1),
    "one step": worlds.hidden_markov(1),
}
EVERY_WORLD = pytest.mark.parametrize("world", ALL.values(), ids=ALL)


def exact(probability):
    return pytest.approx(probability, abs=1e-12)


@EVERY_WORLD
def test_the_true_circuit_has_the_distribution_of_the_world(world):
    pc = world.circuit(dtype=torch.float64)
    law = Table.from_joint(ct.testing.enumerate_joint(pc))
    assert law.total_variation(world) == exact(0)
    torch.testing.assert_close(pc(world.support), world.log_prob(world.support), rtol=1e-9, atol=1e-9)
    assert set(pc.circuit.num_categories) == {world.spec.vocab_size}


@EVERY_WORLD
def test_a_circuit_of_single_precision_is_close(world):
    joint = ct.testing.enumerate_joint(world.circuit())
    assert Table.from_joint(joint).total_variation(world) < 1e-6


def texts_of(world):
    return dict(zip(world.texts, world.probs.tolist(), strict=True))


def test_two_cities():
    assert texts_of(worlds.cities()) == {"San Francisco": 0.5, "New York": 0.5}


def test_alternating_letters():
    assert texts_of(worlds.alternating(4)) == {"A B A B": 0.5, "B A B A": 0.5}


def test_parity_is_even():
    expected = [" ".join(bits) for bits in itertools.product("01", repeat=4) if bits.count("1") % 2 == 0]
    assert texts_of(worlds.parity(4)) == dict.fromkeys(expected, 1 / 8)


def test_sums_are_right():
    found = texts_of(worlds.sums(3))
    expected = {f"{a} + {b} = {a + b}" for a in range(4) for b in range(4) if a + b <= 3}
    assert set(found) == expected
    assert list(found.values()) == [exact(1 / len(expected))] * len(expected)


def test_endings_have_the_lengths_asked_for():
    lengths = [0.3, 0.2, 0.0, 0.5]
    world = worlds.endings(3, num_words=2, lengths=lengths)
    ends = world.support == world.eos_id
    for count, share in enumerate(lengths):
        of_length = (~ends).sum(1) == count
        assert float(world.probs[of_length].sum()) == exact(share)
        assert int(of_length.sum()) == (2**count if share else 0)
        assert bool(ends[of_length, count:].all())


def weights_of(pc, name):
    return pc.log_weights(pc.circuit.node(name)).detach().exp().tolist()


def test_hidden_markov_texts_have_the_sum_over_all_paths():
    world = worlds.hidden_markov(3, num_states=2, num_words=2, seed=4)
    pc = world.circuit(dtype=torch.float64)
    (initial,) = weights_of(pc, "initial")
    transition = [weights_of(pc, f"transition{t}") for t in range(2)]
    emission = [weights_of(pc, f"emission{t}") for t in range(3)]
    for text, prob in zip(world.support.tolist(), world.probs.tolist(), strict=True):
        total = 0.0
        for z in itertools.product(range(2), repeat=3):
            path = initial[z[0]] * transition[0][z[0]][z[1]] * transition[1][z[1]][z[2]]
            total += path * math.prod(emission[t][text[t]][z[t]] for t in range(3))
        assert prob == exact(total)


def test_a_random_world_is_that_of_its_seed():
    first, again, other = (worlds.random(seed, length=3) for seed in (1, 1, 2))
    assert first.total_variation(again) == 0
    assert first.total_variation(other) > 0.1
    assert len(first.probs) == 27


def bayes(world, visible, position):
    """Enumerate p(x_position | visible), a list over the vocabulary; visible: {position: token}."""
    weights = [0.0] * world.spec.vocab_size
    for text, prob in zip(world.support.tolist(), world.probs.tolist(), strict=True):
        if all(text[i] == token for i, token in visible.items()):
            weights[text[position]] += prob
    return [weight / sum(weights) for weight in weights]


@st.composite
def questions(draw):
    world = draw(random_worlds())
    rows = draw(st.lists(st.integers(0, len(world.support) - 1), min_size=1, max_size=3))
    texts = world.support[rows]
    hidden = torch.tensor([[draw(st.booleans()) for _ in range(world.length)] for _ in rows])
    return world, texts.masked_fill(hidden, world.mask_id)


@given(question=questions())
def test_the_bayes_denoiser_gives_the_posterior_marginals(question):
    world, tokens = question
    logits = world.denoiser().logits(tokens)
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())
    found = torch.softmax(logits.double(), -1)
    for row, text in enumerate(tokens.tolist()):
        visible = {i: token for i, token in enumerate(text) if token != world.mask_id}
        for position in range(world.length):
            assert found[row, position].tolist() == pytest.approx(bayes(world, visible, position), abs=1e-6)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_padded_window_of_a_shorter_text_is_a_slice_of_the_posterior(padding, generator):
    world = worlds.random(2, length=4)
    denoiser = world.denoiser()
    tokens = torch.randint(world.spec.vocab_size, (8, 4), generator=generator)
    for length in range(padding + 1, 5):
        visible = tokens[:, : length - padding]
        canvas = torch.nn.functional.pad(visible, (padding, 0), value=world.spec.pad_id)
        valid = torch.arange(length).expand(canvas.shape) >= padding
        whole = denoiser.logits(torch.nn.functional.pad(visible, (0, 4 - visible.shape[1]), value=world.mask_id))
        for start, stop in itertools.combinations(range(padding, length + 1), 2):
            found = denoiser.logits(canvas, valid=valid, t=torch.rand(8), window=(start, stop))
            assert torch.equal(found, whole[:, start - padding : stop - padding])


def test_tokens_that_are_not_valid_are_unseen():
    world = worlds.random(2, length=4)
    tokens, valid = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[True, False, True, False]])
    expected = world.denoiser().logits(tokens.masked_fill(~valid, world.mask_id))
    assert torch.equal(world.denoiser().logits(tokens, valid=valid), expected)
    nothing = torch.zeros_like(valid)
    assert torch.equal(world.denoiser().logits(tokens, valid=nothing)[0], world.denoiser().logits(world.blank[None])[0])


def test_where_no_text_fits_those_with_the_fewest_misprints_count():
    world = worlds.World(torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]), torch.tensor([0.2, 0.3, 0.5]))
    posterior = world.posterior(torch.tensor([0, 0, 1, 1]))  # one misprint in either of the first two
    torch.testing.assert_close(posterior, torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64))


def test_an_answer_has_the_same_bits_in_every_batch(generator):
    world = worlds.random(3, length=4)
    tokens = torch.randint(world.spec.vocab_size, (50, 4), generator=generator)
    together = world.denoiser().logits(tokens)
    for row in range(50):
        assert torch.equal(world.denoiser().logits(tokens[row : row + 1])[0], together[row])


@given(world=random_worlds())
def test_denoiser_and_circuit_agree_about_every_marginal(world):
    pc = world.circuit(dtype=torch.float64)
    observed = torch.zeros(1, world.length, dtype=torch.bool)
    marginals = ct.queries.marginals(pc, ct.Evidence.observe(world.support[:1], observed))
    found = torch.softmax(world.denoiser().logits(world.blank.unsqueeze(0)).double(), -1)
    torch.testing.assert_close(found, marginals, atol=1e-6, rtol=0)


def test_the_uniform_denoiser_knows_nothing():
    world = worlds.sums(2)
    denoiser = world.uniform_denoiser()
    assert torch.equal(denoiser.logits(world.support, window=(1, 3)), torch.zeros(6, 2, world.spec.vocab_size))
    assert denoiser.spec == world.spec


def test_words_and_ids():
    world = worlds.sums(2)
    assert world.encode("1 + _ = 2").tolist() == [1, 3, world.mask_id, 4, 2]
    assert world.decode(world.encode("1 + _ = 2").unsqueeze(0)) == ["1 + _ = 2"]
    assert world.blank.tolist() == [5] * 5
    with pytest.raises(ct.ArgumentError, match=r"text: expected words among 0, 1, 2, .* got '7'"):
        world.encode("1 + 7")


def test_a_table_is_sorted_merged_and_normalised():
    table = Table(torch.tensor([[1, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([0.25, 0.5, 0.25, 0.0]))
    assert table.support.tolist() == [[0, 1], [1, 0]]
    assert table.probs.tolist() == [0.5, 0.5]
    assert table.prob(torch.tensor([[[1, 0]], [[1, 1]]])).tolist() == [[0.5], [0.0]]
    assert table.log_prob(torch.tensor([1, 1])).item() == -math.inf
    assert table.entropy == exact(math.log(2))


def test_samples_make_a_table():
    table = Table(torch.tensor([[0], [1], [1], [1]]))
    assert table.probs.tolist() == [0.25, 0.75]


@given(weights=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=6))
def test_distances_are_their_formulas(weights):
    p, q = torch.tensor(weights, dtype=torch.float64).t()
    p, q = p / p.sum(), torch.where(q.sum() > 0, q / q.sum(), p / p.sum())
    texts = torch.arange(len(p)).unsqueeze(1)
    first, second = Table(texts, p), Table(texts, q)
    assert first.total_variation(second) == exact(float((p - q).abs().sum()) / 2)
    assert second.total_variation(first) == exact(float((p - q).abs().sum()) / 2)
    assert second.kl(first) == exact(sum(b * math.log(b / a) for a, b in zip(p.tolist(), q.tolist(), strict=True) if b))
    assert (first.kl(second) == math.inf) == bool((q == 0).any())


def test_tables_without_a_common_text_are_as_far_apart_as_can_be():
    first, second = Table(torch.tensor([[0]])), Table(torch.tensor([[1]]))
    assert first.total_variation(second) == 1
    assert first.kl(second) == math.inf
    assert total_variation(torch.tensor([[0], [0]]), torch.tensor([[0], [1]])) == 0.5


def test_chi_square_is_that_of_scipy(generator):
    table = Table(torch.arange(4).unsqueeze(1), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    samples = table.sample(1000, generator=generator)
    counts = torch.bincount(samples[:, 0], minlength=4).numpy()
    expected = stats.chisquare(counts, (1000 * table.probs).numpy()).pvalue
    assert chi_square(samples, table) == pytest.approx(expected, rel=1e-9)


def test_chi_square_pools_what_is_rare(generator):
    """4 + 4 expected texts are one cell: its test has one degree of freedom."""
    table = Table(torch.arange(3).unsqueeze(1), torch.tensor([0.992, 0.004, 0.004], dtype=torch.float64))
    samples = torch.tensor([0] * 985 + [1] * 15).unsqueeze(1)
    assert chi_square(samples, table) == pytest.approx(stats.chisquare([985, 15], [992, 8]).pvalue, rel=1e-9)


def test_chi_square_tells_right_from_wrong(generator):
    world = worlds.random(0)
    samples = world.sample(5000, generator=generator)
    assert chi_square(samples, world) > 1e-3
    sharper = world.probs**1.2
    assert chi_square(samples, Table(world.support, sharper / sharper.sum())) < 1e-6
    assert chi_square(torch.full((9, 4), 3), world) == 0  # a text that does not exist
    assert chi_square(world.support[:1], world) == 1  # one sample says nothing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Table(torch.zeros(2, 3)), "support: expected int64 texts"),
        (lambda: Table(torch.zeros(0, 3, dtype=torch.int64)), "support: expected int64 texts"),
        (lambda: Table(torch.tensor([[0], [1]]), torch.tensor([0.5, 0.6])), "probs: expected 2 numbers >= 0 that sum"),
        (lambda: Table(torch.tensor([[0], [1]]), torch.tensor([1.5, -0.5])), "probs: expected 2 numbers"),
        (lambda: Table(torch.tensor([[0], [1]]), torch.tensor([torch.nan, 1.0])), "probs: expected 2 numbers"),
        (lambda: Table(torch.tensor([[0], [1]])).prob(torch.tensor([[0, 1]])), r"texts: expected shape \(\.\.\., 1\)"),
        (lambda: World(torch.tensor([[2]]), words=("a", "b")), "support: expected ids from 0 to 1"),
        (lambda: World(torch.tensor([[-1]])), "support: expected ids from 0"),
        (lambda: World(torch.tensor([[0]]), eos_id=1), "eos_id: expected the id of a word"),
        (lambda: worlds.cities(9), "num_cities: expected an integer from 2 to 8, got 9"),
        (lambda: worlds.parity(0), "length: expected an integer >= 1"),
        (lambda: worlds.random(0, length=13), r"length: expected at most 2\*\*20 texts"),
        (lambda: worlds.endings(2, lengths=[0.5, 0.5]), "lengths: expected 3 probabilities"),
        (
            lambda: worlds.sums(3).denoiser().logits(torch.zeros(1, 6).long()),
            "tokens: expected at most max_length = 5 positions",
        ),
        (lambda: worlds.sums(3).denoiser().logits(torch.zeros(1, 5)), "tokens: expected int64"),
        (lambda: worlds.sums(3).denoiser().logits(torch.full((1, 5), 7)), "tokens: expected ids from 0 to 6"),
        (lambda: worlds.sums(3).denoiser().logits(torch.zeros(1, 5).long(), window=(3, 6)), "window: expected 0 <="),
        (lambda: worlds.sums(3).denoiser().logits(torch.zeros(1, 5).long(), valid=torch.ones(1, 5)), "valid: expected"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ct.ArgumentError, match=message):
        call()


def test_importing_the_package_loads_no_test_framework():
    code = "import sys, diffusion; diffusion.testing.worlds; print({'hypothesis', 'pytest'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
