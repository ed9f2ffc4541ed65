"""Conformance kit: whoever writes a denoiser subclasses a test case, supplies a constructor, and inherits the tests."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from diffusion.denoisers.base import Denoiser, DenoiserSpec

_PADDING = 2
_LEAST_LOG_PROB = -14.0  # so that one impossible token does not outvote all others


class DenoiserTestCase:
    """Tests a denoiser: what its logits look like, what they may depend on, and what they predict.

    Subclass it in a test module, under a name that pytest collects, and supply :meth:`make_denoiser`::

        class TestMyDenoiser(df.testing.DenoiserTestCase):
            def make_denoiser(self):
                return MyDenoiser()

    The denoiser is made once per class. Any denoiser can be tested, trained or not; :meth:`examples` of what a trained
    one has learnt make the difference between logits that are aligned with their tokens and logits shifted by one. To
    leave a test out, set it to None in the subclass and say why.

    Methods to override:
        make_denoiser: required.
        examples: int64 (N, L), texts without masks of the kind that the denoiser was trained on, not all alike.
        cached_logits: what the denoiser answers through its own cache, if it has one.

    Attributes to override:
        length: L of the texts that are tried, at most; ``spec.max_length`` bounds it as well.
        batch_size: B >= 2.
        tolerance: how far equal log-probabilities may be apart, absolutely and relatively.
        window_sees: what a denoiser looks at when it is asked for a window: "everything": the answer is a slice of the
            answer without one; "up to its end": a slice of the answer for the text cut off where the window ends;
            "its choice": neither.
    """

    length: ClassVar[int] = 8
    batch_size: ClassVar[int] = 4
    tolerance: ClassVar[float] = 1e-4
    window_sees: ClassVar[Literal["everything", "up to its end", "its choice"]] = "everything"

    def make_denoiser(self) -> Denoiser:
        """Return the denoiser under test."""
        raise NotImplementedError(
            f"{type(self).__name__}.make_denoiser(self): expected a method that returns a Denoiser"
        )

    def examples(self) -> Tensor | None:
        """Return texts that the denoiser knows, int64 (N, L); None: random ids are tried, and it may know nothing."""
        return None

    def cached_logits(self, denoiser: Denoiser, tokens: Tensor, window: tuple[int, int]) -> Tensor | None:
        """Return the logits of a window (B, stop - start, V) by way of the denoiser's cache; None: it has none.

        Args:
            denoiser: under test.
            tokens: int64 (B, L), with masks.
            window: (start, stop), where there are masks.
        """
        return None

    def test_it_is_a_denoiser(self) -> None:
        """It has a spec and logits, and the ids of the spec exist."""
        assert isinstance(self.denoiser, Denoiser)
        spec = self.denoiser.spec
        assert isinstance(spec, DenoiserSpec)
        ids = {spec.mask_id, spec.pad_id, *spec.eos_ids, *spec.forbidden_ids}
        assert all(0 <= id < spec.vocab_size for id in ids)
        assert spec.max_length >= 1

    def test_the_mask_is_forbidden_and_some_id_is_not(self) -> None:
        """A mask is never generated, and something can be."""
        spec = self.denoiser.spec
        assert spec.mask_id in spec.forbidden_ids
        assert len(set(spec.forbidden_ids)) < spec.vocab_size

    def test_there_is_a_finite_float32_row_of_logits_per_position(self) -> None:
        """Shape (B, L, V), for texts of every length, all masked, without masks, and for a single row."""
        spec = self.denoiser.spec
        for length in range(1, self._length + 1):
            for tokens in (self._canvases[:, :length], self._texts[:1, :length], self._all_masks[:, :length]):
                logits = self.denoiser.logits(tokens)
                assert logits.shape == (len(tokens), length, spec.vocab_size)
                assert logits.dtype == torch.float32
                assert bool(logits.isfinite().all()), "logits: expected finite numbers, also at forbidden ids"

    def test_logits_are_where_the_tokens_are(self) -> None:
        """The device of the logits is that of the tokens."""
        assert self.denoiser.logits(self._canvases).device == self._canvases.device

    def test_the_same_question_has_the_same_answer(self) -> None:
        """Nothing is drawn at random: no dropout in evaluation, no sampled masks."""
        first = self._log_probs(self._canvases)
        for _ in range(3):
            self._assert_close(self._log_probs(self._canvases), first)

    def test_an_answer_does_not_depend_on_the_questions_before(self) -> None:
        """What is remembered belongs to the tokens, not to the tensor that they lay in."""
        first, second = self._canvases, self._canvases.roll(1, 0)
        expected = self._log_probs(first), self._log_probs(second)
        buffer = first.clone()
        self._assert_close(self._log_probs(buffer), expected[0])
        buffer.copy_(second)
        self._assert_close(self._log_probs(buffer), expected[1])
        self._assert_close(self._log_probs(first), expected[0])

    def test_the_layout_in_memory_does_not_matter(self) -> None:
        """Transposed tokens, a slice of a longer text: the values alone count."""
        transposed = self._canvases.t().contiguous().t()
        self._assert_close(self._log_probs(transposed), self._log_probs(self._canvases))

    def test_rows_do_not_see_each_other(self) -> None:
        """A row alone, a row among others, and rows in another order have the same logits."""
        together = self._log_probs(self._canvases)
        self._assert_close(self._log_probs(self._canvases.flip(0)).flip(0), together)
        for row in range(len(self._canvases)):
            self._assert_close(self._log_probs(self._canvases[row : row + 1]), together[row : row + 1])

    def test_padding_at_the_left_changes_nothing(self) -> None:
        """A padded text has the logits of the text, whatever the padding of the other rows."""
        tokens, padded, valid = self._padded()
        expected = self._log_probs(tokens)
        self._assert_close(self._log_probs(padded, valid=valid)[:, _PADDING:], expected)
        full = self._canvases[:1, : padded.shape[1]]
        mixed = torch.cat([padded, full]), torch.cat([valid, torch.ones_like(full, dtype=torch.bool)])
        found = self._log_probs(mixed[0], valid=mixed[1])
        self._assert_close(found[:-1, _PADDING:], expected)
        self._assert_close(found[-1:], self._log_probs(full))

    def test_tokens_that_are_not_valid_are_not_read(self) -> None:
        """Whatever stands at padding, the logits of the text are the same, and all are finite."""
        _, padded, valid = self._padded()
        expected = self._log_probs(padded, valid=valid)[:, _PADDING:]
        for id in (self.denoiser.spec.mask_id, self._allowed[0], self._allowed[-1]):
            logits = self.denoiser.logits(padded.masked_fill(~valid, id), valid=valid)
            assert bool(logits.isfinite().all()), "logits: expected finite numbers at padding too"
            self._assert_close(torch.log_softmax(logits.detach(), -1)[:, _PADDING:], expected)

    def test_everything_is_valid_by_default(self) -> None:
        """No ``valid`` is ``valid`` all True."""
        valid = torch.ones_like(self._canvases, dtype=torch.bool)
        self._assert_close(self._log_probs(self._canvases, valid=valid), self._log_probs(self._canvases))

    def test_arguments_are_left_as_they_are(self) -> None:
        """Nothing is written into ``tokens``, ``valid`` or ``t``."""
        _, padded, valid = self._padded()
        t = torch.full((len(padded),), 0.5, device=padded.device)
        before = padded.clone(), valid.clone(), t.clone()
        self.denoiser.logits(padded, valid=valid, t=t)
        assert all(torch.equal(now, then) for now, then in zip((padded, valid, t), before, strict=True))

    def test_a_time_is_accepted(self) -> None:
        """``t`` of each sequence may be given; the answer has the same form, and rows keep to themselves."""
        times = torch.linspace(0.05, 0.95, len(self._canvases), device=self._canvases.device)
        logits = self._log_probs(self._canvases, t=times)
        assert logits.shape == (*self._canvases.shape, self.denoiser.spec.vocab_size)
        assert bool(logits.isfinite().all())
        self._assert_close(self._log_probs(self._canvases[1:2], t=times[1:2]), logits[1:2])

    def test_a_window_has_the_rows_of_its_positions(self) -> None:
        """Shape (B, stop - start, V), equal to what ``window_sees`` says; the whole text is a window too."""
        length = self._length
        whole = self._log_probs(self._canvases)
        self._assert_close(self._log_probs(self._canvases, window=(0, length)), whole)
        for start in range(length):
            for stop in {start + 1, (start + length + 1) // 2, length}:
                found = self._log_probs(self._canvases, window=(start, stop))
                assert found.shape == (len(self._canvases), stop - start, self.denoiser.spec.vocab_size)
                if self.window_sees == "everything":
                    self._assert_close(found, whole[:, start:stop])
                elif self.window_sees == "up to its end":
                    self._assert_close(found, self._log_probs(self._canvases[:, :stop])[:, start:])

    def test_a_window_may_come_with_padding(self) -> None:
        """With padded rows a window is the same slice."""
        tokens, padded, valid = self._padded()
        for start in range(tokens.shape[1]):
            window = start + _PADDING, padded.shape[1]
            expected = self._log_probs(tokens, window=(start, tokens.shape[1]))
            self._assert_close(self._log_probs(padded, valid=valid, window=window), expected)

    def test_logits_predict_the_token_at_their_own_position(self) -> None:
        """The true token of a masked position has a higher mean log-probability there than one position beside it."""
        if self.examples() is None or self._length < 2:
            pytest.skip("supply examples() of at least two tokens, texts that the denoiser knows")
        texts, length = self._texts, self._length
        hidden = torch.eye(length, dtype=torch.bool, device=texts.device).repeat(len(texts), 1)  # one mask per row
        tokens = texts.repeat_interleave(length, 0).masked_fill(hidden, self.denoiser.spec.mask_id)
        logits = self.denoiser.logits(tokens).detach()
        logits[..., list(self.denoiser.spec.forbidden_ids)] = -torch.inf
        log_probs = torch.log_softmax(logits, -1).clamp_min(_LEAST_LOG_PROB).unflatten(0, (len(texts), length))
        place = torch.arange(length, device=texts.device)
        for shift in (-1, 1):
            inside = place[(place + shift >= 0) & (place + shift < length)]
            score = {
                offset: log_probs[:, inside, inside + offset].gather(2, texts[:, inside].unsqueeze(-1)).mean()
                for offset in (0, shift)
            }
            assert score[0] > score[shift], (
                f"the token at position i is predicted by logits[:, i{shift:+d}] (mean log-probability "
                f"{score[shift]:.3f}) better than by logits[:, i] ({score[0]:.3f}): shift them inside the denoiser"
            )

    def test_gradients_reach_the_parameters(self) -> None:
        """Logits are differentiable in the weights that are trained, also with padding; gradients are finite."""
        module = self.denoiser
        trained = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
        if not trained:
            pytest.skip("it has no parameters that are trained")
        _, padded, valid = self._padded()
        loss = torch.log_softmax(self.denoiser.logits(padded, valid=valid), -1)[..., self._allowed[0]].sum()
        gradients = [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(bool((gradient != 0).any()) for gradient in gradients)

    def test_a_call_leaves_the_module_as_it_is(self) -> None:
        """No weight, buffer or mode changes."""
        module = self.denoiser
        if not isinstance(module, nn.Module):
            pytest.skip("it is no torch module")
        mode, before = module.training, {name: value.clone() for name, value in module.state_dict().items()}
        self.denoiser.logits(self._canvases)
        after = module.state_dict()
        assert module.training == mode
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_the_cache_changes_nothing(self) -> None:
        """Logits by way of :meth:`cached_logits` are those without a cache, for every window."""
        for start in range(self._length):
            window = start, self._length
            cached = self.cached_logits(self.denoiser, self._canvases, window)
            if cached is None:
                pytest.skip("supply cached_logits(), if the denoiser has a cache")
            self._assert_close(torch.log_softmax(cached.detach(), -1), self._log_probs(self._canvases, window=window))

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser under test, made once per class."""
        cls = type(self)
        if "_made" not in vars(cls):
            cls._made = self.make_denoiser()  # type: ignore[attr-defined]
        made: Denoiser = vars(cls)["_made"]
        return made

    @property
    def _length(self) -> int:
        examples = self.examples()
        given = self.length if examples is None else examples.shape[1]
        return min(self.length, given, self.denoiser.spec.max_length)

    @property
    def _allowed(self) -> list[int]:
        """The ids that random texts are made of: words, as far as one can tell."""
        spec = self.denoiser.spec
        words = set(range(spec.vocab_size)) - set(spec.forbidden_ids)
        return sorted(words - {spec.pad_id, *spec.eos_ids}) or sorted(words)

    @property
    def _texts(self) -> Tensor:
        """Texts without masks, int64: all examples, or B random texts; (N, L)."""
        examples = self.examples()
        if examples is None:
            drawn = torch.randint(len(self._allowed), (self.batch_size, self._length), generator=_generator())
            examples = torch.tensor(self._allowed)[drawn]
        device: torch.device | str = getattr(self.denoiser, "device", "cpu")
        return examples[:, : self._length].to(device)

    @property
    def _all_masks(self) -> Tensor:
        return torch.full_like(self._texts[: self.batch_size], self.denoiser.spec.mask_id)

    @property
    def _canvases(self) -> Tensor:
        """Texts with masks, (B, L): the first row is all masks, others have some, the last one has none."""
        texts = self._texts
        texts = texts[torch.arange(self.batch_size) % len(texts)]
        ratio = torch.linspace(1, 0, self.batch_size).unsqueeze(1)
        hidden = torch.rand(texts.shape, generator=_generator()) < ratio
        return texts.masked_fill(hidden.to(texts.device), self.denoiser.spec.mask_id)

    def _padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return texts with masks (B, L - 2), the same with two tokens of padding at the left, and what is valid."""
        length = self._length - _PADDING
        if length < 1:
            pytest.skip(f"texts of {self._length} tokens leave no room for padding")
        tokens = self._canvases[:, :length]
        padding = torch.full_like(tokens[:, :1], self.denoiser.spec.pad_id).expand(-1, _PADDING)
        padded = torch.cat([padding, tokens], 1)
        valid = torch.arange(padded.shape[1], device=tokens.device) >= _PADDING
        return tokens, padded, valid.expand(padded.shape).contiguous()

    def _log_probs(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,  # shape: (B,)
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return normalised log-probabilities, (B, L or stop - start, V)."""
        with torch.no_grad():
            return torch.log_softmax(self.denoiser.logits(tokens, valid=valid, t=t, window=window), -1)

    def _assert_close(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, atol=self.tolerance, rtol=self.tolerance)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
