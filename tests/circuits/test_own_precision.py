"""A circuit computes in its own dtype, whatever the caller's autocast; and other dtypes than its two are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from query_cases import compiled_with_evidence

import circuits as ct
from circuits import queries

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.bfloat16, torch.float16]

QUERIES = {
    "log_partition": lambda pc, e: queries.log_partition(pc, e),
    "marginals": lambda pc, e: queries.marginals(pc, e),
    "pairwise_marginals": lambda pc, e: queries.pairwise_marginals(pc, e),
    "mpe": lambda pc, e: queries.mpe(pc, e).log_score,
    "k_best": lambda pc, e: queries.k_best(pc, 2, e).log_score,
    "sample": lambda pc, e: queries.sample(pc, 3, e, torch.Generator().manual_seed(0)),
    "mean": lambda pc, e: queries.mean(pc, e),
    "covariance": lambda pc, e: queries.covariance(pc, e),
    "entropy": lambda pc, e: queries.latent_entropy(pc, e),
    "latent_marginals": lambda pc, e: next(iter(queries.latent_marginals(pc, e, list(pc.circuit.sums)[:1]).values())),
    "expected_flows": lambda pc, e: torch.cat([f.flatten() for f in ct.learning.expected_flows(pc, e).flows.values()]),
    "viterbi_flows": lambda pc, e: torch.cat([f.flatten() for f in ct.learning.viterbi_flows(pc, e).flows.values()]),
}


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", QUERIES)
def test_no_query_depends_on_autocast(name, half):
    pc = ct.compile(ct.structures.hmm(12, 5, 7), seed=0)
    x = torch.randint(7, (3, 12), generator=torch.Generator().manual_seed(0))
    evidence = ct.Evidence.observe(x, torch.arange(12).expand(3, 12) % 3 > 0)
    expected = QUERIES[name](pc, evidence)
    with torch.autocast("cpu", dtype=half):
        found = QUERIES[name](pc, evidence)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@settings(max_examples=30)
@given(compiled_with_evidence(families="finite"), st.sampled_from(HALVES))
def test_autocast_changes_no_likelihood_and_no_gradient(drawn, half):
    pc, evidence = drawn
    pc, seen = pc.to(torch.float32), []  # autocast leaves float64 alone
    for enabled in (False, True):
        pc.zero_grad()
        with torch.autocast("cpu", dtype=half, enabled=enabled):
            log_z = pc.log_partition(evidence)
            possible = log_z[log_z > -torch.inf]
            if len(possible):
                possible.sum().backward()
        seen.append([log_z.detach(), *(p.grad.clone() for p in pc.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


def test_the_loss_under_autocast_is_exact_and_differentiable_outside_of_it():
    pc = ct.compile(ct.structures.hmm(128, 16, 50), seed=0)
    x = torch.randint(50, (4, 128), generator=torch.Generator().manual_seed(0))
    exact = ct.compile(pc.circuit, dtype=torch.float64)
    exact.load_state_dict({name: p.double() for name, p in pc.state_dict().items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = -pc(x).mean()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(-exact(x).detach().mean()), rel=1e-6)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in pc.parameters())


@pytest.mark.parametrize("optimizer", ["em", "anemone", "viterbi_em", lambda p: torch.optim.Adam(p, lr=0.1)])
def test_fit_inside_autocast_is_fit(optimizer):
    x = torch.randint(3, (40, 5), generator=torch.Generator().manual_seed(0))
    circuits = [ct.compile(ct.structures.hmm(5, 3, 3), seed=0) for _ in range(2)]
    for pc, enabled in zip(circuits, (False, True), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ct.learning.fit(pc, x, optimizer=optimizer, num_epochs=2, progress=False)
    assert all(torch.equal(*pair) for pair in zip(*(pc.bank.values() for pc in circuits), strict=True))


def test_low_rank_tables_are_read_in_full_precision():
    pc = ct.compile(ct.structures.hmm(4, 3, ct.EmbeddingCategorical(30, rank=2)), seed=0)
    x = torch.randint(30, (5, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = pc(x)
    assert torch.equal(found, pc(x).detach())


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_other_dtypes_than_those_of_compile_are_refused(half):
    pc = ct.compile(ct.structures.hmm(4, 3, 5), seed=0)
    before = {name: parameter.clone() for name, parameter in pc.bank.items()}
    for convert in (lambda: pc.to(half), lambda: torch.nn.Sequential(pc).to(half), pc.half, pc.bfloat16):
        with pytest.raises(ct.ArgumentError, match=r"dtype: expected torch.float32 or torch.float64"):
            convert()
    assert all(torch.equal(pc.bank[name], parameter) for name, parameter in before.items())
    assert pc.to(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_counts_of_pairs_are_whole_numbers_under_autocast(half):
    data = torch.randint(3, (3001, 6), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=half):
        found = ct.structures.empirical_mutual_information(data)
    assert torch.equal(found, ct.structures.empirical_mutual_information(data))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_constraints_are_exact_under_autocast(half):
    pc = ct.compile(ct.structures.hmm(6, 4, 7), seed=0)
    automaton = queries.DeterministicAutomaton.from_table(torch.arange(21).reshape(3, 7) % 4 - 1, [0, 1])
    evidence = ct.Evidence.soft(torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0)))

    def answers():
        dist = ct.ConstrainedDistribution(pc, evidence, automaton)
        draws = dist.sample((4,), generator=torch.Generator().manual_seed(0))
        scores = dist.log_prob(draws)
        return [dist.log_partition, dist.log_acceptance, dist.marginal_probs, dist.mean, dist.variance, draws, scores]

    expected = answers()
    with torch.autocast("cpu", dtype=half):
        found = answers()
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, expected, strict=True))
