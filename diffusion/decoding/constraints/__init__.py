"""Constraints on decoded text: regular expressions, keywords, templates, as automata over tokens.

Every function returns a :class:`~circuits.queries.deterministic.DeterministicAutomaton`; ``a & b`` is both. With a
chain circuit, or none, the distribution under a constraint is exact: :class:`circuits.ConstrainedDistribution`.
"""

from diffusion.decoding.constraints.canvas import Constraint, Reach
from diffusion.decoding.constraints.coupled import ConstrainedCoupledDistribution
from diffusion.decoding.constraints.languages import (
    any_tokens,
    automaton,
    forbid,
    force,
    keywords,
    length,
    regex,
    template,
)
from diffusion.decoding.constraints.vocabulary import Vocabulary, token_texts, vocabulary

__all__ = [
    "ConstrainedCoupledDistribution",
    "Constraint",
    "Reach",
    "Vocabulary",
    "any_tokens",
    "automaton",
    "forbid",
    "force",
    "keywords",
    "length",
    "regex",
    "template",
    "token_texts",
    "vocabulary",
]
