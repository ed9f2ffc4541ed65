"""A circuit on top of a denoiser of one's own: two methods are all that a denoiser needs.

The toy denoiser knows that a block is "San Diego" or "New York", each half of the time, but like every factorized
predictor it can only say so word by word. Run: python examples/own_denoiser.py
"""

from collections import Counter

import torch

import circuits as ct
import diffusion as df

WORDS = ["San", "New", "Diego", "York", "<mask>"]
TRUE_BLOCKS = torch.tensor([[0, 2], [1, 3]])  # San Diego, New York


class TwoCities:
    """A denoiser: facts about its tokens, and logits. It conditions on the words that are visible."""

    spec = df.DenoiserSpec(vocab_size=5, mask_id=4, eos_ids=(), pad_id=4, forbidden_ids=(4,), max_length=16)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        block = tokens[:, start:stop]
        fits = ((block.unsqueeze(1) == TRUE_BLOCKS) | (block == 4).unsqueeze(1)).all(-1).float()  # (B, 2 cities)
        one_hot = torch.nn.functional.one_hot(TRUE_BLOCKS, 5).float()  # (2 cities, 2 words, V)
        return (torch.einsum("bc,clv->blv", fits, one_hot) + 1e-6).log()


# 1. Fit a circuit to plain text: here a hidden Markov model with two states over blocks of two words.
pc = ct.compile(ct.structures.hmm(seq_length=2, num_states=2, num_categories=5, homogeneous=False), seed=1)
ct.learning.fit(pc, TRUE_BLOCKS.repeat(50, 1), optimizer="em", num_epochs=200, progress=False)

# 2. Make it the output layer. (df.fit_coupled trains it further on the denoiser's own predictions.)
head = df.CoupledHead(pc)

# 3. Generate in ONE denoiser call per block, without and with the circuit.
for name, used in (("without the circuit", None), ("with the circuit", head)):
    out = df.generate(
        TwoCities(),
        torch.zeros(400, 0, dtype=torch.int64),  # 400 empty prompts
        gen_length=2,
        block_length=2,
        num_steps=1,
        head=used,
        temperature=1.0,  # draw; 0, the default, takes the best
        generator=torch.Generator().manual_seed(0),
    )
    texts = Counter(" ".join(WORDS[token] for token in row) for row in out.generated.tolist())
    print(f"{name}: {dict(texts.most_common())}")

# The joint distribution itself is an ordinary torch distribution.
masked = torch.ones(1, 2, dtype=torch.bool)
tokens = torch.full((1, 2), 4)
dist = head.distribution(TwoCities().logits(tokens), tokens, masked)
san_york = torch.tensor([[0, 3]])
print(f"P('San York') = {dist.log_prob(san_york).exp().item():.6f}; the most probable block is", end=" ")
print(" ".join(WORDS[token] for token in dist.mode[0].tolist()))
