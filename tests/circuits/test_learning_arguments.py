"""What learners cannot work with is refused by name, before anything is learnt from it."""

import math

import pytest
import torch

import circuits as ct
from circuits import learning

X = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 1, 1], [0, 0, 2]])


def mixture():
    return ct.compile(ct.structures.mixture(3, 3, num_components=2), seed=0)


def weights_of(pc):
    return {name: parameter.detach().clone() for name, parameter in pc.bank.items()}


@pytest.mark.parametrize("optimizer", ["em", "minibatch_em", "anemone", "viterbi_em"])
@pytest.mark.parametrize(
    ("option", "value"), [("step_size", 2.0), ("step_size", "1"), ("pseudocount", math.nan), ("entropy", "0.1")]
)
def test_options_of_the_em_family(optimizer, option, value):
    class Untouched:
        """A table of the right shape whose rows past the check nobody reads."""

        def __len__(self):
            return len(X)

        def __getitem__(self, rows):
            return X.numpy()[rows]

    pc = mixture()
    before = weights_of(pc)
    with pytest.raises(ct.ArgumentError, match=f"{option}: expected"):
        learning.fit(pc, Untouched(), optimizer=optimizer, **{option: value}, progress=False)
    assert all(torch.equal(before[name], parameter) for name, parameter in pc.bank.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_improvement": "a"}, "min_improvement: expected a number"),
        ({"validation_observed": X >= 0}, "validation_observed: .* validation_data, which is not given"),
        ({"validation_labels": X[:, 0]}, "validation_labels: .* validation_data, which is not given"),
    ],
)
def test_options_of_fit(options, message):
    with pytest.raises(ct.ArgumentError, match=message):
        learning.fit(mixture(), X, progress=False, **options)


def test_a_checkpoint_that_cannot_be_written_is_known_before_the_first_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(learning.em, "em_step", None)  # nothing is learnt
    (tmp_path / "file").write_text("not a folder")
    path = tmp_path / "file" / "run.safetensors"
    with pytest.raises(ct.ArgumentError, match=r"checkpoint_path: the folder .* cannot be written to"):
        learning.fit(mixture(), X, checkpoint_path=path, progress=False)


def test_an_optimizer_over_frozen_parameters():
    pc = mixture().requires_grad_(False)
    with pytest.raises(ct.ArgumentError, match="none of the parameters of Adam takes a gradient"):
        learning.fit(pc, X, optimizer=torch.optim.Adam, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flow: flow * math.nan, "finite sum"),
        (lambda flow: -flow, "uses >= 0"),
        (lambda flow: flow + math.inf, "finite sum"),
    ],
)
@pytest.mark.parametrize("step", [learning.em_step, lambda pc, flows: learning.anemone_step(pc, flows, 4.0)])
def test_flows_that_are_no_numbers_of_uses_change_nothing(change, message, step):
    pc = mixture()
    before = weights_of(pc)
    flows = {name: change(flow) for name, flow in learning.expected_flows(pc, X).flows.items()}
    with pytest.raises(ct.ArgumentError, match=message):
        step(pc, flows)
    assert all(torch.equal(before[name], parameter) for name, parameter in pc.bank.items())


def test_flows_together_with_likelihoods_are_not_flows():
    pc = mixture()
    with pytest.raises(ct.ArgumentError, match=r"expected_flows\(pc, ...\).flows, got ExpectedFlows"):
        learning.em_step(pc, learning.expected_flows(pc, X))


def test_sample_weights_too_large_for_float32_are_no_reason_for_nan():
    weights = torch.full((len(X),), 1e38, dtype=torch.float64)
    with pytest.raises(ct.ArgumentError, match=r"dtype=torch\.float64"):
        learning.fit(mixture(), X, sample_weights=weights, progress=False)
    pc = mixture().double()
    result = learning.fit(pc, X, sample_weights=weights, num_epochs=2, progress=False)
    once = learning.fit(mixture().double(), X, pseudocount=1e-40, num_epochs=2, progress=False)
    assert result.train_log_likelihood == pytest.approx(once.train_log_likelihood)


def test_the_state_of_anemone_is_that_of_the_same_circuit():
    pc, other = mixture(), ct.compile(ct.structures.mixture(3, 3, num_components=4), seed=0)
    state = learning.anemone_step(other, learning.expected_flows(other, X).flows, 4.0)
    flows = learning.expected_flows(pc, X).flows
    with pytest.raises(ct.ArgumentError, match="state: expected what the last step"):
        learning.anemone_step(pc, flows, 4.0, state)
    with pytest.raises(ct.ArgumentError, match="state: expected what the last step"):
        learning.anemone_step(pc, flows, 4.0, flows)
    with pytest.raises(ct.ArgumentError, match="mass: expected a finite number"):
        learning.anemone_step(pc, flows, math.nan)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (lambda pc: learning.initialize_inputs(pc.circuit, X), "pc: expected a compiled circuit"),
        (lambda pc: learning.initialize_by_kmeans(pc.circuit, X), "pc: expected a compiled circuit"),
        (lambda pc: ct.batteries.distill_latents(pc.circuit, X, {}), "pc: expected a compiled circuit"),
        (lambda pc: learning.initialize_inputs(pc, X, bandwidth="1"), "bandwidth: expected a number"),
        (lambda pc: learning.initialize_inputs(pc, X, pseudocount="1"), "pseudocount: expected a number"),
        (lambda pc: ct.batteries.distill_latents(pc, X, [X[:, 0]]), "latents: expected states by node"),
        (lambda pc: ct.batteries.distill_latents(pc, X, {}, batch_size=0), "batch_size: expected an integer >= 1"),
    ],
)
def test_starts(start, message):
    with pytest.raises(ct.ArgumentError, match=message):
        start(mixture())


@pytest.mark.parametrize("build", [lambda p: torch.optim.Adam(p, weight_decay=0.1), torch.optim.Adafactor])
def test_optimizers_that_multiply_zero_weights_are_told_why_they_fail(build):
    pc = mixture()
    pc.set_weights(pc.circuit.root, torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ct.ArgumentError, match="scales steps by the weights, -inf for those that are zero"):
        learning.fit(pc, X, optimizer=build, progress=False)
    assert pc.log_weights(pc.circuit.root).exp().tolist() == [[1.0, 0.0]]
    with pytest.raises(ct.ArgumentError, match=r"lower its learning rate\. The weights"):
        learning.fit(mixture(), X, optimizer=lambda p: torch.optim.SGD(p, lr=math.inf), progress=False)
