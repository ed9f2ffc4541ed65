"""What tests of likelihoods share: a denoiser that looks at everything, and small worlds."""

import itertools

import torch

import circuits as ct
import diffusion as df

EXACT = 2e-5  # nats, in float32
V, MASK = 3, 3


def all_texts(length, num_words=V):
    return torch.tensor(list(itertools.product(range(num_words), repeat=length)))


def nothing(count):
    return torch.zeros(count, 0, dtype=torch.int64)


def hmm_head(length, vocab_size, **options):
    return df.CoupledHead(ct.compile(ct.structures.hmm(length, 2, vocab_size), seed=1), 1.0, **options)


class Reader:
    """A denoiser whose prediction depends on all visible tokens by their distance: nothing is symmetric."""

    spec = df.DenoiserSpec(vocab_size=V + 2, mask_id=MASK, eos_ids=(), pad_id=4, forbidden_ids=(MASK, 4), max_length=12)

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.effect = torch.randn(25, V + 2, V + 2, generator=generator, dtype=torch.float64)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        places = torch.arange(tokens.shape[1])
        effects = self.effect[places[start:stop].unsqueeze(1) - places + 12][:, places, tokens]  # (n, B, T, V)
        return (effects * valid.unsqueeze(-1)).sum(2).transpose(0, 1).float()


READER = Reader()
