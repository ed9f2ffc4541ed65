"""Tuning: the circuit is used where it raises the likelihood, by figures that an enumeration gives too."""

import json
import math

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.evaluation.tuning import DECODINGS, chosen_threshold, tune

pytestmark = pytest.mark.usefixtures("one_thread")


def joint_gain(world, weights, data):
    """The mean of log p_hat(x) - sum_i log q_i(x_i), all masked: p_hat is weights times q, normalised over texts."""
    q = torch.stack(
        [torch.zeros(6, dtype=torch.float64).index_add_(0, column, world.probs) for column in world.support.t()]
    )
    log_q = q[torch.arange(world.length), world.support].log().sum(1)  # (n,)
    scores = weights.log() + log_q
    gain = scores - scores.logsumexp(0) - log_q
    index = (data.unsqueeze(1) == world.support).all(-1).long().argmax(1)
    return float(gain[index].mean()) / world.length


def test_a_true_circuit_is_always_used_and_gains_the_dependence():
    """Two cities: nothing to gain with one word masked, log 2 nats in two tokens with both."""
    world = df.testing.worlds.cities()
    head = df.CoupledHead(world.circuit(), activation_threshold=0.1)
    tuning = tune(world.denoiser(), head, world.support.repeat(8, 1))
    assert [row.mask_ratio for row in tuning.rows] == [0.5, 1.0]
    assert [row.gain.value for row in tuning.rows] == pytest.approx([0.0, math.log(2) / 2], abs=1e-5)
    assert [row.without for row in tuning.rows] == pytest.approx([0.0, -math.log(2)], abs=1e-5)
    assert (tuning.activation_threshold, tuning.temperature) == (1.0, None)
    assert [row.uses_circuit for row in tuning.rows] == [True, True]


def test_a_wrong_circuit_is_never_used():
    """The circuit of an unlikely world over the same words: what it says is wrong at every mask ratio."""
    world = df.testing.worlds.cities(probs=(0.95, 0.05))
    wrong = torch.tensor([[0, 3], [1, 2]])  # San York, New Francisco
    pc = df.testing.worlds.World(torch.cat([wrong, world.support]), torch.tensor([0.49, 0.49, 0.01, 0.01])).circuit()
    tuning = tune(world.denoiser(), df.CoupledHead(pc), world.support[:1].repeat(8, 1))
    assert tuning.activation_threshold == 0.0
    assert not any(row.uses_circuit for row in tuning.rows)
    assert tuning.rows[1].gain.value < -0.5


def test_gains_are_those_of_an_enumeration():
    """A circuit of the right texts with wrong probabilities."""
    world = df.testing.worlds.random(3, length=3, num_words=3, concentration=0.2)
    skewed = world.probs**-1.5
    pc = df.testing.worlds.World(world.support, skewed / skewed.sum()).circuit()
    data = world.sample(400, generator=torch.Generator().manual_seed(0))
    tuning = tune(world.denoiser(), df.CoupledHead(pc), data)
    gains = [row.gain.value for row in tuning.rows]
    assert gains[-1] == pytest.approx(joint_gain(world, skewed, data), abs=1e-4)
    assert tuning.activation_threshold == chosen_threshold([row.mask_ratio for row in tuning.rows], gains)
    assert [row.uses_circuit for row in tuning.rows] == [
        r.mask_ratio < tuning.activation_threshold for r in tuning.rows
    ]


def test_a_circuit_is_used_up_to_where_it_hurts():
    """The text is aaa. Whatever is visible tells the circuit so, and not the denoiser; blind, it bets on bbb."""
    texts = torch.tensor([[0, 0, 0], [1, 1, 1]])
    circuit = df.testing.worlds.World(texts, torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64))

    class Blind:
        """Sure of a while all is masked, and of nothing else."""

        spec = circuit.spec

        def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
            is_blank = (tokens == self.spec.mask_id).all(1)
            probs = torch.tensor([[0.5, 0.5, 1e-9], [0.99, 0.01, 1e-9]])
            return probs.log()[is_blank.long()].unsqueeze(1).expand(-1, 3, -1)

    tuning = tune(Blind(), df.CoupledHead(circuit.circuit(dtype=torch.float64)), texts[:1].repeat(5, 1))
    blind = 1e-6 * 0.99**3 / (1e-6 * 0.99**3 + (1 - 1e-6) * 0.01**3)
    assert [row.gain.value for row in tuning.rows] == pytest.approx(
        [math.log(2), math.log(2), math.log(blind) / 3 - math.log(0.99)], abs=1e-5
    )
    assert tuning.activation_threshold == pytest.approx(5 / 6)
    assert [row.uses_circuit for row in tuning.rows] == [True, True, False]


@pytest.mark.parametrize(
    ("gains", "threshold"),
    [
        ((1.0, 1.0, 1.0), 1.0),
        ((-1.0, -1.0, -1.0), 0.0),
        ((1.0, -0.5, -1.0), 0.375),
        ((1.0, -0.5, 0.6), 1.0),
        ((-1.0, 2.0, -1.0), 0.75),
        ((0.0, 0.0, 0.0), 0.0),
        ((-math.inf, 1.0, 1.0), 0.0),
    ],
)
def test_the_threshold_makes_the_sum_of_gains_greatest(gains, threshold):
    assert chosen_threshold([0.25, 0.5, 1.0], gains) == threshold


def test_the_temperature_undoes_a_wrong_scale():
    """A denoiser whose log-probabilities are twice too large is right at temperature 2, without a circuit's help."""
    world = df.testing.worlds.random(5, length=2, num_words=3, concentration=3.0)
    right = world.denoiser()

    class Overconfident:
        spec = world.spec

        def logits(self, tokens, **options):
            return 2 * right.logits(tokens, **options)

    uniform = ct.compile(ct.structures.hmm(2, 1, 4, homogeneous=False, emission=torch.full((2, 1, 4), 0.25)))
    data = world.sample(4000, generator=torch.Generator().manual_seed(0))
    head = df.CoupledHead(uniform)
    tuning = tune(Overconfident(), head, data, temperatures=(0.5, 1.0, 1.5, 2.0, 2.5, 3.0))
    assert tuning.temperature == 2.0
    tuning.apply(head)
    assert (head.activation_threshold, head.temperature) == (tuning.activation_threshold, 2.0)


def test_a_tuned_head_decodes_by_its_threshold_and_keeps_it(tmp_path):
    world = df.testing.worlds.cities()
    head = df.CoupledHead(world.circuit())
    tuning = df.evaluation.Tuning((), 0.75, None, 2)
    tuning.apply(head)
    tuning.save(tmp_path / "tuning.json")
    assert json.loads((tmp_path / "tuning.json").read_text())["activation_threshold"] == 0.75
    head.save(tmp_path / "head")
    head = df.CoupledHead.load(tmp_path / "head")
    one = df.generate(world.denoiser(), [[]], gen_length=2, num_steps=2, head=head)
    assert (one.num_windows.item(), one.num_coupled.item()) == (2, 1)  # not while both words are masked


def test_what_cannot_be_tuned_is_refused():
    world = df.testing.worlds.cities()
    head = df.CoupledHead(world.circuit())
    for data, options, name in [
        (world.support[:1], {}, "data"),
        ([[0, 2]], {}, "data"),
        (world.support, {"mask_ratios": ()}, "mask_ratios"),
        (world.support, {"mask_ratios": (0.0,)}, "mask_ratios"),
        (world.support, {"temperatures": (0.0,)}, "temperatures"),
        (world.support, {"temperatures": ()}, "temperatures"),
        (world.support, {"num_steps": 0}, "num_steps"),
        (world.support, {"num_steps": 3}, "num_steps"),
        (world.support, {"mask_ratios": 0.5}, "mask_ratios"),
        (world.support, {"mask_ratios": ("half",)}, "mask_ratios"),
        (world.support, {"temperatures": 1.0}, "temperatures"),
        (world.support, {"temperatures": ("warm",)}, "temperatures"),
        (world.support, {"batch_size": 0}, "batch_size"),
        (world.support, {"seed": "x"}, "seed"),
        (world.support, {"folder": 3}, "folder"),
    ]:
        with pytest.raises(df.errors.ArgumentError, match=f"{name}: expected"):
            tune(world.denoiser(), head, data, **options)


def correlated(strength=0.9):
    """Two pairs of coins: within a pair they agree more often than not, and which pair is sure is visible."""
    pairs = torch.tensor([[a, a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    probs = torch.where(pairs[:, 2] == pairs[:, 3], strength, 1 - strength) / 4
    return df.testing.worlds.World(pairs, probs.double())


def test_modes_and_strategies_are_chosen_by_the_likelihood_of_their_decoder():
    """Each candidate's figure is the decoder's own log-likelihood; the best is stored where decoding reads it."""
    world = correlated()
    head, denoiser = df.CoupledHead(world.circuit(), decoding={"threshold": 0.5}), world.denoiser()
    data = world.sample(40, generator=torch.Generator().manual_seed(0))
    tuning = tune(denoiser, head, data, num_steps=2)
    prompt = torch.zeros(40, 0, dtype=torch.int64)
    found = {one.setting: one for one in tuning.candidates}
    assert list(found) == [f"{mode}, {strategy}" for mode, strategy in DECODINGS]
    for mode, strategy in (("joint", "entropy"), ("any_order", "margin"), ("marginal", "top_prob")):
        expected = df.log_likelihood(
            denoiser, prompt, data, head=head, num_steps=2, decode=mode, strategy=strategy,
            activation_threshold=tuning.activation_threshold,
        )  # fmt: skip
        one = found[f"{mode}, {strategy}"]
        assert one.log_likelihood == pytest.approx(float(expected.mean()) / 4, abs=1e-6)
    best = max(tuning.candidates, key=lambda one: one.log_likelihood)
    (chosen,) = (one for one in tuning.candidates if one.is_chosen)
    assert chosen.log_likelihood == pytest.approx(best.log_likelihood, abs=1e-5)
    assert chosen.setting == f"{tuning.decode}, {tuning.strategy}"
    worst = min(tuning.candidates, key=lambda one: one.log_likelihood)
    assert worst.setting.startswith("marginal")  # which does not know that coins agree
    assert worst.gain.high < 0 == tuning.candidates[0].gain.value
    tuning.apply(head)
    assert head.decoding == {
        "threshold": 0.5, "activation_threshold": tuning.activation_threshold,
        "decode": tuning.decode, "strategy": tuning.strategy,
    }  # fmt: skip
    out = df.generate(denoiser, [[]] * 200, gen_length=4, num_steps=1, head=head, temperature=1.0, seeds=range(200))
    assert bool((out.generated[:, 0] == out.generated[:, 1]).all())  # joint draws


def test_what_is_stored_is_what_decoding_takes():
    """A head whose options of decoding are its own is tuned there: they go before its threshold and temperature."""
    head = df.CoupledHead(correlated().circuit(), decoding={"temperature": 0.3, "activation_threshold": 0.2})
    Tuning = df.evaluation.Tuning
    Tuning((), 0.75, None, 2).apply(head)
    assert head.decoding == {"temperature": 0.3, "activation_threshold": 0.75}
    Tuning((), 0.5, 0.8, 2, (), "joint", "margin", 4).apply(head)
    assert head.decoding == {
        "temperature": 0.8, "activation_threshold": 0.5, "decode": "joint", "strategy": "margin",
    }  # fmt: skip
    Tuning((), 0.5, 1.0, 2).apply(head)
    assert "temperature" not in head.decoding


def test_an_interrupted_tuning_goes_on_point_by_point(tmp_path, monkeypatch):
    from diffusion.evaluation import tuning as module

    world = correlated()
    data = world.sample(20, generator=torch.Generator().manual_seed(0))
    options = {"temperatures": (0.5, 1.0, 2.0), "num_steps": 2}
    whole = tune(world.denoiser(), df.CoupledHead(world.circuit()), data, **options)
    asked, score, likelihood = [], module._scores, module.log_likelihood

    def watched(function, most):
        def call(*arguments, **given):
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(function.__name__)
            return function(*arguments, **given)

        return call

    def run(most):
        asked.clear()
        monkeypatch.setattr(module, "_scores", watched(score, most))
        monkeypatch.setattr(module, "log_likelihood", watched(likelihood, most))
        return tune(world.denoiser(), df.CoupledHead(world.circuit()), data, folder=tmp_path, **options)

    with pytest.raises(KeyboardInterrupt):
        run(6)
    assert run(100) == whole
    assert len(asked) == 4 + len(DECODINGS) - 6  # mask ratios and ways of decoding
    assert run(0) == whole
