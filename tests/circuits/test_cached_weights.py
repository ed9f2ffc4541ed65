"""Queries without gradients use the present weights, however these were changed; and large tables are normalised."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from query_cases import compiled_with_evidence

import circuits as ct

pytestmark = pytest.mark.usefixtures("one_thread")


def swap_storage(parameter, other):
    parameter.data = other.clone()


WRITES = {
    "data.copy_": lambda p, other: p.data.copy_(other),
    "data.mul_": lambda p, other: p.data.mul_(0.5),
    "data.add_": lambda p, other: p.data.add_(other),
    "data.clamp_": lambda p, other: p.data.clamp_(min=-1.0),
    "numpy": lambda p, other: np.copyto(p.detach().numpy(), other.numpy()),
    "permuted": lambda p, other: p.data.copy_(p.data.flip(-1)),
    "detach": lambda p, other: p.detach().copy_(other),
    "new storage": swap_storage,
    "inference mode": lambda p, other: (
        torch.inference_mode()(p.copy_)(other) if p.is_inference() else p.data.copy_(other)
    ),
}


@settings(max_examples=40)
@given(compiled_with_evidence(), st.sampled_from(sorted(WRITES)), st.booleans())
def test_every_write_is_seen(drawn, how, under_inference):
    pc, evidence = drawn
    other = ct.compile(pc.circuit, dtype=torch.float64, seed=1001)
    quiet = torch.inference_mode if under_inference else torch.no_grad
    with quiet():
        pc.log_partition(evidence)
    for parameter, values in zip(pc.parameters(), other.parameters(), strict=True):
        WRITES[how](parameter, values.detach())
    fresh = ct.compile(pc.circuit, dtype=torch.float64)
    fresh.load_state_dict(pc.state_dict())
    with quiet():
        found = pc.log_partition(evidence)
    torch.testing.assert_close(found, fresh.log_partition(evidence).detach(), rtol=0, atol=0, equal_nan=True)


def test_weights_that_come_back_are_seen_too():
    pc = ct.compile(ct.structures.hmm(4, 2, 3), seed=0)
    x = torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(0))
    raw = [parameter.detach().clone() for parameter in pc.parameters()]
    with torch.no_grad():
        first = pc(x)
        for parameter in pc.parameters():
            parameter.data.neg_()
        assert not torch.equal(pc(x), first)
        for parameter, values in zip(pc.parameters(), raw, strict=True):
            parameter.data.copy_(values)
        assert torch.equal(pc(x), first)


def test_an_average_of_weights_is_what_is_validated():
    x = torch.randint(2, (50, 6), generator=torch.Generator().manual_seed(0))
    pc = ct.compile(ct.structures.hmm(6, 3, 5), seed=0)
    averaged = [p.detach().clone() for p in pc.parameters()]
    ct.learning.fit(pc, x, num_epochs=20, progress=False)
    with torch.no_grad():
        assert float(pc(x).mean()) == pytest.approx(-4.1535, abs=1e-4)
        for parameter, values in zip(pc.parameters(), averaged, strict=True):
            parameter.data.copy_(values.data)
        assert float(pc(x).mean()) == pytest.approx(-6.5905, abs=1e-4)


def test_unchanged_weights_are_read_once():
    pc = ct.compile(ct.structures.hmm(4, 2, 3), seed=0)
    with torch.no_grad():
        first, second = pc.weights().own, pc.weights().own
    assert all(first[name] is second[name] for name in first)


def test_what_a_caller_writes_into_the_weights_it_got_changes_no_answer():
    pc = ct.compile(ct.structures.hmm(4, 2, 3), seed=0)
    x = torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = pc(x)
        pc.log_weights(pc.circuit.node("transition0")).zero_()
        assert torch.equal(pc.log_weights(pc.circuit.node("transition0")).exp().sum(-1), torch.ones(2))
        pc.weights().own["sum_2x2"].linear.mul_(5.0)
        assert torch.equal(pc(x), first)


def test_copies_and_files_hold_the_parameters_alone():
    pc = ct.compile(ct.structures.hmm(4, 8, 300), seed=0)
    size = len(pickle.dumps(pc))
    x = torch.randint(300, (5, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pc(x)
        assert len(pickle.dumps(pc)) == size
        assert torch.equal(copy.deepcopy(pc)(x), expected)


def distributions(pc):
    """Return distributions that read the circuit's weights when a question is asked."""
    evidence = ct.Evidence.soft(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))
    return ct.CircuitDistribution(pc, evidence), ct.CircuitDistribution(pc)


def test_distributions_answer_with_the_present_weights():
    x = torch.randint(3, (2, 4), generator=torch.Generator().manual_seed(1))
    pc = ct.compile(ct.structures.hmm(4, 2, 3), seed=0)
    old = distributions(pc)
    with torch.no_grad():
        for dist in old:
            dist.log_partition, dist.marginal_probs, dist.log_prob(x)
        pc.randomize(seed=1)
        for dist, fresh in zip(old, distributions(pc), strict=True):
            assert torch.equal(dist.log_prob(x), fresh.log_prob(x))
            assert torch.equal(dist.marginal_probs, fresh.marginal_probs)


@pytest.mark.parametrize("is_constrained", [False, True])
def test_an_answer_without_gradients_is_not_kept_for_later_ones_with_them(is_constrained):
    """log p(x | e) is log of a softmax over x, so its gradient sums to 0 along each unit's weights."""
    pc = ct.compile(ct.structures.hmm(4, 2, 3), seed=0, dtype=torch.float64)
    x = torch.randint(3, (2, 4), generator=torch.Generator().manual_seed(1))
    table = torch.arange(3).expand(2, 3) % 2

    def build():
        evidence = ct.Evidence.soft(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double())
        if is_constrained:
            dfa = ct.queries.DeterministicAutomaton.from_table(table, [0, 1])
            return ct.ConstrainedDistribution(pc, evidence, dfa, weights=pc.weights())
        return ct.CircuitDistribution(pc, evidence, weights=pc.weights())

    gradients = []
    for looks_first in (False, True):
        dist = build()
        if looks_first:
            with torch.no_grad():
                dist.log_partition, dist.log_prob(x)
        gradients.append(torch.autograd.grad(dist.log_prob(x).sum(), list(pc.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# Large vocabularies -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt():
    pc = ct.compile(ct.structures.hmm(5, 8, 50_000), seed=0)
    x = torch.randint(50_000, (50, 5), generator=torch.Generator().manual_seed(0))
    ct.learning.fit(pc, x, num_epochs=3, progress=False)
    return pc, x


def test_tables_of_50_000_values_sum_to_1(learnt):
    pc, _ = learnt
    for table in (pc.parameters_of(pc.circuit.node("emission0")), pc.weights().own["input_50000x8"].linear[0]):
        np.testing.assert_allclose(table.detach().numpy().astype(np.float64).sum(0), 1.0, atol=1e-6)


def test_their_likelihoods_are_those_of_double_precision(learnt):
    pc, x = learnt
    raw = {name: parameter.detach().double().numpy() for name, parameter in pc.bank.items()}
    emission = raw["input_50000x8"][0]
    emission = emission - np.logaddexp.reduce(emission, 0)
    initial, transition = (
        raw[name][0] - np.logaddexp.reduce(raw[name][0], -1)[:, None] for name in ("sum_1x8", "sum_8x8")
    )
    log_alpha = initial[0] + emission[x[:, 0]]
    for symbols in x.T[1:]:
        log_alpha = np.logaddexp.reduce(log_alpha[:, :, None] + transition, 1) + emission[symbols]
    expected = np.logaddexp.reduce(log_alpha, 1)
    np.testing.assert_allclose(pc(x).detach().numpy(), expected, rtol=2e-6)


def test_a_learnt_table_can_be_given_back(learnt):
    pc, _ = learnt
    table = pc.parameters_of(pc.circuit.node("emission0")).detach().t()
    longer = ct.compile(ct.structures.hmm(9, 8, 50_000, emission=table))
    torch.testing.assert_close(longer.parameters_of(longer.circuit.node("emission0")).t(), table, rtol=1e-5, atol=0)


def test_weights_given_at_run_time_are_normalised_as_well():
    pc = ct.compile(ct.structures.hmm(2, 2, 50_000), seed=0)
    logits = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0))
    banks = pc.weights(external={"emission0": logits})
    exact = logits.double() - torch.logsumexp(logits.double(), 0)
    soft = ct.Evidence.soft(torch.zeros(1, 2, 50_000))
    assert float(pc.log_partition(soft, banks).detach()) == pytest.approx(0.0, abs=4e-6)
    (given,) = banks.given.values()
    torch.testing.assert_close(given.tables.log[0, 0].double(), exact, rtol=0, atol=2e-6)
