"""What the decoder samples follows the law that enumeration gives: each mode, strategy, block and prompt."""

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.testing import Table, chi_square, decoder_law, reference, worlds
from diffusion.testing.reference import Rule

STRATEGIES = ["low_confidence", "random", "entropy", "margin", "top_prob"]
NUM_SAMPLES = 1500

pytestmark = pytest.mark.usefixtures("one_thread")


def bayes_law(world, **rule):
    """Independent tokens from the Bayes-optimal denoiser."""
    return decoder_law(reference.independent(world.denoiser(), Rule(**rule)), world.blank)


def sampled(world, head, **options):
    out = df.generate(
        world.denoiser(),
        torch.zeros(NUM_SAMPLES, 0, dtype=torch.int64),
        gen_length=world.length,
        block_length=world.length,
        temperature=1.0,
        head=head,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    return out.generated


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_local_normalisation_follows_the_law_of_its_reference(strategy):
    world = worlds.random(3, length=3, concentration=1.0)
    pc = ct.compile(ct.structures.hmm(3, 2, world.spec.vocab_size), seed=1)
    head = df.CoupledHead(pc, 1.0, normalization="local")
    for decode in ("joint", "marginal", "latent", "any_order"):
        rule = Rule(strategy=strategy, num_steps=2)
        step_law = reference.coupled(world.denoiser(), pc, rule, decode=decode, normalization="local")
        law = decoder_law(step_law, world.blank)
        assert chi_square(sampled(world, head, decode=decode, strategy=strategy, num_steps=2), law) > 1e-4, decode


def test_blocks_are_decoded_from_the_law_of_the_block_before():
    """Two blocks of two tokens, one step each: tokens of a block are independent given the block before."""
    world = worlds.hidden_markov(4, seed=1)
    step_law = reference.independent(world.denoiser(), Rule(num_steps=1))
    first = decoder_law(step_law, world.blank, [True, True, False, False])
    assert bool((first.support[:, 2:] == world.mask_id).all())
    law = decoder_law(step_law, first, [False, False, True, True])
    out = df.generate(
        world.denoiser(), torch.zeros(NUM_SAMPLES, 0, dtype=torch.int64), gen_length=4, block_length=2, num_steps=2,
        strategy="random", temperature=1.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert chi_square(out.generated, law) > 1e-4
    assert chi_square(out.generated, bayes_law(world, num_steps=1)) < 1e-6


def beginnings(world, prompt, length):
    """The law of the first tokens of a text that begins with the prompt."""
    fits = (world.support[:, : len(prompt)] == torch.tensor(prompt)).all(1)
    return Table(world.support[fits, :length], world.probs[fits] / world.probs[fits].sum())


def test_a_decoder_that_ends_texts_early_keeps_the_law():
    """An ended text is filled with its end, which is what the rest of it would have been."""
    world = worlds.endings(4)
    out = df.generate(
        world.denoiser(), torch.zeros(NUM_SAMPLES, 0, dtype=torch.int64), gen_length=4, block_length=2, num_steps=4,
        strategy="random", temperature=1.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert not bool(out.valid.all())
    assert chi_square(out.tokens, world) > 1e-4


def test_prompts_of_different_lengths_have_the_law_of_their_continuations():
    world = worlds.hidden_markov(4, seed=1)
    prompts = [[0], [2, 1]] * 2000
    out = df.generate(
        world.denoiser(), prompts, gen_length=2, block_length=2, num_steps=2, strategy="entropy", temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert chi_square(out.tokens[::2, 1:], beginnings(world, [0], 3)) > 1e-4
    assert chi_square(out.tokens[1::2], beginnings(world, [2, 1], 4)) > 1e-4
    assert chi_square(out.tokens[1::2, 1:], beginnings(world, [1], 3)) < 1e-6  # what a forgotten token would give


def test_a_circuit_of_a_window_is_coupled_inside_it_only():
    """The circuit of one block, put on the second block: what a smaller canvas of that block would give."""
    world = worlds.hidden_markov(4)
    pc = ct.compile(ct.structures.hmm(2, 2, world.spec.vocab_size), dtype=torch.float64, seed=1)
    start = torch.tensor([0, 2, world.mask_id, world.mask_id])
    rule = Rule(strategy="entropy", num_steps=2)
    for decode in ("joint", "any_order"):
        step_law = reference.coupled(world.denoiser(), pc, rule, decode=decode, window=(2, 4))
        law = decoder_law(step_law, start, start == world.mask_id)
        assert {tuple(text[:2]) for text in law.support.tolist()} == {(0, 2)}
    head = df.CoupledHead(pc.float(), 1.0)
    out = df.generate(
        world.denoiser(), start[:2].expand(NUM_SAMPLES, 2), gen_length=2, block_length=2, num_steps=2, head=head,
        decode="any_order", strategy="entropy", temperature=1.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert chi_square(out.tokens, law) > 1e-4
