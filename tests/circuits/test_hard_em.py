"""Hard flows count the weights of the most probable explanation, and hard EM never lowers its score."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from learning_cases import CLOSE, drawn, hmm

import circuits as ct
from circuits.learning import em_step, viterbi_flows


@given(st.data())
@settings(max_examples=40)
def test_flows_are_whole_numbers_that_add_up_to_the_score(data):
    circuit = data.draw(ct.testing.circuits())
    pc = ct.compile(circuit, dtype=torch.float64, seed=data.draw(st.integers(0, 100)))
    with torch.no_grad():
        for parameter in pc.bank.values():  # equal weights would share a sample between equally good choices
            parameter.add_(0.01 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.stack(
        [torch.randint(0, count, (3,), generator=torch.Generator().manual_seed(1)) for count in circuit.num_categories],
        1,
    )
    flows, score = viterbi_flows(pc, x)
    assume(bool((score > -torch.inf).all()))
    torch.testing.assert_close(score, ct.queries.mpe(pc, ct.Evidence.observe(x)).log_score, **CLOSE)
    log = {name: weights.log.detach() for name, weights in pc.weights().own.items()}
    total = sum(float((flows[name] * log[name])[flows[name] > 0].sum()) for name in flows)
    assert total == pytest.approx(float(score.sum()), rel=1e-9)
    for flow in flows.values():
        torch.testing.assert_close(flow, flow.round(), **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_flows_of_a_chain_are_those_of_the_best_of_all_paths(seed):
    pc = hmm(seed, num_categories=2)
    node = pc.circuit.node
    start = pc.log_weights(node("initial"))[0]
    step, emit = pc.log_weights(node("transition0")), pc.log_weights(node("emission0"))
    x = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    uses = torch.zeros_like(step)
    for row in x:
        paths = list(itertools.product(range(3), repeat=4))
        scores = [
            start[z[0]]
            + sum(step[a, b] for a, b in itertools.pairwise(z))
            + sum(emit[v, s] for v, s in zip(row, z, strict=True))
            for z in paths
        ]
        best = paths[int(torch.stack(scores).argmax())]
        for a, b in itertools.pairwise(best):
            uses[a, b] += 1
    flows = viterbi_flows(pc, x).flows
    bank, position = pc.bank_address(node("transition0"))
    torch.testing.assert_close(flows[bank][position], uses, **CLOSE)


def test_missing_variables_are_summed_out_and_weights_count():
    pc = hmm(0, num_categories=2)
    x = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1]])
    observed = torch.tensor([[True, True, False, True], [True, True, True, True]])
    flows = viterbi_flows(pc, ct.Evidence.observe(x, observed), torch.tensor([2.0, 0.0])).flows
    once = viterbi_flows(pc, ct.Evidence.observe(x[:1], observed[:1])).flows
    for name in flows:
        torch.testing.assert_close(flows[name], 2 * once[name], **CLOSE)
    emissions = next(flow for name, flow in once.items() if name.startswith("input"))
    assert float(emissions.sum()) == pytest.approx(3.0)


def test_a_step_never_lowers_the_score():
    pc = hmm(1, num_categories=2, homogeneous=False)
    x = drawn(hmm(2, num_categories=2), 200)
    scores = []
    for _ in range(10):
        flows, score = viterbi_flows(pc, x)
        scores.append(float(score.sum()))
        em_step(pc, flows)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(scores))
    assert scores[-1] > scores[0] + 1


def test_fit_by_hard_em_ends_where_the_steps_end():
    x = drawn(hmm(2, num_categories=2), 100)
    stepped, fitted = hmm(1, num_categories=2), hmm(1, num_categories=2)
    for _ in range(5):
        em_step(stepped, viterbi_flows(stepped, x).flows, pseudocount=0.1)
    result = ct.learning.fit(fitted, x, optimizer="viterbi_em", pseudocount=0.1, num_epochs=5, progress=False)
    assert len(result.train_log_likelihood) == 5
    for name, parameter in fitted.bank.items():
        torch.testing.assert_close(parameter, stepped.bank[name], **CLOSE)


def test_impossible_samples_have_no_flow():
    leaf = ct.inputs(0, 1, ct.Categorical(2), weights=torch.tensor([[1.0], [0.0]]))
    pc = ct.compile(ct.Circuit(ct.sum(leaf, num_units=1)), dtype=torch.float64, seed=0)
    flows, score = viterbi_flows(pc, torch.tensor([[0], [1]]))
    assert score.tolist() == [0.0, -torch.inf]
    assert {name: float(flow.sum()) for name, flow in flows.items()} == dict.fromkeys(flows, 1.0)
