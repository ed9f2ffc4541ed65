"""How B cells mutate the chains that they rearrange, learnt from reads, and germline chains that are mutated so."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from _antibody_data import RESIDUES, translated
from numpy.typing import NDArray

LOOP = re.compile("C([A-Z]{4,40}?)WG[A-Z]G")
MOST_MUTATED = 0.4
"""Share of the residues that mutation changes, at most; reads farther from every gene than this are of other genes."""
_MOST_PLACES = 110
"""Of a V or J segment that are told apart."""
_PRIOR = 10.0
"""Reads, so to say, in which every place is mutated as often as the whole chain."""
_LOOP, _LOOP_ENDS = 1.3, 0.1
"""Relative rates in CDR3, which no gene says, and of its first and last residues, which nearly always stay."""
_GENERAL, _HERE = 5.0, 0.5
"""What counts of what a residue becomes: how often it does anywhere, and every read that says so of the place."""
_MOST_PROBABLE = 0.9
"""The largest probability that a place is mutated."""


class Chain(NamedTuple):
    """A rearrangement: residues before the C that CDR3 begins with, CDR3 from that C to its last W, and residues after.

    Counted in reads of the same end, places of the first part are from its end, of the last part from its beginning.
    """

    before: str
    loop: str
    after: str


@dataclass(frozen=True, eq=False)
class Mutations:
    """Rates of mutation by place, relative to the chain's own, and what residues become.

    Attributes:
        before: relative rates of the places before CDR3, from its end, (110,).
        after: those after CDR3, (110,).
        becomes: by residue how often mutation makes which of it, (20, 20); rows sum to 1.
        at: by place before CDR3 how many reads have which residue there by mutation, (110, 20).
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]
    becomes: NDArray[np.float64]
    at: NDArray[np.float64]

    @classmethod
    def of(cls, reads: Iterable[str], before: Sequence[str], after: Sequence[str]) -> Mutations:
        """Compare reads with the germline genes that are nearest to them.

        Args:
            reads: with CDR3 between a C and the WGxG of the conserved motif; others count nothing.
            before: residues of germline V genes before that C.
            after: residues of germline J genes after that W.
        """
        found, expected = np.zeros((2, _MOST_PLACES)), np.zeros((2, _MOST_PLACES))
        becomes, at = np.zeros((20, 20)), np.zeros((_MOST_PLACES, 20))
        for read in reads:
            loop = LOOP.search(read)
            if loop is None:
                continue
            start, stop = loop.span(1)
            parts = read[: start - 1][::-1], read[stop + 1 :]
            genes = [gene[::-1] for gene in before], after
            pairs = [nearest(part, known) for part, known in zip(parts, genes, strict=True)]
            rate = np.mean([one != other for one, other in pairs[0]]) if pairs[0] else np.inf
            if rate > MOST_MUTATED or not set(read) <= set(RESIDUES):
                continue
            for which, places in enumerate(pairs):
                for place, (one, other) in enumerate(places):
                    expected[which, place] += rate
                    if one != other:
                        found[which, place] += 1
                        becomes[RESIDUES.index(one), RESIDUES.index(other)] += 1
                        at[place, RESIDUES.index(other)] += which == 0
        rates = (found + _PRIOR) / (expected + _PRIOR)
        likely = np.array([[neighbours()[one].count(other) for other in RESIDUES] for one in RESIDUES])
        becomes += 2 * _PRIOR * likely / likely.sum(1, keepdims=True)
        return cls(rates[0], rates[1], becomes / becomes.sum(1, keepdims=True), at)

    def mutated(self, chains: Sequence[Chain], *, seed: int) -> list[str]:
        """Mutate chains, each at a rate of its own, U(0, MOST_MUTATED)."""
        generator, found = np.random.default_rng(seed), []
        for chain in chains:
            sizes = len(chain.before), len(chain.loop), len(chain.after)
            loop = np.full(sizes[1], _LOOP)
            loop[[0, -1]] = _LOOP_ENDS
            relative = np.concatenate([self.before[: sizes[0]][::-1], loop, self.after[: sizes[2]]])
            rate = generator.uniform(0.0, MOST_MUTATED)
            residues = list("".join(chain))
            for place in np.flatnonzero(generator.random(len(residues)) < np.minimum(rate * relative, _MOST_PROBABLE)):
                one = RESIDUES.index(residues[place])
                weights = _GENERAL * self.becomes[one]
                if place < sizes[0]:
                    weights = weights + _HERE * self.at[sizes[0] - 1 - place]
                weights[one] = 0.0
                residues[place] = RESIDUES[generator.choice(20, p=weights / weights.sum())]
            found.append("".join(residues))
        return found


def nearest(part: str, genes: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of a gene's and a part's residues, place by place, of the gene with the fewest differences."""
    return min(
        ([*zip(gene, part, strict=False)] for gene in genes),
        key=lambda pairs: sum(one != other for one, other in pairs),
    )


@cache
def neighbours() -> dict[str, str]:
    """Return the residues that a change of one base makes of each, as often as there are such pairs of codons."""
    codons = list(map("".join, itertools.product("TCAG", repeat=3)))
    found = dict.fromkeys(RESIDUES, "")
    for one, other in itertools.permutations(codons, 2):
        residue, new = translated(one), translated(other)
        if sum(map(str.__ne__, one, other)) == 1 and residue != new and "*" not in (residue, new):
            found[residue] += new
    return found
