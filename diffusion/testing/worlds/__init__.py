"""Worlds with known answers: small distributions over texts, their Bayes-optimal denoisers and true circuits.

What a decoder produces in such a world can be compared with the truth, exactly. A world has as many texts as can be
enumerated; :class:`World` makes one of your own.
"""

from diffusion.testing.worlds.catalogue import alternating, cities, endings, hidden_markov, parity, random, sums
from diffusion.testing.worlds.denoisers import BayesDenoiser, UniformDenoiser
from diffusion.testing.worlds.world import World

__all__ = [
    "BayesDenoiser",
    "UniformDenoiser",
    "World",
    "alternating",
    "cities",
    "endings",
    "hidden_markov",
    "parity",
    "random",
    "sums",
]
