"""Joint training: the coupled loss's gradient reaches circuit and denoiser, and an interrupted run ends as it would."""

from dataclasses import replace

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.training import joint

pytestmark = pytest.mark.usefixtures("one_thread")
V, MASK, L = 4, 3, 2
CITIES = torch.tensor([[0, 1], [2, 2]])  # two words that determine each other
CONFIG = df.JointTraining(
    steps=12, batch_size=16, learning_rate=0.05, denoiser_learning_rate=0.01, validate_every=6, checkpoint_every=5
)


class Independent(torch.nn.Module):
    """A denoiser that knows how frequent the words of each position are, and nothing else."""

    spec = df.DenoiserSpec(vocab_size=V, mask_id=MASK, eos_ids=(), pad_id=MASK, forbidden_ids=(MASK,), max_length=L)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(L, V))

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return self.weight.expand(len(tokens), L, V)


def models(num_states=3):
    return Independent(), df.CoupledHead(ct.compile(ct.structures.hmm(L, num_states, V), seed=0))


def windows(count=64):
    return CITIES.repeat(count // 2, 1)


def fit(denoiser, head, config=CONFIG, **options):
    return df.fit_jointly(denoiser, head, windows(), windows(8), config=config, progress=False, **options)


def parameters(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def test_the_gradient_is_that_of_the_enumerated_loss():
    """p_hat(x) = p(x) q(x) / sum_y p(y) q(y), all masked, in float64 by finite differences in every logit."""
    denoiser, _ = models()
    denoiser = denoiser.double()
    with torch.no_grad():
        denoiser.weight.copy_(torch.randn(L, V, generator=torch.Generator().manual_seed(1)))
    head = df.CoupledHead(ct.compile(ct.structures.hmm(L, 3, V), seed=0, dtype=torch.float64))
    joint_log_p = ct.testing.enumerate_joint(head.pc).detach()

    def loss(weight):
        q = weight.clone()
        q[:, MASK] = -torch.inf
        log_q = torch.log_softmax(q, -1)
        scores = joint_log_p + log_q[0, :, None] + log_q[1, None, :]
        log_p_hat = scores - scores.flatten().logsumexp(0)
        return -log_p_hat[CITIES[:, 0], CITIES[:, 1]].mean()

    masked = torch.ones(2, L, dtype=torch.bool)
    said = df.Prediction.ask(denoiser, torch.full((2, L), MASK))
    found = -head.distribution(said, CITIES, masked).log_prob(CITIES).mean()
    (gradient,) = torch.autograd.grad(found, denoiser.weight)
    assert found.item() == pytest.approx(loss(denoiser.weight.detach()).item(), abs=1e-12)
    for position, token in ((0, 0), (0, 2), (1, 1), (1, 2)):
        step = torch.zeros(L, V, dtype=torch.float64)
        step[position, token] = 1e-6
        weight = denoiser.weight.detach()
        slope = (loss(weight + step) - loss(weight - step)) / 2e-6
        assert gradient[position, token].item() == pytest.approx(slope.item(), abs=1e-8)


def test_both_are_moved_and_the_loss_falls_below_what_independent_words_cost():
    """Words that determine each other: the coupled model gives the two cities all probability, not half of it."""
    denoiser, head = models()
    before = parameters(denoiser), parameters(head)
    curve = fit(
        denoiser,
        head,
        replace(CONFIG, steps=50, batch_size=32, learning_rate=0.3, denoiser_learning_rate=0.1, validate_every=10),
    )
    for first, module in zip(before, (denoiser, head), strict=True):
        assert any(not torch.equal(old, new) for old, new in zip(first, parameters(module), strict=True))
    assert curve.held_out[-1] < 0.3  # independent words cost log 2 each; at best it is log(2) / 4 on average
    blank = torch.full((2, L), MASK)
    dist = head.distribution(df.Prediction.ask(denoiser, blank), blank, torch.ones(2, L, dtype=torch.bool))
    assert float(dist.log_prob(CITIES).exp().sum().detach()) > 0.9  # independent words: 1/2 at the most


def test_an_update_is_that_of_the_whole_prediction(monkeypatch):
    found = []
    for needs_observed in (False, True):
        monkeypatch.setattr(df.NoiseCalibration, "needs_observed", needs_observed)
        denoiser, head = models()
        denoiser, head = denoiser.double(), df.CoupledHead(head.pc, calibration=df.NoiseCalibration(V)).double()
        curve = fit(denoiser, head, replace(CONFIG, steps=4))
        found.append([torch.tensor(curve.held_out), *parameters(denoiser, head)])
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


def test_what_requires_no_gradient_stays():
    class Half(Independent):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(V), requires_grad=False)

        def logits(self, tokens, **options):
            return super().logits(tokens) + self.bias

    denoiser, (_, head) = Half(), models()
    fit(denoiser, head)
    assert bool((denoiser.bias == 0).all())
    assert bool((denoiser.weight != 0).any())


@pytest.mark.parametrize("killed_after", [3, 5, 9])
def test_a_killed_run_ends_like_one_that_was_not(killed_after, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    straight = models()
    curve = fit(*straight)
    batch, calls = joint._Training.batch, []

    def killing(self, step):
        calls.append(step)
        if len(calls) > killed_after:
            raise Killed
        return batch(self, step)

    monkeypatch.setattr(joint._Training, "batch", killing)
    path = tmp_path / "joint.safetensors"
    with pytest.raises(Killed):
        fit(*models(), checkpoint_path=path)
    monkeypatch.undo()
    resumed = models()
    assert fit(*resumed, checkpoint_path=path) == curve
    for ours, theirs in zip(parameters(*resumed), parameters(*straight), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_trained_is_refused():
    denoiser, head = models()
    world = df.testing.worlds.cities()
    with pytest.raises(df.errors.ArgumentError, match="denoiser: expected a torch module"):
        df.fit_jointly(world.denoiser(), df.CoupledHead(world.circuit()), world.support, progress=False)
    with pytest.raises(df.errors.ArgumentError, match="windows: expected int64"):
        df.fit_jointly(denoiser, head, windows()[:, :1], progress=False)
    with pytest.raises(df.errors.ArgumentError, match="windows: expected tokens from 0 to 3, got 9"):
        df.fit_jointly(denoiser, head, windows() + 9, progress=False)
    with pytest.raises(df.errors.ArgumentError, match="denoiser_learning_rate: expected"):
        df.JointTraining(denoiser_learning_rate=0.0)

    class Frozen(Independent):
        def logits(self, tokens, **options):
            return super().logits(tokens).detach()

    with pytest.raises(df.errors.ArgumentError, match="denoiser: expected logits with gradients"):
        fit(Frozen(), head)
