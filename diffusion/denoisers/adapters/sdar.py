"""SDAR (Cheng et al. 2025, arXiv 2510.06303): Qwen3 whose blocks see themselves and what stands before them."""

from __future__ import annotations

from diffusion.denoisers.adapters.backbone import CachedBlockDenoiser
from diffusion.denoisers.adapters.decoder import configured, decoder, filled, llama_names, output_layer
from diffusion.denoisers.adapters.vocabulary import Specials, spec_of
from diffusion.denoisers.pretrained import Source

SPECIALS = Specials(masks=("<|MASK|>",), mask_id=151669, ends=("<|im_end|>",), pad_id=151643)
BLOCK_SIZE = 4
"""Of the published models whose config does not say."""


def load(source: Source) -> CachedBlockDenoiser:
    """Return a dense SDAR model."""
    width, heads = source.number("hidden_size"), source.number("num_attention_heads")
    options = configured(
        source,
        head_dim=source.number("head_dim", width // heads),
        attention_bias=bool(source.config.get("attention_bias", False)),
    )
    table = options["vocab_size"]
    spec = spec_of(source, SPECIALS, vocab_size=table, max_length=options["max_position_embeddings"])
    size = source.number("block_size", BLOCK_SIZE)
    model = CachedBlockDenoiser(spec, decoder("Qwen3", options), output_layer(width, table), block_size=size)
    return filled(model, source, llama_names, tied=bool(source.config.get("tie_word_embeddings", False)))
