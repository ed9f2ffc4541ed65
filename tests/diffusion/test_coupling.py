"""The coupled distribution equals the brute-force product of a circuit and a factorized prediction."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import circuits as ct
from diffusion import CoupledDistribution
from diffusion.errors import ArgumentError, ImpossibleEvidenceError

L, V, B = 3, 4, 2
NORMALIZATIONS = ["global", "local"]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def compiled(circuit, seed=0):
    return ct.compile(circuit, dtype=torch.float64, seed=seed)


def all_blocks():
    return torch.cartesian_prod(*[torch.arange(V)] * L)


def per_block(blocks):
    return blocks.unsqueeze(1).expand(-1, B, -1)


@st.composite
def problems(draw):
    structure = draw(st.sampled_from(["hmm", "mixture", "inhomogeneous hmm"]))
    if structure == "mixture":
        circuit = ct.structures.mixture(L, V, draw(st.integers(1, 3)))
    else:
        circuit = ct.structures.hmm(L, draw(st.integers(1, 3)), V, homogeneous=structure == "hmm")
    pc = compiled(circuit, draw(st.integers(0, 100)))
    number = st.floats(-5, 5, allow_subnormal=False)
    logits = torch.tensor(draw(st.lists(number, min_size=B * L * V, max_size=B * L * V)), dtype=torch.float64)
    logits = logits.reshape(B, L, V)
    if draw(st.booleans()):
        logits[:, :, draw(st.integers(0, V - 1))] = -torch.inf
    tokens = torch.tensor([[draw(st.integers(0, V - 1)) for _ in range(L)] for _ in range(B)])
    masked = torch.tensor([[draw(st.booleans()) for _ in range(L)] for _ in range(B)])
    return pc, logits, tokens, masked


def brute_force(pc, logits, tokens, masked, normalization):
    """Log p_hat of all blocks, (V ** L, B), by enumerating all blocks."""
    log_q = torch.log_softmax(logits, -1)
    blocks = all_blocks()
    q = torch.stack([torch.where(masked, log_q.gather(2, per_block(blocks)[i].unsqueeze(-1)).squeeze(-1), 0.0).sum(-1)
                     for i in range(len(blocks))])  # fmt: skip
    agrees = ((per_block(blocks) == tokens) | masked).all(-1)
    if normalization == "global":
        log_p = ct.testing.enumerate_joint(pc).flatten().unsqueeze(1) + q
    else:
        log_p = torch.stack([local_joint(pc, log_q[b], masked[b]) for b in range(B)], 1)
    log_p = log_p.masked_fill(~agrees, -torch.inf)
    return log_p - torch.logsumexp(log_p, 0)


def local_joint(pc, log_q, masked):
    """Put leaves w_n(v) q_i(v) / Z_n,i in place of masked ones, as given weights of a new circuit, and enumerate it."""

    def replaced(node, children):
        if isinstance(node, ct.Input):
            weights = pc.log_weights(node).detach()
            if bool(masked[node.var]):
                weights = torch.log_softmax(weights + log_q[node.var].unsqueeze(1), 0)
            return ct.inputs(node.var, node.num_units, node.distribution, weights=weights.exp())
        if isinstance(node, ct.Product):
            return ct.product(*children, mode=node.mode)
        weights = pc.log_weights(node).detach().exp()
        return ct.sum(*children, num_units=node.num_units, unit=node.unit, weights=weights)

    new = {}
    for node in pc.circuit.nodes:
        new[node] = replaced(node, [new[child] for child in node.children])
    return ct.testing.enumerate_joint(compiled(ct.Circuit(new[pc.circuit.root]))).flatten()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(problem=problems())
def test_log_prob_and_marginals_are_the_enumerated_ones(normalization, problem):
    pc, logits, tokens, masked = problem
    expected = brute_force(*problem, normalization)
    dist = CoupledDistribution(pc, logits, tokens, masked, normalization=normalization)
    log_prob = dist.log_prob(per_block(all_blocks()))
    torch.testing.assert_close(log_prob, expected, **CLOSE)
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(B, dtype=torch.float64), **CLOSE)
    by_value = torch.stack(
        [(expected.exp().unsqueeze(-1) * (per_block(all_blocks()) == v)).sum(0) for v in range(V)], -1
    )
    torch.testing.assert_close(dist.marginal_probs, by_value, **CLOSE)


@given(problem=problems())
def test_the_global_log_partition_is_the_enumerated_sum(problem):
    pc, logits, tokens, masked = problem
    evidence = ct.Evidence.mixed(tokens, ~masked, torch.log_softmax(logits, -1))
    expected = ct.testing.enumerated_log_partition(ct.testing.enumerate_joint(pc), evidence)
    torch.testing.assert_close(CoupledDistribution(pc, logits, tokens, masked).log_partition, expected, **CLOSE)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_samples_follow_the_distribution(normalization, top_k, generator):
    pc = compiled(ct.structures.hmm(L, 2, V), seed=1)
    logits = torch.randn(B, L, V, dtype=torch.float64, generator=generator)
    masked = torch.tensor([[True, False, True], [True, True, True]])
    dist = CoupledDistribution(
        pc, logits, torch.tensor([[0, 1, 2]] * B), masked, normalization=normalization, top_k=top_k
    )
    num_samples = 20_000
    samples = dist.sample((num_samples,), generator=generator)
    assert samples.shape == (num_samples, B, L)
    code = (samples * torch.tensor([V * V, V, 1])).sum(-1)
    probs = dist.log_prob(per_block(all_blocks())).exp().detach()
    for b in range(B):
        counts = torch.bincount(code[:, b], minlength=V**L)
        possible = probs[:, b] > 0
        assert counts[~possible].sum() == 0
        assert stats.chisquare(counts[possible], probs[possible, b] * num_samples).pvalue > 1e-3


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(problem=problems())
def test_the_mode_of_a_fully_factorized_circuit_is_the_most_probable_block(normalization, problem):
    _, logits, tokens, masked = problem
    pc = compiled(ct.structures.fully_factorized(L, V))
    dist = CoupledDistribution(pc, logits, tokens, masked, normalization=normalization)
    torch.testing.assert_close(dist.log_prob(dist.mode), dist.log_prob(per_block(all_blocks())).amax(0), **CLOSE)


@given(problem=problems())
def test_the_mode_is_the_best_explanation(problem):
    pc, logits, tokens, masked = problem
    dist = CoupledDistribution(pc, logits, tokens, masked)
    factors = ct.Evidence.mixed(tokens, ~masked, torch.log_softmax(logits, -1)).dense(V, torch.float64)
    scores = ct.testing.enumerate_explanations(pc).flatten().unsqueeze(1)
    scores = scores + factors[:, torch.arange(L), all_blocks()].sum(-1).t()
    code = (dist.mode * torch.tensor([V * V, V, 1])).sum(-1)
    torch.testing.assert_close(scores[code, torch.arange(B)], scores.amax(0), **CLOSE)


def uniform_circuit():
    leaves = [ct.inputs(i, 2, ct.Categorical(V), weights=torch.full((V, 2), 1 / V)) for i in range(L)]
    return compiled(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(problem=problems())
def test_a_uniform_circuit_leaves_the_factorized_model(normalization, problem):
    _, logits, tokens, masked = problem
    dist = CoupledDistribution(uniform_circuit(), logits, tokens, masked, normalization=normalization)
    log_q = torch.log_softmax(logits, -1)
    blocks = torch.where(masked, per_block(all_blocks()), tokens)
    expected = torch.where(masked, log_q.expand(len(blocks), B, L, V).gather(-1, blocks.unsqueeze(-1)).squeeze(-1), 0.0)
    torch.testing.assert_close(dist.log_prob(blocks), expected.sum(-1), **CLOSE)
    expected = torch.where(masked.unsqueeze(-1), log_q.exp(), torch.nn.functional.one_hot(tokens, V).double())
    torch.testing.assert_close(dist.marginal_probs, expected, **CLOSE)


@given(problem=problems(), position=st.integers(0, L - 1))
def test_with_one_open_token_it_is_the_product_of_the_two_conditionals(problem, position):
    pc, logits, tokens, _ = problem
    masked = torch.zeros(B, L, dtype=torch.bool)
    masked[:, position] = True
    x = tokens.repeat_interleave(V, 0)
    x[:, position] = torch.arange(V).repeat(B)
    log_p = ct.queries.log_likelihood(pc, x).reshape(B, V)
    expected = torch.softmax(log_p + logits[:, position], -1)
    dist = CoupledDistribution(pc, logits, tokens, masked)
    torch.testing.assert_close(dist.marginal_probs[:, position], expected, **CLOSE)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_gradients_to_logits_and_weights(normalization, top_k, generator):
    pc = compiled(ct.structures.hmm(L, 2, V), seed=2)
    logits = torch.randn(B, L, V, dtype=torch.float64, generator=generator, requires_grad=True)
    tokens, masked = torch.tensor([[0, 1, 2], [3, 3, 0]]), torch.tensor([[True, False, True], [True, True, False]])

    def log_prob(logits):
        dist = CoupledDistribution(pc, logits, tokens, masked, normalization=normalization, top_k=top_k, include=tokens)
        return dist.log_prob(tokens)

    assert torch.autograd.gradcheck(log_prob, (logits,))
    parameters = list(pc.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(log_prob(logits).sum(), parameters), strict=True):
        numeric = torch.empty_like(grad)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in parameter.shape)):
            step = torch.zeros_like(parameter)
            step[tuple(index)] = 1e-6
            values = []
            for change in (step, -2 * step, step):
                with torch.no_grad():
                    parameter.add_(change)
                    values.append(log_prob(logits).sum())
            numeric[tuple(index)] = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(grad, numeric, rtol=1e-5, atol=1e-7)


@given(problem=problems())
def test_all_tokens_listed_is_the_dense_evidence(problem):
    pc, logits, tokens, masked = problem
    log_q, values = torch.log_softmax(logits, -1).sort(-1)
    listed = CoupledDistribution.from_listed(pc, values, log_q, tokens, masked)
    dense = CoupledDistribution(pc, logits, tokens, masked)
    torch.testing.assert_close(listed.log_partition, dense.log_partition, **CLOSE)
    torch.testing.assert_close(listed.marginal_probs, dense.marginal_probs, **CLOSE)


def test_top_k_keeps_observed_and_included_tokens(generator):
    pc = compiled(ct.structures.hmm(L, 2, V))
    logits = torch.randn(B, L, V, dtype=torch.float64, generator=generator)
    worst = logits.argmin(-1)
    masked = torch.tensor([[True, False, True], [False, False, True]])
    dropped = CoupledDistribution(pc, logits, worst, masked, top_k=1)
    assert (dropped.log_prob(worst) == -torch.inf).all()
    kept = CoupledDistribution(pc, logits, worst, masked, top_k=1, include=worst)
    assert kept.log_prob(worst).isfinite().all()
    assert (kept.marginal_probs.gather(-1, worst.unsqueeze(-1)).squeeze(-1)[~masked] == 1).all()


def test_an_impossible_product_raises():
    leaf = ct.inputs(0, 1, ct.Categorical(2), weights=torch.tensor([[1.0], [0.0]]))
    pc = compiled(ct.Circuit(ct.sum(leaf, num_units=1)))
    logits = torch.tensor([[[-torch.inf, 0.0]]])
    dist = CoupledDistribution(pc, logits, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    for query in (
        lambda: dist.sample(),
        lambda: dist.mode,
        lambda: dist.marginal_probs,
        lambda: dist.log_prob(dist.tokens),
    ):
        with pytest.raises(ImpossibleEvidenceError, match="rule out every text"):
            query()


def test_extreme_logits_give_no_nan(generator):
    pc = ct.compile(ct.structures.hmm(L, 3, V), seed=0)
    logits = (1e4 * torch.randn(B, L, V, generator=generator)).requires_grad_()
    tokens, masked = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    for normalization in NORMALIZATIONS:
        dist = CoupledDistribution(pc, logits, tokens, masked, normalization=normalization)
        value = dist.log_prob(tokens).sum()
        assert value.isfinite()
        grads = torch.autograd.grad(value, [logits, *pc.parameters()])
        assert all(grad.isfinite().all() for grad in grads)
        torch.testing.assert_close(dist.marginal_probs.sum(-1), torch.ones(B, L))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(B, L, V + 1)}, "logits: the circuit has 3 variables of \\[4\\] categories"),
        ({"logits": torch.zeros(B, L)}, "logits: expected floating point"),
        ({"logits": torch.full((B, L, V), torch.nan)}, "logits: expected rows with at least one finite entry"),
        ({"tokens": torch.zeros(B, L)}, "tokens: expected int64"),
        ({"masked": torch.zeros(B, L)}, "masked: expected bool"),
        ({"normalization": "both"}, "normalization: expected one of"),
        ({"top_k": 0}, "top_k: expected an integer >= 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "pc": compiled(ct.structures.hmm(L, 2, V)),
        "logits": torch.zeros(B, L, V),
        "tokens": torch.zeros(B, L, dtype=torch.int64),
        "masked": torch.ones(B, L, dtype=torch.bool),
    }
    with pytest.raises(ArgumentError, match=message):
        CoupledDistribution(**{**arguments, **change})
