"""Every mode, strategy and plan samples the law that enumeration gives, at temperature 1 and below."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.decoding.config import MODES, STRATEGIES
from diffusion.testing import Table, chi_square, decoder_law, reference, worlds
from diffusion.testing.components import Components
from diffusion.testing.reference import Rule

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_SAMPLES = 1500
THRESHOLD, BOUND = 0.45, 0.6
RULES = {name: Rule.of(name, threshold=THRESHOLD, entropy_bound=BOUND) for name in STRATEGIES}
ANYWHERE, IN_BLOCKS = worlds.random(3, length=3, concentration=1.0), worlds.random(5, length=4, num_words=2)


def hmm(length, world):
    """Two states that stay, each with a word that it prefers: neighbours are strongly coupled."""
    num_words = len(world.words)
    emission = torch.full((2, num_words + 1), 0.2 / num_words)
    emission[:, -1] = 0.0
    emission[[0, 1], [0, 1]] += 0.8
    transition = torch.tensor([[0.85, 0.15], [0.25, 0.75]])
    tables = {"initial": torch.tensor([0.4, 0.6]), "transition": transition, "emission": emission}
    return ct.compile(ct.structures.hmm(length, 2, num_words + 1, **tables), dtype=torch.float64)


def samples(world, pc, plan, config, num=NUM_SAMPLES, denoiser=None):
    blank = world.blank.expand(num, -1)
    head = None if pc is None else df.CoupledHead(pc)
    seeds = list(range(num))
    return df.infill(denoiser or world.denoiser(), blank, head=head, plan=plan, config=config, seeds=seeds).tokens


def config_of(decode, strategy, temperature=1.0):
    return df.DecodingConfig(
        decode=decode, strategy=strategy, temperature=temperature, threshold=THRESHOLD, entropy_bound=BOUND
    )


def step_law_of(world, pc, decode, rule, window=None):
    if decode == "independent":
        return reference.independent(world.denoiser(), rule)
    return reference.coupled(world.denoiser(), pc, rule, decode=decode, window=window)


@pytest.mark.parametrize("decode", MODES)
def test_whole_canvases_follow_the_law_of_their_reference(decode):
    pc = hmm(3, ANYWHERE)
    for strategy, rule in RULES.items():
        law = decoder_law(step_law_of(ANYWHERE, pc, decode, replace(rule, num_steps=2)), ANYWHERE.blank)
        found = samples(ANYWHERE, pc, df.Anywhere(2), config_of(decode, strategy))
        assert chi_square(found, law) > 1e-4, strategy


@pytest.mark.parametrize("decode", MODES)
def test_blocks_follow_the_law_of_their_reference(decode):
    """Four positions in two blocks, three steps in all: one for the first block, two for the second."""
    pc = hmm(2, IN_BLOCKS)
    for strategy, rule in RULES.items():
        first = step_law_of(IN_BLOCKS, pc, decode, replace(rule, num_steps=1), window=(0, 2))
        second = step_law_of(IN_BLOCKS, pc, decode, replace(rule, num_steps=2), window=(2, 4))
        law = decoder_law(first, IN_BLOCKS.blank, [True, True, False, False])
        law = decoder_law(second, law, [False, False, True, True])
        found = samples(IN_BLOCKS, pc, df.Blocks(2, 3), config_of(decode, strategy))
        assert chi_square(found, law) > 1e-4, strategy


def chosen_by_prediction(q, masked, strategy, count):
    """Yield probability and positions that a strategy wants to decode, by the denoiser's own prediction, (L, V)."""
    places = [i for i, is_open in enumerate(masked) if is_open]
    if strategy == "random":
        subsets = list(itertools.combinations(places, count))
        yield from ((1 / len(subsets), set(subset)) for subset in subsets)
        return
    ordered = np.sort(q, 1)[:, ::-1]
    entropy = -(q * np.log(np.where(q > 0, q, 1.0))).sum(1)
    scores = {"margin": ordered[:, 0] - ordered[:, 1], "entropy": -entropy, "entropy_bound": -entropy}
    score = scores.get(strategy, -entropy if strategy == "joint_entropy" else ordered[:, 0])
    ranked = sorted(places, key=lambda i: -round(score[i], 9))
    wanted = set(ranked[:count])
    if strategy == "threshold":
        wanted |= {i for i in places if score[i] > THRESHOLD}
    for number in range(1, len(ranked) + 1):
        total = sum(entropy[i] for i in ranked[:number])
        if (strategy == "entropy_bound" and total - entropy[ranked[number - 1]] <= BOUND) or (
            strategy == "joint_entropy" and total <= BOUND
        ):
            wanted |= set(ranked[:number])
    yield 1.0, wanted


def windows_over(wanted, length, num_positions):
    """From left to right, each at the first position that is not covered, or earlier where the text ends."""
    stop = 0
    for i in sorted(wanted):
        if i >= stop:
            start = max(stop, min(i, num_positions - length))
            stop = min(start + length, num_positions)
            yield slice(start, stop)


def windowed(world, pc, decode, strategy, num_steps):
    """The positions are chosen first; the tokens of a window are drawn together, windows independently."""
    mixture, length = Components.of(pc), pc.circuit.num_vars

    def step_law(tokens, masked, step):
        q = reference.predicted(world.denoiser(), np.array(tokens))
        count = -(-sum(masked) // max(1, num_steps - step))
        for share, wanted in chosen_by_prediction(q, masked, strategy, count):
            outcomes = [(share, tokens)]
            for window in windows_over(wanted, length, len(tokens)):
                here = range(*window.indices(len(tokens)))
                part = np.array(tokens)[window], np.array(masked)[window]
                shorter = Components(mixture.weights, mixture.leaves[:, : len(here)])
                given = shorter.coupled(q[window], *part, "global")
                table = q[window] if decode == "independent" else given.marginals
                texts = np.array(list(itertools.product(range(q.shape[1]), repeat=len(here))))
                probs = np.prod(np.where(part[1], table[np.arange(len(here)), texts], texts == part[0]), 1)
                probs = probs if decode in ("independent", "marginal") else given.prob(texts)
                outcomes = [
                    (prob * of_window, tuple(text[i - here.start] if i in here and i in wanted else token
                                             for i, token in enumerate(before)))
                    for prob, before in outcomes
                    for of_window, text in zip(probs.tolist(), texts.tolist(), strict=True)
                    if of_window > 0
                ]  # fmt: skip
            still_open = tuple(is_open and i not in wanted for i, is_open in enumerate(masked))
            yield from ((prob, after, still_open) for prob, after in outcomes)

    return step_law


@pytest.mark.parametrize("decode", MODES)
def test_dynamic_windows_follow_the_law_of_their_reference(decode):
    """Windows of two over four positions: what is drawn never decides where they are, so each strategy keeps the law.

    But in ``any_order`` it may decide what is committed first within a window, and bounds let positions go together.
    """
    pc = hmm(2, IN_BLOCKS)
    one_by_one = ("margin", "entropy", "random", "top_prob")
    for strategy in one_by_one if decode == "any_order" else STRATEGIES:
        law = decoder_law(windowed(IN_BLOCKS, pc, decode, strategy, 2), IN_BLOCKS.blank)
        found = samples(IN_BLOCKS, pc, df.DynamicWindows(2, 2), config_of(decode, strategy))
        assert chi_square(found, law) > 1e-4, strategy


def test_laws_of_windows_are_told_apart():
    """With marginal draws, without the circuit, with another order or other windows the law is another one."""
    pc = hmm(2, IN_BLOCKS)
    for num_steps, others in ((1, (("independent", "entropy"), ("marginal", "entropy"))), (2, (("joint", "random"),))):
        found = samples(IN_BLOCKS, pc, df.DynamicWindows(num_steps, 2), config_of("joint", "entropy"))
        for decode, strategy in others:
            law = decoder_law(windowed(IN_BLOCKS, pc, decode, strategy, num_steps), IN_BLOCKS.blank)
            assert chi_square(found, law) < 1e-4, decode


PLANS = {
    "anywhere": lambda steps: df.Anywhere(steps),
    "blocks": lambda steps: df.Blocks(2, max(steps, 2)),
    "windows": lambda steps: df.DynamicWindows(steps),
}
LAW_KEEPING = [name for name in STRATEGIES if df.DecodingConfig(strategy=name).keeps_law]


def test_what_promises_the_law():
    kept = {(decode, name) for decode in MODES for name in STRATEGIES if config_of(decode, name).keeps_law}
    either = {"margin", "entropy", "random", "top_prob", "entropy_bound", "joint_entropy"}
    assert kept == {(decode, name) for decode in MODES for name in either if decode != "latent" or name == "random"}


@pytest.mark.parametrize("strategy", LAW_KEEPING)
@pytest.mark.parametrize("plan", ["anywhere", "windows"])
def test_the_true_circuit_and_joint_draws_keep_the_law_at_any_number_of_steps(plan, strategy):
    """Nothing is known besides the circuit; so whatever is committed has the conditional law given what is there."""
    world = worlds.hidden_markov(4, seed=2, num_words=2)
    pc, config = world.circuit(dtype=torch.float64), config_of("joint", strategy)
    for num_steps in (1, 2, 4):
        found = samples(world, pc, PLANS[plan](num_steps), config, denoiser=world.uniform_denoiser())
        assert chi_square(found, world) > 1e-4, num_steps


@pytest.mark.parametrize("plan", PLANS)
def test_one_bayes_optimal_token_at_a_time_keeps_the_law(plan):
    world = worlds.random(2, length=4, num_words=2, concentration=1.0)
    for strategy in set(LAW_KEEPING) - {"entropy_bound", "joint_entropy"}:
        found = samples(world, None, PLANS[plan](4), config_of("independent", strategy))
        assert chi_square(found, world) > 1e-4, strategy


# Temperature


def tempered(pc, q, temperature):
    """``sum_z (p(z) prod_i p(x_i | z_i) q_i(x_i))^(1 / tau)`` over the states z of a chain, normalised, as a table."""
    mixture = Components.of(pc)
    joint = mixture.leaves * q  # (Z, L, V)
    texts = torch.tensor(list(itertools.product(range(q.shape[1]), repeat=q.shape[0])))
    paths = mixture.weights * joint[:, np.arange(q.shape[0]), texts.numpy()].prod(-1).T  # (n, Z)
    weights = torch.from_numpy((paths ** (1 / temperature)).sum(1))
    return Table(texts, weights / weights.sum())


def test_joint_draws_at_a_temperature_have_the_law_of_the_power_of_their_explanations():
    pc = hmm(3, ANYWHERE)
    q = reference.predicted(ANYWHERE.denoiser(), ANYWHERE.blank.numpy())
    law = tempered(pc, q, 0.5)
    found = samples(ANYWHERE, pc, df.Anywhere(1), config_of("joint", "entropy", 0.5))
    assert chi_square(found, law) > 1e-4
    assert chi_square(found, tempered(pc, q, 0.6)) < 1e-4  # another temperature is told apart
    assert tempered(pc, q, 1.0).total_variation(decoder_law(step_law_of(ANYWHERE, pc, "joint", Rule(num_steps=1)),
                                                            ANYWHERE.blank)) < 1e-6  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("decode", MODES)
def test_towards_zero_the_greedy_text_is_drawn(decode, plan):
    pc = hmm(4, IN_BLOCKS)
    for strategy in STRATEGIES:
        if strategy == "random":
            continue
        cold, frozen = (
            samples(IN_BLOCKS, pc, PLANS[plan](3), config_of(decode, strategy, temperature), num=6)
            for temperature in (1e-3, 0.0)
        )
        assert torch.equal(cold, frozen), strategy
        assert torch.equal(frozen, frozen[:1].expand_as(frozen)), strategy


# Holes


def conditional(world, canvas):
    fits = ((world.support == canvas) | (canvas == world.mask_id)).all(1)
    return Table(world.support[fits], world.probs[fits] / world.probs[fits].sum())


@pytest.mark.parametrize("plan", [df.Anywhere(1), df.DynamicWindows(1), df.Blocks(4, 1)], ids=str)
def test_one_joint_step_fills_holes_anywhere_from_their_exact_conditional_law(plan):
    """Rows with other holes, in one batch."""
    world = worlds.hidden_markov(4, seed=1)
    pc, m = world.circuit(dtype=torch.float64), world.mask_id
    holes = torch.tensor([[m, 1, m, 0], [0, m, m, 2], [m, m, 1, m], [m, 2, 1, m]])
    num = 600
    found = df.infill(
        world.uniform_denoiser(), holes.repeat(num, 1), head=df.CoupledHead(pc), plan=plan, temperature=1.0,
        seeds=list(range(4 * num)),
    ).tokens  # fmt: skip
    for row, canvas in enumerate(holes):
        assert chi_square(found[row::4], conditional(world, canvas)) > 1e-4


def test_a_window_shorter_than_the_circuit_sums_out_what_is_outside():
    """The tokens of a short row have the law of the first tokens of a text: all continuations are added up."""
    world = worlds.hidden_markov(4, seed=1)
    pc, m = world.circuit(dtype=torch.float64), world.mask_id
    num = 800
    rows = [[m, 1, m], [m, m, m, 0]] * num
    out = df.infill(
        world.uniform_denoiser(),
        rows,
        num_steps=1,
        head=df.CoupledHead(pc),
        temperature=1.0,
        seeds=list(range(2 * num)),
    )
    beginnings = Table(world.support[:, :3], world.probs)
    fits = beginnings.support[:, 1] == 1
    law = Table(beginnings.support[fits], beginnings.probs[fits] / beginnings.probs[fits].sum())
    assert chi_square(out.tokens[::2, :3], law) > 1e-4
    assert chi_square(out.tokens[1::2], conditional(world, torch.tensor([m, m, m, 0]))) > 1e-4
    elsewhere = Table(world.support[world.support[:, 3] == 0][:, :3], world.probs[world.support[:, 3] == 0]
                      / world.probs[world.support[:, 3] == 0].sum())  # fmt: skip
    assert not torch.allclose(beginnings.probs, elsewhere.prob(beginnings.support), atol=0.02)


# Constraints


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("has_circuit", [True, False])
def test_joint_draws_under_a_constraint_have_the_law_of_what_is_accepted(has_circuit, num_steps):
    """An even number of ones, and no two twos in a row; fixed tokens too."""
    world = worlds.hidden_markov(4, seed=1)
    pc, m = world.circuit(dtype=torch.float64), world.mask_id
    # states: (parity, whether the last was a two)
    table = torch.full((4, world.spec.vocab_size), -1)
    for state, token in itertools.product(range(4), range(3)):
        if not (token == 2 and state % 2):
            table[state, token] = 2 * ((state // 2) ^ (token == 1)) + (token == 2)
    automaton = df.constraints.automaton(ct.queries.Automaton.deterministic(table, [0, 1]))
    canvas = torch.tensor([m, m, 1, m])
    found = df.infill(
        world.uniform_denoiser(), canvas.repeat(NUM_SAMPLES, 1), num_steps=num_steps, temperature=1.0,
        head=df.CoupledHead(pc) if has_circuit else None, constraint=automaton, seeds=list(range(NUM_SAMPLES)),
    ).tokens  # fmt: skip
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    is_accepted = ((every == 1).sum(1) % 2 == 0) & ~((every[:, 1:] == 2) & (every[:, :-1] == 2)).any(1)
    every = every[is_accepted & (every[:, 2] == 1)]
    probs = world.prob(every) if has_circuit else torch.ones(len(every), dtype=torch.float64)
    law = Table(every, probs / probs.sum())
    assert chi_square(found, law) > 1e-4
