"""Long work with a denoiser stops before its next call where it is asked to, says how it goes on, and loses nothing."""

import numpy as np
import pytest
import torch

import circuits as ct
import diffusion as df
from circuits.progress import check_stop, forget_stop, progress_bar, request_stop, stoppable
from diffusion.evaluation import few_step_curve, few_step_quality, misspecification_gap
from diffusion.testing import worlds

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = worlds.random(3, length=3, concentration=1.0)
DATA, REST = (WORLD.sample(n, generator=torch.Generator().manual_seed(n)) for n in (24, 30))


def head():
    return df.CoupledHead(ct.compile(ct.structures.hmm(3, 2, WORLD.spec.vocab_size), seed=0))


def cached(denoiser, folder):
    cache = df.cache_logits(denoiser, DATA, folder, block_length=3, batch_size=8, progress=False)
    return np.array(cache.log_q).tobytes(), np.array(cache.masked).tobytes()


def gap(denoiser, folder):
    return misspecification_gap(denoiser, head(), DATA, mask_ratios=(0.3, 0.7, 1.0), batch_size=12, folder=folder)


def quality(denoiser, folder):
    def judge(prompt, generated):
        return bool(generated[0] == generated[1])

    prompts = DATA[:, :0]
    return few_step_quality(denoiser, head(), prompts, judge, criterion="equal", steps=(1, 2), folder=folder)


def curve(denoiser, folder):
    return few_step_curve(denoiser, head(), DATA, REST, steps=(1, 2), folder=folder)


WORK = {
    "caching logits": (cached, r"of 24 parts; the same call goes on from .*kept"),
    "measuring the gap": (gap, r"of 18 parts; the same call goes on from what is kept in .*kept"),
    "generating": (quality, r"of 4 parts; the same call goes on from what is kept in .*kept"),
    "measuring the few-step curve": (curve, r"of 7 parts; the same call goes on from what is kept in .*kept"),
}


@pytest.fixture
def denoiser(monkeypatch):
    """A denoiser that counts its calls, and asks long work to stop in call number ``stop_in``."""
    made = WORLD.denoiser()
    logits = made.logits

    def counted(*arguments, **options):
        made.num_calls += 1
        if made.num_calls == made.stop_in:
            request_stop("stopped by SIGTERM")
        return logits(*arguments, **options)

    made.num_calls, made.stop_in = 0, None
    monkeypatch.setattr(made, "logits", counted)
    yield made
    forget_stop()


@pytest.mark.parametrize("title", WORK)
def test_it_stops_before_the_next_call_and_goes_on_to_the_same_result(title, denoiser, tmp_path):
    work, way_on = WORK[title]
    whole = work(denoiser, tmp_path / "whole")
    of_all = denoiser.num_calls
    denoiser.num_calls, denoiser.stop_in = 0, of_all - 1
    with pytest.raises(ct.Interrupted, match=f"^{title}: stopped by SIGTERM after [1-9][0-9]* {way_on}$"):
        work(denoiser, tmp_path / "kept")
    assert denoiser.num_calls == denoiser.stop_in
    forget_stop()
    denoiser.num_calls, denoiser.stop_in = 0, None
    assert work(denoiser, tmp_path / "kept") == whole
    assert denoiser.num_calls < of_all - 1


def test_work_that_looks_itself_is_not_ended_by_what_is_within_it():
    """Learning writes its checkpoint first; where nobody looks, nothing stops at all."""
    request_stop("enough")
    try:
        check_stop()
        with progress_bar("outer", 3, enabled=False, completed=1, way_on="go on"):
            with stoppable():
                check_stop()
            with pytest.raises(ct.Interrupted, match=r"^outer: enough after 1 of 3 parts; go on$"):
                check_stop()
    finally:
        forget_stop()


@pytest.mark.parametrize("setting", [{"decoding": {"num_steps": 2}}, {"vocabulary": [2, 1, 0]}])
def test_what_is_kept_belongs_to_all_of_a_heads_settings(setting):
    from diffusion.evaluation.kept_points import identity_of

    pc, denoiser = ct.compile(ct.structures.hmm(3, 2, 3), seed=0), WORLD.denoiser()
    one, other = (identity_of(denoiser, df.CoupledHead(pc, **given), DATA)["head"] for given in ({}, setting))
    assert one != other
