"""A long chain in segments: the numbers of one pass, and memory of the square root of its length."""

import pytest
import torch

import circuits as ct

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def evidence_with_gaps(num_rows, num_vars, num_values):
    """Values with holes, whose rows end at several places, one of them at once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(num_values, (num_rows, num_vars), generator=generator)
    ends = torch.randint(num_vars + 1, (num_rows, 1), generator=generator)
    ends[0] = 0
    observed = (torch.rand(x.shape, generator=generator) < 0.8) & (torch.arange(num_vars) < ends)
    return ct.Evidence.observe(x.double() if num_values == 2 else x, observed)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 40, 300])
@pytest.mark.parametrize("family", [5, [ct.Gaussian(), ct.Bernoulli()]], ids=["categorical", "two families"])
def test_flows_and_gradients_are_those_of_one_pass(length, family):
    pc = ct.compile(ct.structures.hmm(length, 3, family), seed=0, dtype=torch.float64)
    evidence = evidence_with_gaps(4, pc.circuit.num_vars, 5 if family == 5 else 2)
    counts = torch.tensor([1.0, 2.0, 0.0, 0.5])
    whole = ct.learning.expected_flows(pc, evidence, counts)
    parts = ct.learning.expected_flows(pc, evidence, counts, checkpointed=True)
    torch.testing.assert_close(parts.log_likelihood, whole.log_likelihood, **CLOSE)
    torch.testing.assert_close(parts.flows, whole.flows, **CLOSE)
    gradients = [
        torch.autograd.grad(ct.queries.log_partition(pc, evidence, checkpointed=flag).sum(), list(pc.parameters()))
        for flag in (False, True)
    ]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_a_fit_in_segments_is_the_fit():
    x = torch.randint(4, (6, 90), generator=torch.Generator().manual_seed(0))
    fitted = []
    for checkpointed in (False, True):
        pc = ct.compile(ct.structures.hmm(90, 3, 4), seed=0, dtype=torch.float64)
        ct.learning.fit(pc, x, optimizer="em", num_epochs=3, progress=False, checkpointed=checkpointed)
        fitted.append(dict(pc.bank.items()))
    torch.testing.assert_close(*fitted, rtol=1e-8, atol=1e-8)


def test_classes_at_the_root_have_one_value_each():
    leaf = [ct.inputs(step, 2, ct.Categorical(3)) for step in range(1)]
    states, tie, emission = leaf[0], None, leaf[0]
    for step in range(1, 40):
        tie = ct.sum(states, num_units=2, tied_to=tie)
        states = ct.product(ct.inputs(step, 2, ct.Categorical(3), tied_to=emission), tie)
    pc = ct.compile(ct.Circuit(ct.sum(states, num_units=3), num_classes=3), seed=0, dtype=torch.float64)
    evidence = evidence_with_gaps(4, 40, 3)
    both = [ct.queries.log_partition(pc, evidence, checkpointed=flag) for flag in (False, True)]
    assert both[0].shape == (4, 3)
    torch.testing.assert_close(*both, **CLOSE)
    named = evidence.with_class(torch.tensor([0, 2, 1, 1]))
    both = [ct.queries.log_partition(pc, named, checkpointed=flag) for flag in (False, True)]
    torch.testing.assert_close(*both, **CLOSE)


def peak_bytes(run):
    """The most that tensors take at once while a function runs, beyond what is there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    sizes = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(sizes.cumsum(0).max())


def test_memory_grows_like_the_square_root_of_the_length():
    peaks = {}
    for length in (144, 2304):
        pc = ct.compile(ct.structures.hmm(length, 12, 5), seed=0)
        evidence = ct.Evidence.observe(torch.randint(5, (6, length), generator=torch.Generator().manual_seed(0)))
        for checkpointed in (False, True):
            ct.learning.expected_flows(pc, evidence, checkpointed=checkpointed)  # what is made once is made now
            peaks[length, checkpointed] = peak_bytes(
                lambda pc=pc, evidence=evidence, flag=checkpointed: ct.learning.expected_flows(
                    pc, evidence, checkpointed=flag
                )
            )
    assert 12 < peaks[2304, False] / peaks[144, False] < 20
    assert peaks[2304, True] / peaks[144, True] < 6


@pytest.mark.parametrize(
    "circuit",
    [
        ct.structures.hmm(30, 2, 3, homogeneous=False),
        ct.structures.hmm(30, 2, 3, num_classes=2),
        ct.structures.low_rank_hmm(30, 3, 3, 2),
        ct.structures.linear_tree(8, 2, 3),
    ],
)
def test_other_circuits_are_refused(circuit):
    pc = ct.compile(circuit, seed=0)
    evidence = ct.Evidence.observe(torch.zeros(1, circuit.num_vars, dtype=torch.int64))
    with pytest.raises(ct.PropertyError, match="expected a chain of equal steps"):
        ct.queries.log_partition(pc, evidence, checkpointed=True)


def test_what_segments_do_not_know_is_refused():
    pc = ct.compile(ct.structures.hmm(30, 2, 3), seed=0)
    evidence = ct.Evidence.observe(torch.zeros(1, 30, dtype=torch.int64))
    with pytest.raises(ct.PropertyError, match="checkpointed"):
        ct.queries.log_partition(pc, evidence.with_latents({"initial": torch.zeros(1, 2)}), checkpointed=True)
    weights = pc.weights(external={"initial": torch.zeros(1, 2)})
    with pytest.raises(ct.PropertyError, match="checkpointed"):
        ct.queries.log_partition(pc, evidence, weights=weights, checkpointed=True)
    with pytest.raises(ct.PropertyError, match="evidence without a gradient"):
        ct.queries.log_partition(pc, ct.Evidence.soft(torch.zeros(1, 30, 3, requires_grad=True)), checkpointed=True)
