"""Models whose code comes with them: mixtures of experts, block-causal. It runs only when that is asked for by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusion.denoisers.adapters.backbone import BlockCausalDenoiser
from diffusion.denoisers.adapters.vocabulary import Specials, fingerprint_of, spec_of
from diffusion.denoisers.layers import KeysValues
from diffusion.denoisers.pretrained import Source
from diffusion.errors import ArgumentError
from diffusion.hub import require

LLADA2 = Specials(masks=("<|mask|>",), mask_id=156895, ends=("<|role_end|>",), end_ids=(156892,), pad_id=156892)
SDAR = Specials(masks=("<|MASK|>",), mask_id=151669, ends=("<|im_end|>",), pad_id=151643)
_FAMILIES = {"llada2_moe": (LLADA2, 32), "sdar_moe": (SDAR, 4)}
"""By model type: special tokens, and the length of a block where the config does not say."""


class RemoteBackbone(nn.Module):
    """The decoder of a model with code of its own, which takes masks of zeros and ones. It keeps no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,  # shape: (B, L)
        attended: Tensor,  # shape: (B or 1, 1, L, L)
        positions: Tensor,  # shape: (B, L)
        *,
        past: list[KeysValues] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Return features, (B, L, H), and no keys and values."""
        mask = attended.expand(len(tokens), -1, -1, -1).to(next(self.model.parameters()).dtype)
        output = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        return output[0], []


def load(source: Source) -> BlockCausalDenoiser:
    """Return LLaDA2 or a mixture-of-experts SDAR, with its repository's code; raises ArgumentError unless asked to."""
    if not source.trust_remote_code:
        raise ArgumentError(
            f"{source.name}: expected trust_remote_code=True, got False: this model comes with code of its own, which "
            "would be executed; read it first"
        )
    transformers = require("transformers")
    specials, block_size = _FAMILIES[str(source.config["model_type"]).lower()]
    spread = source.device == "auto" or not isinstance(source.device, str | torch.device)
    placed: dict[str, Any] = {"device_map": source.device} if spread else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.folder, trust_remote_code=True, torch_dtype=source.dtype or "auto", **placed
    )
    spec = spec_of(
        source, specials, vocab_size=source.number("vocab_size"), max_length=source.number("max_position_embeddings")
    )
    backbone = RemoteBackbone(model.get_decoder())
    size = source.number("block_size", block_size)
    denoiser = BlockCausalDenoiser(spec, backbone, model.get_output_embeddings(), block_size=size)
    if not spread:
        denoiser.to(source.one_device)
    denoiser.tokenizer_fingerprint = fingerprint_of(source.folder)
    denoiser.eval()
    return denoiser
