"""Any masked language model of transformers as a denoiser: BERT, RoBERTa, ModernBERT, ESM, and their relatives.

Such a model reads a text between special tokens ([CLS] ... [SEP]). They are put in and taken out here: a canvas holds
the text alone. A padded row is given to the model as it would be without padding, so that neither positions that are
counted from the left nor those that are rotated can tell the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from circuits.files import check_finite
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.fingerprint import tokenizer_fingerprint

if TYPE_CHECKING:
    from diffusion.denoisers.pretrained import Source

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
_LONGEST = 1 << 20
"""Tokenizers without a limit say one of 1e30."""


class MaskedLMDenoiser(nn.Module):
    """A masked language model of transformers; see ``Denoiser`` for the contract of ``logits``.

    Args:
        model: from ``AutoModelForMaskedLM``, or another module that is called alike; it is set to evaluation mode.
        mask_id: of its tokenizer.
        pad_id: of its tokenizer.
        prefix_ids: special tokens before a text, as [CLS].
        suffix_ids: special tokens after a text, as [SEP].
        forbidden_ids: ids that are no text; ``mask_id``, ``pad_id`` and the special tokens need not be named.
        eos_ids: ids that end a text within the canvas; most such models have none.
        max_length: the largest number of tokens of a text, special ones not counted; None: what the model's position
            embeddings allow.
        tokenizer_fingerprint: of the tokenizer whose ids these are, see
            :func:`~diffusion.fingerprint.tokenizer_fingerprint`; None: unknown.

    Raises:
        ArgumentError: an id outside the vocabulary, or no room for a text.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mask_id: int,
        pad_id: int,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        forbidden_ids: Sequence[int] = (),
        eos_ids: Sequence[int] = (),
        max_length: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        config: Any = model.config
        self.model = model.eval()
        self.prefix_ids, self.suffix_ids = tuple(prefix_ids), tuple(suffix_ids)
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.first_position = _first_position(model)
        positions = int(config.max_position_embeddings) - (self.first_position or 0)
        room = positions - len(self.prefix_ids) - len(self.suffix_ids)
        if max_length is not None and max_length > room:
            raise ArgumentError(
                f"max_length: expected at most {room}, what the model has positions for, got {max_length}"
            )
        special = {mask_id, pad_id, *self.prefix_ids, *self.suffix_ids} - set(eos_ids)
        self.spec = DenoiserSpec(
            vocab_size=int(config.vocab_size),
            mask_id=mask_id,
            eos_ids=tuple(eos_ids),
            pad_id=pad_id,
            forbidden_ids=tuple(sorted({mask_id, *special, *forbidden_ids})),
            max_length=room if max_length is None else max_length,
        )

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any) -> MaskedLMDenoiser:
        """Build the denoiser of a model in memory with the facts of its tokenizer.

        Ids that the tokenizer has no token for, and its special tokens, are forbidden.

        Args:
            model: from ``AutoModelForMaskedLM``.
            tokenizer: of transformers, with a mask token.

        Raises:
            ArgumentError: the tokenizer has no mask, or more tokens than the model.
        """
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ArgumentError(
                f"tokenizer: expected one with a mask token, got {type(tokenizer).__name__} without; name the ids, "
                "MaskedLMDenoiser(model, mask_id=..., pad_id=...)"
            )
        mask_id = int(tokenizer.mask_token_id)
        around = list(tokenizer.encode(tokenizer.mask_token))
        place = around.index(mask_id)
        vocab_size, known = int(cast(Any, model.config).vocab_size), set(tokenizer.get_vocab().values())
        if max(known) >= vocab_size:
            raise ArgumentError(
                f"tokenizer: expected ids below the model's {vocab_size}, got {max(known)}; take the model's own"
            )
        return cls(
            model,
            mask_id=mask_id,
            pad_id=mask_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
            prefix_ids=around[:place],
            suffix_ids=around[place + 1 :],
            forbidden_ids=sorted({*tokenizer.all_special_ids, *(set(range(vocab_size)) - known)}),
            max_length=_tokenizer_limit(model, tokenizer, len(around) - 1),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return next(self.model.parameters()).device

    def logits(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return logits of the clean tokens, float32, shape (B, L, V) or (B, stop - start, V).

        A window is answered with regard to the whole text. ``t`` and ``cache`` are not used. Raises ArgumentError if a
        shape, dtype, id or the window does not fit, or L exceeds ``spec.max_length``.
        """
        return self.logits_and_features(tokens, valid=valid, t=t, window=window, cache=cache)[0]

    def logits_and_features(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits as :meth:`logits` does, and the model's last hidden states, which its head reads.

        They are float32 (B, L, V) and (B, L, H), or those of the window's positions.
        """
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        start, stop = self._checked(tokens, valid, window)
        ids, attends, place = self._framed(tokens, valid)
        logits, hidden = self._asked(ids, attends)
        place = place[:, start:stop].unsqueeze(-1)
        return _own_precision(logits.take_along_dim(place, 1)), _own_precision(hidden.take_along_dim(place, 1))

    def _framed(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the model reads, int64 and bool (B, T), and where in it the tokens of the canvas are, (B, L).

        Each row is its valid tokens between the special ones, then padding. Tokens that are not valid are nowhere; they
        are answered with what stands first, which means nothing.
        """
        before, after = len(self.prefix_ids), len(self.suffix_ids)
        count = valid.sum(1, keepdim=True)
        width = before + int(count.max() if len(count) else 0) + after
        place = (valid.long().cumsum(1) - 1 + before).masked_fill(~valid, width)  # beyond the end: cut off below
        ids = tokens.new_full((len(tokens), width + 1), self.spec.pad_id).scatter(1, place, tokens)[:, :width]
        column = torch.arange(width, device=tokens.device)
        for offset, id in enumerate(self.prefix_ids):
            ids[:, offset] = id
        for offset, id in enumerate(self.suffix_ids):
            ids.scatter_(1, before + count + offset, id)
        return ids, column < before + count + after, place.masked_fill(~valid, 0)

    def _asked(self, ids: Tensor, attends: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's logits and last hidden states of all that it reads."""
        if not ids.shape[1]:
            ids, attends = ids.new_full((len(ids), 1), self.spec.pad_id), attends.new_ones(len(ids), 1)
        options: dict[str, Tensor] = {"input_ids": ids, "attention_mask": attends.long()}
        known = inspect.signature(self.model.forward).parameters
        if "token_type_ids" in known:
            options["token_type_ids"] = torch.zeros_like(ids)
        if self.first_position is not None and "position_ids" in known:
            positions = torch.arange(ids.shape[1], device=ids.device) + self.first_position
            options["position_ids"] = positions.expand_as(ids)
        seen: list[Tensor] = []
        base = cast(nn.Module, self.model.base_model)
        hook = base.register_forward_hook(lambda module, given, answer: seen.append(answer[0]))
        try:
            logits: Tensor = self.model(**options).logits
        finally:
            hook.remove()
        return logits, seen[0]

    def _checked(self, tokens: Tensor, valid: Tensor, window: tuple[int, int] | None) -> tuple[int, int]:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ArgumentError(f"tokens: expected int64 (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
        if valid.shape != tokens.shape or valid.dtype != torch.bool:
            raise ArgumentError(f"valid: expected bool {tuple(tokens.shape)}, got {valid.dtype} {tuple(valid.shape)}")
        length, size = tokens.shape[1], self.spec.vocab_size
        longest = int(valid.sum(1).max()) if len(tokens) else 0
        if longest > self.spec.max_length:
            raise ArgumentError(
                f"tokens: expected at most {self.spec.max_length} of a text, which the model has positions for, got "
                f"{longest}; take shorter texts"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ArgumentError(
                f"tokens: expected ids from 0 to {size - 1}, got {int(tokens.min())} to {int(tokens.max())}"
            )
        start, stop = window if window is not None else (0, length)
        if not 0 <= start <= stop <= length:
            raise ArgumentError(f"window: expected 0 <= start <= stop <= {length}, got {window}")
        return start, stop


def load(source: Source) -> MaskedLMDenoiser:
    """Load a masked language model with its tokenizer; see :func:`~diffusion.denoisers.pretrained.load_denoiser`.

    Raises CheckpointError if a file is missing or corrupt, or weights are missing or do not fit the config.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code, "local_files_only": True}
    tokenizer = _read(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source.folder, **options))
    if not any((source.folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{source.folder}: expected the model's tokenizer ({', '.join(_TOKENIZER_FILES)}), got none; save it "
            "there, or load the model yourself and name its ids, MaskedLMDenoiser(model, mask_id=..., pad_id=...)"
        )
    spreads = source.device == "auto" or not isinstance(source.device, str | torch.device)
    if spreads:
        options["device_map"] = source.device
    model, found = _read(
        source,
        "weights",
        lambda: AutoModelForMaskedLM.from_pretrained(
            source.folder, dtype=source.dtype or "auto", output_loading_info=True, **options
        ),
    )
    wrong = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if wrong:
        raise CheckpointError(
            f"{source.folder}: expected all weights of the model, got {len(wrong)} of them not at all or of another "
            f"shape: {', '.join(wrong[:5])}; is config.json that of these weights?"
        )
    check_finite(model.state_dict(), source.folder, way_out="download the model again")
    denoiser = MaskedLMDenoiser.of(model, tokenizer)
    return denoiser if spreads else denoiser.to(cast(Any, source.device))


def _read(source: Source, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # transformers raises whatever its parts do
        raise CheckpointError(
            f"{source.folder}: {what}: expected some that transformers reads, got "
            f"{(str(error).splitlines() or [type(error).__name__])[0]:.300}; "
            "download the model again"
        ) from error


def _first_position(model: nn.Module) -> int | None:
    """Return the number of the first position, where a model counts from its padding id on, like RoBERTa; else None."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return None if module.padding_idx is None else module.padding_idx + 1
    return None


def _tokenizer_limit(model: nn.Module, tokenizer: Any, num_special: int) -> int | None:
    """Return how many tokens a text may have by the tokenizer, where that is fewer than the model has positions for."""
    positions = int(cast(Any, model.config).max_position_embeddings) - (_first_position(model) or 0)
    limit = min(int(min(getattr(tokenizer, "model_max_length", _LONGEST), _LONGEST)), positions)
    return limit - num_special


def _own_precision(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
