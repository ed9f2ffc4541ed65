"""LLaDA (Nie et al. 2025, arXiv 2502.09992) and iLLaDA (Nie et al. 2026, arXiv 2606.25331): Llama that sees both ways.

LLaDA's files have a layout of their own, iLLaDA's that of Llama. Neither is told positions: only distances count.
"""

from __future__ import annotations

import re

from diffusion.denoisers.adapters.backbone import BackboneDenoiser
from diffusion.denoisers.adapters.decoder import configured, decoder, filled, llama_names, output_layer
from diffusion.denoisers.adapters.vocabulary import Specials, spec_of
from diffusion.denoisers.pretrained import Source

LLADA = Specials(masks=("<|mdm_mask|>",), mask_id=126336, ends=("<|eot_id|>",), end_ids=(126081, 126348))
ILLADA = Specials(masks=("<[MASK]>",), mask_id=5, ends=("<|eot_id|>",))

_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)")
_IN_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
_OUTSIDE = {
    "model.transformer.wte.weight": "backbone.model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "backbone.model.norm.weight",
    "model.transformer.ff_out.weight": "head.weight",
}
_EXPECTED = {
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


def load(source: Source) -> BackboneDenoiser:
    """Return LLaDA-8B, LLaDA-1.5 or a model of their architecture and layout."""
    source.check(_EXPECTED)
    width, heads = source.number("d_model"), source.number("n_heads")
    table = source.number("embedding_size", source.number("vocab_size"))
    max_length = source.number("max_sequence_length")
    options = {
        "vocab_size": table,
        "hidden_size": width,
        "intermediate_size": source.number("mlp_hidden_size", width * source.number("mlp_ratio", 4)),
        "num_hidden_layers": source.number("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.number("n_kv_heads", heads),
        "rms_norm_eps": source.config.get("rms_norm_eps", 1e-5),
        "rope_theta": source.config.get("rope_theta", 10_000.0),
        "max_position_embeddings": max_length,
    }
    spec = spec_of(source, LLADA, vocab_size=table, max_length=max_length)
    model = BackboneDenoiser(spec, decoder("Llama", options), output_layer(width, table))
    return filled(model, source, names_of, tied=bool(source.config.get("weight_tying", False)))


def load_illada(source: Source) -> BackboneDenoiser:
    """Return iLLaDA-8B or a model of its architecture and layout."""
    source.check({"layer_norm_eps": None})
    biases = {name: bool(source.config.get(name, False)) for name in ("attention_bias", "mlp_bias")}
    options = configured(source, **biases)
    table, width = options["vocab_size"], options["hidden_size"]
    spec = spec_of(source, ILLADA, vocab_size=table, max_length=options["max_position_embeddings"])
    model = BackboneDenoiser(spec, decoder("Llama", options), output_layer(width, table))
    return filled(model, source, llama_names, tied=bool(source.config.get("tie_word_embeddings", True)))


def names_of(name: str) -> str | None:
    """Return the name here of a weight in LLaDA's layout."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_BLOCK:
        return name  # which is unexpected
    return f"backbone.model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"
