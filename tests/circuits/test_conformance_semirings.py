"""The further semirings pass the conformance kit."""

import torch

import circuits as ct
from circuits.queries.averages import EntropySemiring
from circuits.queries.expectations import SignedSemiring
from circuits.queries.k_best import KBestSemiring


class TestSignedSemiring(ct.testing.SemiringTestCase):
    max_examples = 30

    def semiring(self):
        return SignedSemiring()

    def plus(self, left, right):
        return torch.logaddexp(left, right)

    def times(self, left, right):
        (a, b), (c, d) = left, right
        return torch.stack([torch.logaddexp(a + c, b + d), torch.logaddexp(a + d, b + c)])


class TestKBestSemiring(ct.testing.SemiringTestCase):
    max_examples = 30

    def semiring(self):
        return KBestSemiring(3)

    def plus(self, left, right):
        return torch.cat([left, right]).topk(3).values

    def times(self, left, right):
        return (left.unsqueeze(0) + right.unsqueeze(1)).flatten().topk(3).values


class TestEntropySemiring(ct.testing.SemiringTestCase):
    max_examples = 30

    def semiring(self):
        return EntropySemiring()

    def plus(self, left, right):
        """The entropy of a choice plus the average entropy of what is chosen."""
        mass = torch.logaddexp(left[0], right[0])
        if mass == -torch.inf:
            return torch.stack([mass, torch.zeros_like(mass)])
        p = (torch.stack([left[0], right[0]]) - mass).exp()
        entropy = (p * torch.stack([left[1], right[1]])).sum() - torch.xlogy(p, p).sum()
        return torch.stack([mass, entropy])

    def times(self, left, right):
        return left + right

    def assert_equal(self, actual, expected):
        """The entropy of what is impossible means nothing."""
        for value in (actual, expected):
            value[..., 1].masked_fill_(value[..., 0] == -torch.inf, 0.0)
        super().assert_equal(actual, expected)
