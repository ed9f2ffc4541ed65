"""BD3-LM (Arriola et al. 2025, arXiv 2503.09573): MDLM's transformer, block-causal."""

from __future__ import annotations

from torch import Tensor

from diffusion.denoisers.adapters.backbone import CachedBlockDenoiser
from diffusion.denoisers.adapters.mdlm import described, filled, skeleton, substituted
from diffusion.denoisers.pretrained import Source


class SubstitutionBlockDenoiser(CachedBlockDenoiser):
    """A block-causal backbone with MDLM's substitution of logits."""

    def _finished(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return substituted(logits, tokens, self.spec.mask_id)


def load(source: Source) -> SubstitutionBlockDenoiser:
    """Return BD3-LM or a model of its architecture and layout; those with another noise level in each block are none.

    With ``cross_attn`` False all positions see each other: one block of the whole length.
    """
    source.check({"time_conditioning": False, "causal": False})
    spec, config = described(source)
    backbone, head = skeleton(config)
    whole = not source.config.get("cross_attn", True)
    size = spec.max_length if whole else source.number("block_size")
    return filled(SubstitutionBlockDenoiser(spec, backbone, head, block_size=size), source)
