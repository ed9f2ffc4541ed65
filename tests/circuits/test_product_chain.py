"""Two chains, joined to one over the pairs of their states."""

import pytest
import torch
from transform_cases import assert_same, compiled, joint_of

import circuits as ct

L, A, B, C = 4, 2, 3, 3


def two_chains(homogeneous=True):
    return [compiled(ct.structures.hmm(L, states, C, homogeneous), seed=states) for states in (A, B)]


def common(first, second, step=0):
    """c_ab: how probably the halves of a pair emit the same value at a step."""
    return first.parameters_of(f"emission{step}").T @ second.parameters_of(f"emission{step}")


@pytest.mark.parametrize("homogeneous", [True, False])
def test_a_product_of_densities_is_a_sum_over_the_paths_of_pairs_times_what_their_halves_have_in_common(homogeneous):
    first, second = two_chains(homogeneous)
    pairs = compiled(ct.transforms.product_chain(first, second))
    x = torch.randint(C, (20, L), generator=torch.Generator().manual_seed(0))
    factors = {"initial": common(first, second).log().flatten()}
    for step in range(L - 1):
        after = common(first, second, step + 1).log()
        factors |= {f"factor{step}_{b}": after[:, b] for b in range(B)}
    evidence = ct.Evidence.observe(x).with_latents({name: log.expand(len(x), -1) for name, log in factors.items()})
    expected = first(x) + second(x)
    torch.testing.assert_close(pairs.log_partition(evidence), expected, rtol=1e-9, atol=1e-9)
    total = ct.Evidence.nothing(1, L).with_latents({name: log[None] for name, log in factors.items()})
    multiplied = ct.transforms.multiply(first, second)
    torch.testing.assert_close(pairs.log_partition(total)[0], multiplied.log_partition, rtol=1e-9, atol=1e-9)


def test_it_is_the_product_of_the_distributions_where_all_pairs_have_as_much_in_common():
    first, second = two_chains()
    circulant = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    first.set_weights("emission0", circulant.T)
    second.set_weights("emission0", torch.full((C, B), 1 / C, dtype=torch.float64))
    pairs = compiled(ct.transforms.product_chain(first, second))
    assert_same(joint_of(pairs), joint_of(ct.transforms.multiply(first, second).pc))


@pytest.mark.parametrize(("homogeneous", "num_owners"), [(True, 1), (False, L)])
def test_halves_move_independently_and_a_pair_emits_a_mean_of_what_they_do(homogeneous, num_owners):
    first, second = two_chains(homogeneous)
    circuit = ct.transforms.product_chain(first, second, power=0.5)
    assert len({leaf.tied_to or leaf for leaf in circuit.inputs}) == num_owners * A
    pairs = compiled(circuit)
    starts = [pc.parameters_of("initial")[0] for pc in (first, second)]
    torch.testing.assert_close(pairs.parameters_of("initial")[0], torch.kron(*starts))
    for step in range(L - 1):
        one, two = (pc.parameters_of(f"transition{step}") for pc in (first, second))
        for a in range(A):
            torch.testing.assert_close(pairs.parameters_of(f"transition{step}_{a}"), two)
        for b in range(B):
            torch.testing.assert_close(pairs.parameters_of(f"factor{step}_{b}"), one)
    for step in range(L):
        emissions = [pc.parameters_of(f"emission{step}").T for pc in (first, second)]
        geometric = (emissions[0].unsqueeze(1) * emissions[1]).sqrt()
        expected = geometric / geometric.sum(2, keepdim=True)
        found = torch.stack([pairs.parameters_of(f"emission{step}_{a}").T for a in range(A)])
        torch.testing.assert_close(found, expected)


def test_a_pair_without_a_common_value_emits_the_mean():
    first, second = two_chains()
    first.set_weights("emission0", torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0]]))
    second.set_weights("emission0", torch.tensor([[0.0, 0.2, 1.0], [0.5, 0.8, 0.0], [0.5, 0.0, 0.0]]))
    for power in (0.0, 1.0):
        emission = compiled(ct.transforms.product_chain(first, second, power=power)).parameters_of("emission0_0").T
        expected = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(emission, expected)


@torch.no_grad()
def test_learning_parts_what_the_halves_share():
    first, second = two_chains()
    x = torch.randint(C, (200, L), generator=torch.Generator().manual_seed(0))
    pairs = compiled(ct.transforms.product_chain(first, second))
    before = float(pairs(x).mean())
    ct.learning.fit(pairs, x, optimizer="em", num_epochs=5, progress=False)
    assert float(pairs(x).mean()) > before + 0.01
    assert not torch.allclose(pairs.parameters_of("transition0_0"), pairs.parameters_of("transition0_1"), atol=1e-3)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ct.structures.hmm(L + 1, 2, C), ct.ArgumentError, "second: expected variables with the categories"),
        (lambda: ct.structures.hmm(L, 2, C + 1), ct.ArgumentError, "second: expected variables with the categories"),
        (lambda: ct.structures.hmm(L, 2, C, num_classes=2), ct.PropertyError, "not a chain"),
        (lambda: ct.structures.hmm(2, 2, [C, C]), ct.PropertyError, "second: expected a hidden Markov model of two"),
        (lambda: ct.structures.low_rank_hmm(L, 3, C, 2), ct.PropertyError, "second: expected a hidden Markov model"),
        (lambda: ct.structures.linear_tree(L, 2, C), ct.PropertyError, "second: expected a hidden Markov model"),
        (
            lambda: ct.structures.hclt(torch.zeros(9, L).long(), 2, C),
            ct.PropertyError,
            "second: expected|not a chain",
        ),
    ],
)
def test_what_is_no_pair_of_chains_is_refused(build, error, message):
    first, _ = two_chains()
    with pytest.raises(error, match=message):
        ct.transforms.product_chain(first, compiled(build()))
    with pytest.raises(ct.ArgumentError, match="power: expected an exponent >= 0, got -1"):
        ct.transforms.product_chain(first, first, power=-1)
