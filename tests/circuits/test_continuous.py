"""A continuous mixture at fixed points is a circuit, its training sees the same likelihood, and it learns."""

import pytest
import torch

import circuits as ct
from circuits.batteries import ContinuousMixture, fit_continuous_mixture, normal_points
from circuits.progress import forget_stop, request_stop

CATEGORIES = [2, 3, 2, 2, 1]
BLOCKS = [[1, 0], [2, 3], [4]]


def dependent_data(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(0, 2, (num_samples, 1), generator=generator)
    noise = torch.rand(num_samples, 5, generator=generator) < 0.2
    x = (hidden ^ noise.long()).long()
    x[:, 1] += (x[:, 1] == 1) & (torch.rand(num_samples, generator=generator) < 0.5)
    x[:, 4] = 0
    return x


def random_model():
    torch.manual_seed(0)
    model = ContinuousMixture(dependent_data(50), BLOCKS, CATEGORIES, latent_dim=2, hidden_units=8)
    torch.nn.init.normal_(model.decoder[-1].bias)
    return model.eval()


def test_circuit_has_the_model_s_likelihood():
    model, points = random_model(), normal_points(16, 2, seed=0)
    pc = model.circuit(points)
    x = torch.cartesian_prod(*(torch.arange(count) for count in CATEGORIES))
    with torch.no_grad():
        log_likelihood = model.log_likelihood(model.encode(x), model.log_tables(points))
        torch.testing.assert_close(pc(x), log_likelihood, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_likelihood.exp().sum(), torch.ones(()), rtol=1e-5, atol=0)


def test_components_start_at_the_smoothed_frequencies_of_the_blocks():
    data, weights = dependent_data(30), torch.arange(30.0)
    model = ContinuousMixture(data, BLOCKS, CATEGORIES, sample_weights=weights, pseudocount=2.0).eval()
    torch.nn.init.zeros_(model.decoder[-1].weight)
    joint = ct.testing.enumerate_joint(model.circuit(torch.zeros(1, 4))).exp()
    total = weights.sum()

    def frequency(condition, count):
        return ((weights * condition).sum() + 1 / count) / (total + 1)

    independent = frequency(data[:, 1] == 2, 3) * frequency(data[:, 0] == 1, 2)
    both = (weights * ((data[:, 1] == 2) & (data[:, 0] == 1))).sum()
    torch.testing.assert_close(joint[1, 2].sum().float(), (both + 2 * independent) / (total + 2), rtol=1e-4, atol=0)


def test_learns_what_one_table_per_block_cannot():
    train, held_out = dependent_data(2000), dependent_data(1000, seed=1)
    options = {"num_categories": CATEGORIES, "blocks": [[0], [1], [2], [3], [4]], "progress": False}
    fit = fit_continuous_mixture(
        train,
        validation_data=held_out,
        num_components=64,
        num_points=64,
        hidden_units=16,
        num_steps=150,
        batch_size=128,
        **options,
    )
    independent = ct.compile(ct.structures.fully_factorized(5, CATEGORIES), seed=0)
    ct.learning.fit(independent, train, num_epochs=1, progress=False)
    with torch.no_grad():
        reached, before = fit.pc(held_out).mean(), independent(held_out).mean()
    assert float(reached) > float(before) + 0.2
    torch.testing.assert_close(float(reached), max(fit.validation_log_likelihood), rtol=1e-4, atol=0)
    best = fit.validation_log_likelihood.index(max(fit.validation_log_likelihood))
    assert fit.best_step == 150 * (best + 1) // 20


def test_same_seed_same_circuit_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = {"num_categories": CATEGORIES, "num_steps": 20, "num_evaluations": 2, "num_components": 8}
    options |= {"num_points": 8, "hidden_units": 8, "dropout": 0.2, "progress": False}
    one, other = (fit_continuous_mixture(dependent_data(200), seed=3, **options) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    joints = [ct.testing.enumerate_joint(fit.pc) for fit in (one, other)]
    torch.testing.assert_close(*joints, rtol=0, atol=0)


def test_samples_count_by_their_weights():
    data = torch.tensor([[0], [1]])
    options = {"num_categories": 2, "num_steps": 30, "num_evaluations": 1, "num_components": 8, "num_points": 8}
    fit = fit_continuous_mixture(data, sample_weights=torch.tensor([1.0, 9.0]), progress=False, **options)
    assert float(ct.testing.enumerate_joint(fit.pc)[1].exp()) == pytest.approx(0.9, abs=0.05)


def test_stops_when_patience_runs_out():
    data = dependent_data(8)
    options = {"num_categories": CATEGORIES, "num_steps": 400, "num_evaluations": 40, "num_components": 8}
    options |= {"num_points": 16, "hidden_units": 32, "learning_rate": 0.03, "progress": False}
    fit = fit_continuous_mixture(data, validation_data=dependent_data(100, seed=2), patience=3, **options)
    validation = fit.validation_log_likelihood
    assert len(validation) < 40
    assert len(validation) - 1 - validation.index(max(validation)) == 3


def test_arguments_are_checked():
    data = dependent_data(10)
    with pytest.raises(ct.ArgumentError, match="data: expected a tensor of integers"):
        fit_continuous_mixture(data.float(), num_categories=CATEGORIES)
    with pytest.raises(ct.ArgumentError, match="validation_data: expected 5 variables"):
        fit_continuous_mixture(data, num_categories=CATEGORIES, validation_data=data[:, :4])
    with pytest.raises(ct.ArgumentError, match="data: expected values from 0"):
        fit_continuous_mixture(data + 1, num_categories=CATEGORIES)
    with pytest.raises(ct.ArgumentError, match="sample_weights"):
        fit_continuous_mixture(data, num_categories=CATEGORIES, sample_weights=torch.ones(3))
    with pytest.raises(ct.ArgumentError, match="num_steps"):
        fit_continuous_mixture(data, num_categories=CATEGORIES, num_steps=0)
    with pytest.raises(ct.ArgumentError, match="num_points"):
        fit_continuous_mixture(data, num_categories=CATEGORIES, num_points=1)
    with pytest.raises(ct.StructureError, match="exactly one block"):
        fit_continuous_mixture(data, num_categories=CATEGORIES, blocks=[[0, 1], [2, 4]])
    with pytest.raises(ct.StructureError, match="expected 5 variables"):
        fit_continuous_mixture(data, num_categories=CATEGORIES, blocks=[[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("latent_dim", 0),
        ("hidden_units", 0),
        ("num_hidden_layers", -1),
        ("patience", -1),
        ("seed", "1"),
        ("dropout", 1.0),
        ("pseudocount", -1.0),
        ("learning_rate", -0.1),
        ("weight_decay", float("nan")),
        ("sample_weights", [1.0] * 10),
    ],
)
def test_options_are_named_when_they_do_not_fit(option, value):
    data = dependent_data(10)
    with pytest.raises(ct.ArgumentError, match=f"{option}: expected"):
        fit_continuous_mixture(data, num_categories=CATEGORIES, validation_data=data, **{option: value})


def test_patience_needs_validation_data():
    with pytest.raises(ct.ArgumentError, match=r"patience: .* give validation_data too"):
        fit_continuous_mixture(dependent_data(10), num_categories=CATEGORIES, patience=3)


RUN = {"num_categories": CATEGORIES, "num_steps": 10, "num_evaluations": 3, "num_components": 8, "num_points": 8}
RUN |= {"hidden_units": 8, "dropout": 0.2, "batch_size": 16, "progress": False}


@pytest.mark.parametrize("num_steps", [1, 4, 9])
@pytest.mark.parametrize("weights", [None, torch.arange(60.0)])
def test_an_interrupted_run_ends_like_one_that_was_not(num_steps, weights, tmp_path, monkeypatch):
    data, held_out, path = dependent_data(60), dependent_data(30, seed=1), tmp_path / "run.safetensors"
    whole = fit_continuous_mixture(data, validation_data=held_out, sample_weights=weights, **RUN)
    encode, calls = ContinuousMixture.encode, []

    def counted(self, x):
        calls.append(len(x))
        if self.training and len(calls) >= num_steps:
            request_stop()
        return encode(self, x)

    monkeypatch.setattr(ContinuousMixture, "encode", counted)
    try:
        with pytest.raises(ct.Interrupted, match="of 10 updates; the same call goes on from"):
            fit_continuous_mixture(data, validation_data=held_out, sample_weights=weights, checkpoint_path=path, **RUN)
    finally:
        forget_stop()
    monkeypatch.undo()
    other = RUN | {"dropout": 0.1}
    with pytest.raises(ct.CheckpointError, match="expected this run, got one with a different network"):
        fit_continuous_mixture(data, validation_data=held_out, sample_weights=weights, checkpoint_path=path, **other)
    resumed = fit_continuous_mixture(
        data, validation_data=held_out, sample_weights=weights, checkpoint_path=path, **RUN
    )
    assert resumed.train_log_likelihood == whole.train_log_likelihood
    assert resumed.validation_log_likelihood == whole.validation_log_likelihood
    joints = [ct.testing.enumerate_joint(fit.pc) for fit in (resumed, whole)]
    torch.testing.assert_close(*joints, rtol=0, atol=0)


def test_options_are_objects_or_their_fields():
    network, training = (
        ct.batteries.MixtureNetwork(hidden_units=8),
        ct.batteries.MixtureTraining(num_steps=3, num_evaluations=1),
    )
    data, options = dependent_data(20), {"num_categories": CATEGORIES, "progress": False}
    with pytest.raises(ct.ArgumentError, match="hidden_units: network says it already"):
        fit_continuous_mixture(data, network=network, hidden_units=9, **options)
    with pytest.raises(ct.ArgumentError, match="momentum: expected a field of MixtureNetwork or MixtureTraining"):
        fit_continuous_mixture(data, momentum=0.9, **options)
    one = fit_continuous_mixture(data.numpy(), network=network, training=training, **options)
    other = fit_continuous_mixture(data.tolist(), hidden_units=8, num_steps=3, num_evaluations=1, **options)
    assert one.train_log_likelihood == other.train_log_likelihood
