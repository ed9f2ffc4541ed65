"""The conformance kit of denoisers is able to fail: mistakes put into a denoiser on purpose are caught."""

import pytest
import torch
from torch import nn

from diffusion.testing import DenoiserTestCase, worlds

WORLD = worlds.hidden_markov(5, seed=1)


def examples(self):
    return WORLD.sample(32, generator=torch.Generator().manual_seed(0))


class Correct(nn.Module):
    """A module around a Bayes-optimal denoiser, with a weight and a cache; every mistake below is put into one."""

    def __init__(self):
        super().__init__()
        self.world = WORLD
        self.spec = self.world.spec
        self.bayes = self.world.denoiser()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("num_calls", torch.zeros(()))

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return self.scale * self.bayes.logits(tokens, valid=valid, t=t, window=window)


class WithoutSpec(Correct):
    def __init__(self):
        super().__init__()
        del self.spec


class WithForeignIds(Correct):
    def __init__(self):
        super().__init__()
        object.__setattr__(self.spec, "pad_id", 99)


class ThatGeneratesMasks(Correct):
    def __init__(self):
        super().__init__()
        object.__setattr__(self.spec, "forbidden_ids", ())


class ThatForbidsAll(Correct):
    def __init__(self):
        super().__init__()
        object.__setattr__(self.spec, "forbidden_ids", tuple(range(self.spec.vocab_size)))


class Changed(Correct):
    """Changes the logits of all positions (B, L, V), given the tokens, before the window is cut out."""

    def changed(self, logits, tokens, valid):
        raise NotImplementedError

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        whole = self.changed(super().logits(tokens, valid=valid), tokens, valid)
        start, stop = window or (0, tokens.shape[1])
        return whole[:, start:stop]


class InHalfPrecision(Changed):
    def changed(self, logits, tokens, valid):
        return logits.bfloat16()


class WithoutForbiddenLogits(Changed):
    def changed(self, logits, tokens, valid):
        return logits.index_fill(2, torch.tensor([self.spec.mask_id]), -torch.inf)


class WithoutMask(Changed):
    def changed(self, logits, tokens, valid):
        return logits[..., :-1]


class ForOneRowOnly(Changed):
    def changed(self, logits, tokens, valid):
        return logits[:1]


class OnAnotherDevice(Changed):
    def changed(self, logits, tokens, valid):
        return logits.to("meta")


class ShiftedToTheRight(Changed):
    def changed(self, logits, tokens, valid):
        return logits.roll(1, 1)


class ShiftedToTheLeft(Changed):
    def changed(self, logits, tokens, valid):
        return logits.roll(-1, 1)


class WithDropout(Changed):
    def changed(self, logits, tokens, valid):
        return nn.functional.dropout(logits, 0.1)


class ThatCounts(Changed):
    def changed(self, logits, tokens, valid):
        self.num_calls += 1
        return logits * (1 + 0.01 * self.num_calls)


class NormalisedOverTheBatch(Changed):
    def changed(self, logits, tokens, valid):
        return logits - logits.mean(0)


class WithTimeFromTheBatch(Changed):
    def changed(self, logits, tokens, valid):
        return logits * (1 + (tokens == self.spec.mask_id).float().mean())


class WithAbsolutePositions(Changed):
    def changed(self, logits, tokens, valid):
        return logits + torch.arange(tokens.shape[1]).unsqueeze(1) * torch.arange(self.spec.vocab_size) * 0.1


class ThatReadsPadding(Changed):
    def changed(self, logits, tokens, valid):
        return logits * (1 + tokens[:, :1].unsqueeze(2) * (0.1 if valid is not None and not valid.all() else 0))


class InfiniteAtPadding(Changed):
    def changed(self, logits, tokens, valid):
        return logits if valid is None else logits.masked_fill(~valid.unsqueeze(-1), torch.nan)


class WithAnotherDefaultOfValid(Changed):
    def changed(self, logits, tokens, valid):
        return logits if valid is None else logits * 1.1


class OfMemoryLayout(Changed):
    def changed(self, logits, tokens, valid):
        return logits * (1.0 if tokens.is_contiguous() else 1.1)


class OfRawMemory(Correct):
    """Keeps answers by the address of the tokens."""

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        self.__dict__.setdefault("kept", {})
        key = tokens.data_ptr(), tokens.shape, window, valid is None
        if key not in self.kept:
            self.kept[key] = super().logits(tokens, valid=valid, window=window), tokens
        return self.kept[key][0]


class ThatIgnoresValid(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return super().logits(tokens, window=window)


class ThatIgnoresWindows(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return super().logits(tokens, valid=valid)


class ThatSeesTheWindowOnly(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        hidden = torch.ones(tokens.shape[1], dtype=torch.bool)
        hidden[start:stop] = False
        return super().logits(tokens.masked_fill(hidden, self.spec.mask_id), valid=valid, window=window)


class WithWindowsOffByOne(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        whole = super().logits(tokens, valid=valid)
        start, stop = window or (0, tokens.shape[1])
        return whole.roll(1, 1)[:, start:stop] if start else whole[:, start:stop]


class WithWindowsCountedFromTheText(Correct):
    """Cuts the window out as if there were no padding."""

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        whole = super().logits(tokens, valid=valid)
        start, stop = window or (0, tokens.shape[1])
        return whole[:, start - 1 : stop - 1] if valid is not None and start else whole[:, start:stop]


class ThatWritesIntoTokens(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        found = super().logits(tokens, valid=valid, window=window)
        tokens[:, 0] = self.spec.mask_id
        tokens[0, 0] = 0
        return found


class ThatWritesIntoTime(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        if t is not None:
            t.clamp_(max=0.1)
        return super().logits(tokens, valid=valid, window=window)


class WithoutTime(Correct):
    def logits(self, tokens, *, valid=None, window=None, cache=None):
        return super().logits(tokens, valid=valid, window=window)


class WithTheMeanTime(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return super().logits(tokens, valid=valid, window=window) * (1 if t is None else 1 + t.mean())


class WithoutGradients(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        frozen = super().logits(tokens, valid=valid, window=window).detach()
        return frozen + 0 * self.scale


class WithGradientsThatAreNotFinite(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return super().logits(tokens, valid=valid, window=window) + (1 - self.scale).clamp_min(0).sqrt()


class ThatSwitchesToTraining(Correct):
    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        self.train(not self.training)
        return super().logits(tokens, valid=valid, window=window)


MISTAKES = [
    ("test_it_is_a_denoiser", WithoutSpec),
    ("test_it_is_a_denoiser", WithForeignIds),
    ("test_the_mask_is_forbidden_and_some_id_is_not", ThatGeneratesMasks),
    ("test_the_mask_is_forbidden_and_some_id_is_not", ThatForbidsAll),
    ("test_there_is_a_finite_float32_row_of_logits_per_position", InHalfPrecision),
    ("test_there_is_a_finite_float32_row_of_logits_per_position", WithoutForbiddenLogits),
    ("test_there_is_a_finite_float32_row_of_logits_per_position", WithoutMask),
    ("test_there_is_a_finite_float32_row_of_logits_per_position", ForOneRowOnly),
    ("test_logits_are_where_the_tokens_are", OnAnotherDevice),
    ("test_the_same_question_has_the_same_answer", WithDropout),
    ("test_the_same_question_has_the_same_answer", ThatCounts),
    ("test_an_answer_does_not_depend_on_the_questions_before", OfRawMemory),
    ("test_an_answer_does_not_depend_on_the_questions_before", ThatCounts),
    ("test_the_layout_in_memory_does_not_matter", OfMemoryLayout),
    ("test_rows_do_not_see_each_other", NormalisedOverTheBatch),
    ("test_rows_do_not_see_each_other", WithTimeFromTheBatch),
    ("test_padding_at_the_left_changes_nothing", WithAbsolutePositions),
    ("test_padding_at_the_left_changes_nothing", ThatIgnoresValid),
    ("test_padding_at_the_left_changes_nothing", ThatReadsPadding),
    ("test_tokens_that_are_not_valid_are_not_read", ThatReadsPadding),
    ("test_tokens_that_are_not_valid_are_not_read", ThatIgnoresValid),
    ("test_tokens_that_are_not_valid_are_not_read", InfiniteAtPadding),
    ("test_everything_is_valid_by_default", WithAnotherDefaultOfValid),
    ("test_arguments_are_left_as_they_are", ThatWritesIntoTokens),
    ("test_arguments_are_left_as_they_are", ThatWritesIntoTime),
    ("test_a_time_is_accepted", WithoutTime),
    ("test_a_time_is_accepted", WithTheMeanTime),
    ("test_a_window_has_the_rows_of_its_positions", ThatIgnoresWindows),
    ("test_a_window_has_the_rows_of_its_positions", ThatSeesTheWindowOnly),
    ("test_a_window_has_the_rows_of_its_positions", WithWindowsOffByOne),
    ("test_a_window_may_come_with_padding", WithWindowsCountedFromTheText),
    ("test_logits_predict_the_token_at_their_own_position", ShiftedToTheLeft),
    ("test_logits_predict_the_token_at_their_own_position", ShiftedToTheRight),
    ("test_gradients_reach_the_parameters", WithoutGradients),
    ("test_gradients_reach_the_parameters", WithGradientsThatAreNotFinite),
    ("test_a_call_leaves_the_module_as_it_is", ThatCounts),
    ("test_a_call_leaves_the_module_as_it_is", ThatSwitchesToTraining),
]


def case_of(make, **members):
    """Return a test case of a denoiser, which pytest does not collect."""
    kit = {"make_denoiser": lambda self: make(), "examples": examples}
    return type("Case", (DenoiserTestCase,), {**kit, **members})()


@pytest.mark.parametrize(("test", "mistake"), MISTAKES, ids=[f"{test}-{m.__name__}" for test, m in MISTAKES])
def test_a_broken_denoiser_is_caught(test, mistake):
    getattr(case_of(Correct), test)()
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        getattr(case_of(mistake), test)()


def cached(self, denoiser, tokens, window):
    return denoiser.logits(tokens)[:, window[0] : window[1]]


def stale(self, denoiser, tokens, window):
    """The cache has seen the text without its masks."""
    return denoiser.logits(tokens.masked_fill(tokens == denoiser.spec.mask_id, 0), window=window)


def test_a_stale_cache_is_caught():
    test = "test_the_cache_changes_nothing"
    getattr(case_of(Correct, cached_logits=cached), test)()
    with pytest.raises(AssertionError):
        getattr(case_of(Correct, cached_logits=stale), test)()


def test_every_test_of_the_kit_is_known_to_fail_somewhere():
    tests = {name for name in dir(DenoiserTestCase) if name.startswith("test_")}
    assert tests == {test for test, _ in MISTAKES} | {"test_the_cache_changes_nothing"}


def test_an_unfinished_test_case_says_what_is_missing():
    with pytest.raises(
        NotImplementedError, match=r"Case.make_denoiser\(self\): expected a method that returns a Denoiser"
    ):
        type("Case", (DenoiserTestCase,), {})().test_it_is_a_denoiser()


def test_the_denoiser_is_made_once_per_class():
    made = []

    class Case(DenoiserTestCase):
        def make_denoiser(self):
            made.append(type(self))
            return Correct()

    class Other(Case):
        pass

    Case().test_it_is_a_denoiser()
    Case().test_it_is_a_denoiser()
    Other().test_it_is_a_denoiser()
    assert made == [Case, Other]
