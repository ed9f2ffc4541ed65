"""A small denoiser with hidden states, blocks to predict, and predictions with features, for tests of conditioners."""

import numpy as np
import torch
from hmm_cases import L, V

from diffusion import Prediction, TransformerConfig, TransformerDenoiser

B, H, DOUBLE = 3, 2, torch.float64
CONTEXT, LENGTH, TOKENS = 4, 4, 9


def small_denoiser():
    config = TransformerConfig(
        vocab_size=TOKENS, mask_id=8, pad_id=7, eos_id=6, context_length=CONTEXT, block_length=LENGTH, width=16,
        num_layers=1, num_heads=2,
    )  # fmt: skip
    return TransformerDenoiser(config, seed=0).eval()


def told_windows():
    """Blocks of one token four times, which the first token of the context tells."""
    first = torch.randint(0, 6, (60, 1), generator=torch.Generator().manual_seed(0))
    return torch.cat([first, torch.zeros(60, CONTEXT - 1, dtype=torch.int64), first.expand(-1, LENGTH)], 1)


def random_prediction(generator):
    logits = 2 * torch.randn(B, L, V, dtype=DOUBLE, generator=generator)
    return Prediction.from_logits(logits, features=torch.randn(B, L, H, dtype=DOUBLE, generator=generator))


def random_block(generator):
    masked = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    return torch.randint(V, (B, L), generator=generator), masked


def piecewise(knots, ratio):
    """Linear interpolation between knots at 0, 1/2 and 1."""
    return np.stack([np.interp(ratio, [0.0, 0.5, 1.0], column) for column in knots.detach().numpy().T], -1)
