"""Dream (Ye et al. 2025, arXiv 2508.15487): Qwen2 that sees both ways, and predicts one position ahead."""

from __future__ import annotations

from diffusion.denoisers.adapters.backbone import BackboneDenoiser
from diffusion.denoisers.adapters.decoder import configured, decoder, filled, llama_names, output_layer
from diffusion.denoisers.adapters.vocabulary import Specials, spec_of
from diffusion.denoisers.pretrained import Source

SPECIALS = Specials(masks=("<|mask|>",), mask_id=151666, ends=("<|im_end|>",), pad_id=151643)


def load(source: Source) -> BackboneDenoiser:
    """Return Dream-7B or a model of its architecture and layout."""
    options = configured(source)
    table, width = options["vocab_size"], options["hidden_size"]
    spec = spec_of(source, SPECIALS, vocab_size=table, max_length=options["max_position_embeddings"])
    model = BackboneDenoiser(spec, decoder("Qwen2", options), output_layer(width, table), shifted=True)
    return filled(model, source, llama_names, tied=bool(source.config.get("tie_word_embeddings", False)))
