"""A few-step curve that was killed goes on where it stopped, and what belongs to something else is measured anew."""

import json
import shutil

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.evaluation import blocks
from diffusion.evaluation.few_step_curve import few_step_curve
from diffusion.evaluation.kept_points import identity_of
from diffusion.testing import worlds

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = worlds.random(3, length=3, concentration=1.0)
V = WORLD.spec.vocab_size
DATA, REST = (WORLD.sample(n, generator=torch.Generator().manual_seed(n)) for n in (24, 30))
NUM_POINTS = 1 + 2 * 2 + 2  # true text; one and two steps without and with the circuit; threshold and bound


def head(seed=0, **options):
    return df.CoupledHead(ct.compile(ct.structures.hmm(3, 2, V), seed=seed), **options)


def curve(folder=None, **changes):
    given = {"denoiser": WORLD.denoiser(), "head": head(), "data": DATA, "reference": REST, "steps": (1, 2)} | changes
    return few_step_curve(folder=folder, **given)


class Killed(BaseException):
    pass


@pytest.fixture
def generated(monkeypatch):
    """Count the settings that are decoded; raise once there are ``limit``."""
    calls, generate = [], blocks.generate

    def counting(*arguments, **options):
        if len(calls) == counting.limit:
            raise Killed
        calls.append((options["num_steps"], options["head"] is not None, options["config"].strategy))
        return generate(*arguments, **options)

    counting.limit = None
    counting.calls = calls
    monkeypatch.setattr(blocks, "generate", counting)
    return counting


def test_a_killed_run_goes_on_where_it_stopped(generated, tmp_path):
    whole = curve()
    every = list(generated.calls)
    assert len(every) == NUM_POINTS - 1
    for limit in range(NUM_POINTS - 1):
        generated.calls.clear()
        generated.limit = limit
        with pytest.raises(Killed):
            curve(tmp_path / str(limit))
        assert len(list((tmp_path / str(limit)).iterdir())) == 1 + limit  # the true text first
        generated.limit = None
        generated.calls.clear()
        assert curve(tmp_path / str(limit)) == whole
        assert generated.calls == every[limit:]
    generated.calls.clear()
    assert curve(tmp_path / "0") == whole
    assert not generated.calls
    more = curve(tmp_path / "0", steps=(1, 2, 3))
    assert generated.calls == [(3, False, "entropy"), (3, True, "entropy")]
    assert [point for point in more.points if point.num_steps != 3] == list(whole.points)


def changed_head():
    other = head()
    with torch.no_grad():
        next(other.parameters()).add_(0.25)
    return other


class Warmer:
    """The same weights, asked otherwise."""

    def __init__(self, denoiser):
        self.denoiser, self.spec = denoiser, denoiser.spec

    def logits(self, tokens, **options):
        return self.denoiser.logits(tokens, **options) / 1.5


CHANGES = {
    "denoiser": lambda: {"denoiser": worlds.random(4, length=3, concentration=1.0).denoiser()},
    "what the denoiser says": lambda: {"denoiser": Warmer(WORLD.denoiser())},
    "head's weights": lambda: {"head": changed_head()},
    "head's normalisation": lambda: {"head": head(normalization="local")},
    "head's conditioners": lambda: {"head": head(calibration=df.NoiseCalibration(V))},
    "data": lambda: {"data": DATA.flip(0)},
    "number of texts": lambda: {"data": DATA[:-1]},
    "reference": lambda: {"reference": REST[1:]},
    "seed": lambda: {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_points_of_something_else_are_measured_anew(change, generated, tmp_path):
    curve(tmp_path)
    generated.calls.clear()
    changes = CHANGES[change]()
    assert curve(tmp_path, **changes) == curve(**changes)
    assert len(generated.calls) == 2 * (NUM_POINTS - 1)


def test_another_mode_of_decoding_is_measured_anew(generated, tmp_path):
    curve(tmp_path)
    generated.calls.clear()
    assert curve(tmp_path, decode="latent") == curve(decode="latent")
    assert len(generated.calls) == 2 * (NUM_POINTS - 1)


def test_networks_are_told_apart_by_every_weight(tmp_path):
    """A change of one weight that no best token notices."""
    config = df.TransformerConfig(
        vocab_size=V,
        mask_id=V - 1,
        pad_id=0,
        eos_id=0,
        context_length=0,
        block_length=3,
        width=8,
        num_layers=1,
        num_heads=1,
    )
    network = df.TransformerDenoiser(config, seed=0).eval()
    one = identity_of(network, None, DATA)
    assert one == identity_of(df.TransformerDenoiser(config, seed=0).eval(), None, DATA)
    with torch.no_grad():
        network.output_bias[0] += 1e-6
    assert one != identity_of(network, None, DATA)


def test_damaged_points_are_measured_anew(generated, tmp_path):
    whole = curve(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) == NUM_POINTS
    place = tmp_path / "damaged"
    shutil.copytree(tmp_path / "whole", place)
    first, second, third, fourth, *_ = (place / name for name in names)
    first.write_text(first.read_text().replace("1", "2"))
    second.write_bytes(second.read_bytes()[:-9])
    third.write_text("[1]")
    content = json.loads(fourth.read_text())
    content["result"]["num_calls"] = 7
    fourth.write_text(json.dumps(content))
    generated.calls.clear()
    assert curve(place) == whole
    assert len(generated.calls) in (3, 4)  # one of them may be the true text
    generated.calls.clear()
    assert curve(place) == whole
    assert not generated.calls
