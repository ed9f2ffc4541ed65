"""Every query equals brute-force enumeration, on random circuits under random evidence, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from query_cases import all_assignments, compiled_with_evidence

import circuits as ct

RELATIVE = {"rtol": 1e-9, "atol": 1e-9}


@given(compiled_with_evidence())
def test_likelihoods_are_the_enumerated_joint_and_sum_to_one(case):
    pc, _ = case
    joint = ct.testing.enumerate_joint(pc)
    log_p = ct.queries.log_likelihood(pc, all_assignments(pc.circuit))
    torch.testing.assert_close(log_p, joint.flatten(), **RELATIVE)
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64), **RELATIVE)


@given(compiled_with_evidence())
def test_log_partition_is_the_enumerated_sum(case):
    pc, evidence = case
    expected = ct.testing.enumerated_log_partition(ct.testing.enumerate_joint(pc), evidence)
    torch.testing.assert_close(ct.queries.log_partition(pc, evidence), expected, **RELATIVE)


@given(compiled_with_evidence())
def test_marginals_are_the_enumerated_posterior(case):
    pc, evidence = case
    joint = ct.testing.enumerate_joint(pc)
    if bool((ct.testing.enumerated_log_partition(joint, evidence) == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.marginals(pc, evidence)
        return
    expected = ct.testing.enumerated_marginals(joint, evidence)
    torch.testing.assert_close(ct.queries.marginals(pc, evidence), expected, **RELATIVE)
    with torch.no_grad():
        result = ct.queries.marginals(pc, evidence)
    torch.testing.assert_close(result, expected, **RELATIVE)
    torch.testing.assert_close(result.sum(-1), torch.ones_like(result[..., 0]), **RELATIVE)


@given(compiled_with_evidence(), st.data())
def test_marginal_and_conditional_follow_the_chain_rule(case, data):
    pc, _ = case
    x = all_assignments(pc.circuit)
    observed = torch.tensor([[data.draw(st.booleans()) for _ in pc.circuit.num_categories]]).expand_as(x)
    joint = ct.testing.enumerate_joint(pc)
    expected = ct.testing.enumerated_log_partition(joint, ct.Evidence.observe(x, observed))
    log_marginal = ct.queries.log_marginal(pc, x, observed)
    torch.testing.assert_close(log_marginal, expected, **RELATIVE)
    possible = expected > -torch.inf
    log_conditional = ct.queries.log_conditional(pc, x[possible], observed[possible])
    torch.testing.assert_close(log_conditional, (joint.flatten() - expected)[possible], **RELATIVE)
    if not bool(possible.all()):
        with pytest.raises(ct.ImpossibleEvidenceError, match="probability zero"):
            ct.queries.log_conditional(pc, x, observed)


@given(compiled_with_evidence())
def test_mpe_is_the_best_enumerated_explanation(case):
    pc, evidence = case
    scores = ct.testing.enumerate_explanations(pc)
    scored = [
        ct.testing.enumerated_log_partition(scores, ct.Evidence.observe(x[None])) for x in all_assignments(pc.circuit)
    ]
    factors = evidence.dense(max(pc.circuit.num_categories), torch.float64)
    x = all_assignments(pc.circuit)
    evidence_score = factors[:, torch.arange(pc.circuit.num_vars), x].sum(-1)  # (B, all assignments)
    total = torch.cat(scored) + evidence_score
    if bool((total.amax(1) == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.mpe(pc, evidence)
        return
    assignment, log_score = ct.queries.mpe(pc, evidence)
    torch.testing.assert_close(log_score, total.amax(1), **RELATIVE)
    chosen = (assignment.unsqueeze(1) == x).all(-1)
    torch.testing.assert_close(total[chosen], log_score, **RELATIVE)


@given(compiled_with_evidence(max_vars=4))
def test_float32_is_close_to_float64(case):
    pc, evidence = case
    exact = ct.queries.log_partition(pc, evidence)
    single = ct.queries.log_partition(pc.to(torch.float32), evidence)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
