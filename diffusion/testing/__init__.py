"""Testing denoisers and decoders: worlds with known answers, the exact law of a decoder, and a conformance kit.

- :mod:`~diffusion.testing.worlds`: small distributions over texts, with Bayes-optimal denoisers and true circuits.
- :func:`decoder_law`: the exact distribution of what a decoder produces, by enumeration;
  :mod:`~diffusion.testing.reference` has the steps of every way of decoding, spelled out.
- :func:`total_variation`, :func:`chi_square`: tables and samples compared with the truth.
- :class:`DenoiserTestCase`: whoever writes a denoiser subclasses it, and inherits the tests.

The strategy :func:`random_worlds` needs the package ``hypothesis``, and the test case ``pytest`` (extra ``[test]``):
they are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffusion.testing import reference, worlds
from diffusion.testing.law import DecoderLaw, decoder_law
from diffusion.testing.table import Table, chi_square, total_variation

if TYPE_CHECKING:
    from diffusion.testing.conformance import DenoiserTestCase
    from diffusion.testing.strategies import random_worlds

__all__ = [
    "DecoderLaw",
    "DenoiserTestCase",
    "Table",
    "chi_square",
    "decoder_law",
    "random_worlds",
    "reference",
    "total_variation",
    "worlds",
]

_LAZY = {"DenoiserTestCase": "diffusion.testing.conformance", "random_worlds": "diffusion.testing.strategies"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
