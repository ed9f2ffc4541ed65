"""The decoders of transformers (Llama, Qwen2, Qwen3) without their causal masks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusion.denoisers.adapters.backbone import BackboneDenoiser
from diffusion.denoisers.adapters.vocabulary import fingerprint_of
from diffusion.denoisers.checkpoints import Names, load_weights
from diffusion.denoisers.layers import KeysValues
from diffusion.denoisers.pretrained import Source
from diffusion.errors import ArgumentError
from diffusion.hub import require

Model = TypeVar("Model", bound=BackboneDenoiser)


class DecoderBackbone(nn.Module):
    """A model of transformers that maps ids to hidden states, with any mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        named = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"  # the older name

    def forward(
        self,
        tokens: Tensor,  # shape: (B, Q)
        attended: Tensor,  # shape: (B or 1, 1, Q, K)
        positions: Tensor,  # shape: (B, Q)
        *,
        past: list[KeysValues] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Return features (B, Q, H), and the keys and values of all K positions, if they are to be kept."""
        from transformers import DynamicCache

        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(attended.shape, dtype=dtype, device=attended.device)
        mask = mask.masked_fill(~attended, torch.finfo(dtype).min)
        options: dict[str, Any] = {"use_cache": False}
        cache = None
        if keep:
            cache = DynamicCache()
            for index, (keys, values) in enumerate(past or ()):
                cache.update(keys, values, index)
            options = {"use_cache": True, self._cache_name: cache}
        output = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, **options)
        return output.last_hidden_state, [] if cache is None else _keys_values(cache)


def decoder(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a decoder of transformers, ``Llama``, ``Qwen2`` or ``Qwen3``, without memory for its weights."""
    transformers = require("transformers")
    settings = getattr(transformers, f"{kind}Config")(**config)
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{kind}Model")(settings)
    # its angles are in no file
    model.rotary_emb = type(model.rotary_emb)(settings)
    return DecoderBackbone(model)


def configured(source: Source, **more: Any) -> dict[str, Any]:
    """Return the options of a decoder from a config with the keys of Llama, Qwen2 and Qwen3, and more of its family."""
    source.check({"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None})
    heads = source.number("num_attention_heads")
    return {
        "vocab_size": source.number("vocab_size"),
        "hidden_size": source.number("hidden_size"),
        "intermediate_size": source.number("intermediate_size"),
        "num_hidden_layers": source.number("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.number("num_key_value_heads", heads),
        "rms_norm_eps": source.config.get("rms_norm_eps", 1e-6),
        "rope_theta": source.config.get("rope_theta", 10_000.0),
        "max_position_embeddings": source.number("max_position_embeddings"),
        **more,
    }


def output_layer(width: int, vocab_size: int) -> nn.Linear:
    """Return a linear layer without a bias and without memory for its weights."""
    with torch.device("meta"):
        return nn.Linear(width, vocab_size, bias=False)


def llama_names(name: str) -> str | None:
    """Return the name here of a weight in the layout of Llama, Qwen2 and Qwen3."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return "head.weight" if name == "lm_head.weight" else f"backbone.{name}"


def filled(module: Model, source: Source, names: Names, *, tied: bool = False) -> Model:
    """Load a denoiser's weights, in the dtype and onto the device or devices of the source, for evaluation.

    The module has a ``backbone``, a :class:`DecoderBackbone`, and a ``head``, which is the embedding if it is ``tied``.
    """
    places = _device_map(module, source)

    def place(name: str) -> torch.device:
        found = [key for key in places if not key or name == key or name.startswith(f"{key}.")]
        if not found:
            raise ArgumentError(f"device: expected a device for {name}, got none; name it, or its module")
        return torch.device(places[max(found, key=len)])

    def name_of(stored: str) -> str | None:
        name = names(stored)
        return None if tied and name == "head.weight" else name

    load_weights(
        module,
        source.folder,
        names=name_of,
        dtype=source.dtype,
        device=place,
        absent=lambda name: tied and name == "head.weight",
    )
    if tied:
        module.head.weight = module.backbone.get_submodule("model.embed_tokens").weight
    if len(places) > 1:
        require("accelerate").dispatch_model(module, places)
    else:
        module.to(places[""])  # buffers that are in no file
    module.tokenizer_fingerprint = fingerprint_of(source.folder)
    module.eval()
    return module


def _device_map(module: nn.Module, source: Source) -> dict[str, Any]:
    if isinstance(source.device, str | torch.device) and source.device != "auto":
        return {"": source.device}
    if isinstance(source.device, Mapping):
        places = dict(source.device)
    else:
        whole = [type(module.get_submodule("backbone.model.layers.0")).__name__]
        infer = require("accelerate").infer_auto_device_map
        places = dict(infer(module, no_split_module_classes=whole, dtype=source.dtype))
    if "disk" in places.values():
        raise ArgumentError("device: expected devices with room for the model, got too few; use a smaller dtype")
    return places


def _keys_values(cache: Any) -> list[KeysValues]:
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))
