"""Other ways to tie together the tokens of one step, behind the interface of :class:`~diffusion.head.CoupledHead`.

Each is written from its paper's description, with small models of our own, to compare the circuit with:

- :class:`CopulaHead`: the denoiser's marginals with a circuit's dependence (discrete copula diffusion).
- :class:`EnergyHead`: candidates from the prediction, weighed by a small model (energy-based diffusion).
- :class:`AdaptiveHead`: as long a beginning as a small autoregressive model agrees with (adaptive parallel decoding).
- :class:`CausalHead`: a small network writes the block from left to right, told the prediction (CoDiLA-like).
- :class:`MixtureHead`: a mixture of products whose weights and leaves depend on the prediction (Di4C, IMDM).

They go wherever ``head=`` stands in :func:`~diffusion.decoding.generation.generate` and its relatives. Their ``save``
writes a folder, which ``load``, or :func:`load_head` whatever it holds, reads.
"""

from diffusion.decoding.baselines.adaptive import AdaptiveHead
from diffusion.decoding.baselines.causal import CausalHead
from diffusion.decoding.baselines.copula import CopulaHead
from diffusion.decoding.baselines.energy import EnergyHead
from diffusion.decoding.baselines.fit import fit_autoregressive, fit_conditional
from diffusion.decoding.baselines.mixture import MixtureHead
from diffusion.decoding.baselines.models import AutoregressiveModel, BlockModel, CircuitModel
from diffusion.decoding.baselines.saving import load_head

__all__ = [
    "AdaptiveHead",
    "AutoregressiveModel",
    "BlockModel",
    "CausalHead",
    "CircuitModel",
    "CopulaHead",
    "EnergyHead",
    "MixtureHead",
    "fit_autoregressive",
    "fit_conditional",
    "load_head",
]
