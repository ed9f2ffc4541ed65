"""Mixtures of circuits, and their components asked one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from query_cases import RELATIVE, compiled_with_evidence, evidence_scores

import circuits as ct

DOUBLE = torch.float64


def member(pc, k):
    """The k-th component of a mixture, as a circuit of its own with the same weights."""
    alone = ct.compile(ct.Circuit(pc.circuit.root.children[k]), dtype=DOUBLE)
    for node in (*alone.circuit.sums, *alone.circuit.inputs):
        alone.set_weights(node, pc.log_weights(node).exp().detach())
    return alone


def mixed(seed=0, *, parts=None):
    made = ct.structures.mixture_of(
        parts or [ct.structures.hmm(3, 4, 3), ct.structures.fully_factorized(3, 3), ct.structures.hmm(3, 2, 3)]
    )
    return ct.compile(made, dtype=DOUBLE, seed=seed)


def test_a_mixture_is_the_weighted_mean_of_its_components():
    parts = [ct.structures.hmm(3, 2, 3), ct.structures.fully_factorized(3, 3)]
    weights = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    pc = ct.compile(ct.structures.mixture_of(parts, weights=weights), dtype=DOUBLE, seed=0)
    joints = torch.stack([ct.testing.enumerate_joint(member(pc, k)).exp() for k in range(2)], -1)
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), joints @ weights, **RELATIVE)
    assert pc.circuit.node("member0.transition1").num_units == 2
    assert pc.log_weights("members").exp().tolist() == [pytest.approx([0.3, 0.7])]
    equal = ct.compile(ct.structures.mixture_of(parts))
    assert equal.log_weights("members").exp().tolist() == [pytest.approx([0.5, 0.5])]


def test_components_with_classes_are_mixed_class_by_class():
    parts = [ct.structures.hmm(2, 2, 2, num_classes=3) for _ in range(2)]
    pc = ct.compile(ct.structures.mixture_of(parts, weights=torch.tensor([0.2, 0.8])), dtype=DOUBLE, seed=0)
    roots = [ct.compile(ct.Circuit(root, num_classes=3), dtype=DOUBLE) for root in pc.circuit.root.children]
    x = torch.tensor(list(itertools.product(range(2), repeat=2)))
    for alone in roots:
        for node in (*alone.circuit.sums, *alone.circuit.inputs):
            alone.set_weights(node, pc.log_weights(node).exp().detach())
    expected = 0.2 * roots[0](x).exp() + 0.8 * roots[1](x).exp()
    torch.testing.assert_close(pc(x).exp(), expected, rtol=1e-6, atol=1e-9)


@given(st.data())
@settings(max_examples=20)
def test_the_root_mixes_what_its_components_say(data):
    """Z(e) = sum_k w_k Z_k(e) in random circuits, with evidence on latents and weights given at run time too."""
    pc, evidence = data.draw(compiled_with_evidence())
    if not isinstance(pc.circuit.root, ct.Sum):
        return
    components = ct.queries.component_log_partition(pc, evidence)
    log_z = torch.logsumexp(pc.log_weights(pc.circuit.root) + components, 1)
    torch.testing.assert_close(log_z, ct.queries.log_partition(pc, evidence), **RELATIVE)


def test_components_are_those_of_enumeration(generator):
    pc = mixed()
    evidence = ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator))
    scores = evidence_scores(pc.circuit, evidence)
    expected = torch.stack(
        [torch.logsumexp(ct.testing.enumerate_joint(member(pc, k)).flatten() + scores, 1) for k in range(3)], 1
    )
    torch.testing.assert_close(ct.queries.component_log_partition(pc, evidence), expected, **RELATIVE)
    with torch.no_grad():
        torch.testing.assert_close(ct.queries.component_log_partition(pc, evidence), expected.detach(), **RELATIVE)
    weighed = evidence.with_latents({"members": torch.randn(2, 3, dtype=DOUBLE, generator=generator)})
    torch.testing.assert_close(ct.queries.component_log_partition(pc, weighed), expected, **RELATIVE)
    impossible = ct.Evidence.soft(torch.zeros(1, 3, 3, dtype=DOUBLE))
    pc.set_weights("member0.initial", torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    pc.set_weights("member0.emission0", torch.tensor([[1.0, 0.0, 0.0]] * 4).T)
    impossible = ct.Evidence.observe(torch.ones(1, 3, dtype=torch.int64))
    found = ct.queries.component_log_partition(pc, impossible)
    assert found[0, 0] == -torch.inf
    assert bool(found[0, 1:].isfinite().all())


@pytest.mark.parametrize("with_weights", [False, True])
def test_components_are_differentiable_in_evidence_latents_and_weights(with_weights, generator):
    """With a chain of many equal steps, which is evaluated at once, beside others."""
    pc = mixed(parts=[ct.structures.hmm(8, 3, 2), ct.structures.fully_factorized(8, 2), ct.structures.hmm(8, 2, 2)])
    factors, hint = (torch.randn(2, *shape, dtype=DOUBLE, generator=generator) for shape in ((8, 2), (3,)))
    table = torch.randn(3, 3, dtype=DOUBLE, generator=generator)

    def components(factors, hint, table):
        evidence = ct.Evidence.soft(factors).with_latents({"member0.transition2": hint})
        weights = pc.weights(external={"member0.transition1": table}) if with_weights else None
        return ct.queries.component_log_partition(pc, evidence, weights=weights)

    inputs = tuple(tensor.requires_grad_() for tensor in (factors, hint, table))
    assert torch.autograd.gradcheck(components, inputs)
    (grad,) = torch.autograd.grad(components(*inputs)[:, 0].sum(), pc.bank[pc.bank_address("member0.transition0")[0]])
    assert bool((grad != 0).any())


def test_a_circuit_without_a_mixture_at_its_root_has_no_components():
    leaf = ct.compile(ct.Circuit(ct.product(ct.inputs(0, 1, ct.Categorical(2)), ct.inputs(1, 1, ct.Categorical(2)))))
    for pc in (leaf, ct.compile(ct.structures.hmm(2, 2, 2, num_classes=2))):
        with pytest.raises(ct.PropertyError, match="component_log_partition: expected a circuit with one root unit"):
            ct.queries.component_log_partition(pc, ct.Evidence.nothing(1, 2))


def test_what_cannot_be_mixed_is_named():
    with pytest.raises(ct.ArgumentError, match="components: expected one or more circuits"):
        ct.structures.mixture_of([])
    with pytest.raises(ct.StructureError, match="components: expected equally many classes"):
        ct.structures.mixture_of([ct.structures.hmm(2, 2, 2), ct.structures.hmm(2, 2, 2, num_classes=2)])
    with pytest.raises(ct.StructureError, match="weights: expected a table of shape"):
        ct.structures.mixture_of([ct.structures.hmm(2, 2, 2)], weights=torch.ones(2) / 2)
