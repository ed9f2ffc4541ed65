"""What docs/coming-from.md says of SPFlow: the same mixture has the same likelihoods, explanations and EM there."""

import pytest
import torch

import circuits as ct

pytest.importorskip("spflow", reason="spflow is not installed; it comes with the extra [peers]")
pytestmark = [pytest.mark.filterwarnings("ignore")]  # what SPFlow warns of on import is not ours

from spflow.learn import expectation_maximization, learn_spn  # noqa: E402
from spflow.meta import Scope  # noqa: E402
from spflow.modules import leaves, products, sums  # noqa: E402
from spflow.zoo import hclt, rat  # noqa: E402

K, C = 3, 4


def stochastic(*shape, seed):
    draw = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    return draw / draw.sum(-1, keepdim=True)


LEAVES, WEIGHTS = stochastic(2, K, C, seed=0), stochastic(K, seed=1)


@pytest.fixture
def peer():
    both = leaves.Categorical(Scope([0, 1]), probs=LEAVES[:, :, None].clone())
    return sums.Sum(products.Product(both), weights=WEIGHTS[None, :, None, None].clone())


@pytest.fixture
def pc():
    a, b = (ct.inputs(var, K, ct.Categorical(C), weights=LEAVES[var].t()) for var in (0, 1))
    return ct.compile(ct.Circuit(ct.sum(ct.product(a, b), num_units=1, weights=WEIGHTS[None])), dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randint(C, (40, 2), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def holes(x):
    holes = x.double()
    holes[:20, 1] = torch.nan
    return holes


def close(found, expected):
    torch.testing.assert_close(found, expected.flatten().double(), rtol=1e-5, atol=1e-5)


def test_likelihoods_and_missing_values_agree(pc, peer, x, holes):
    assert peer.log_likelihood(x.float()).shape == (40, 1, 1, 1)
    close(pc(x), peer.log_likelihood(x.float()))
    close(pc(holes), peer.log_likelihood(holes.float()))
    close(ct.transforms.marginalize(pc, [1])(x[:, :1]), peer.marginalize([1]).log_likelihood(x.float()))


@pytest.mark.parametrize(("product", "mode"), [("ElementwiseProduct", "elementwise"), ("OuterProduct", "outer")])
def test_products_multiply_the_same_units(product, mode, x):
    """The sum over both products' units, each with its own weight, tells in which order they come."""
    parts = [leaves.Categorical(Scope([var]), probs=LEAVES[var][None, :, None].clone()) for var in (0, 1)]
    theirs = getattr(products, product)(parts)
    weights = stochastic(theirs.out_shape.channels, seed=3)
    peer = sums.Sum(theirs, weights=weights[None, :, None, None].clone())
    a, b = (ct.inputs(var, K, ct.Categorical(C), weights=LEAVES[var].t()) for var in (0, 1))
    ours = ct.sum(ct.product(a, b, mode=mode), num_units=1, weights=weights[None])
    close(ct.compile(ct.Circuit(ours))(x).double(), peer.log_likelihood(x.float()))


def test_explanations_of_missing_values_are_joint_here_and_made_one_after_the_other_there(pc, peer):
    """By hand: the best component and value together, here; the best component first, then its best value, there."""
    holes = torch.tensor([[value, torch.nan] for value in range(C)], dtype=torch.float64)
    joint = WEIGHTS[:, None, None] * LEAVES[0][:, :, None] * LEAVES[1][:, None]  # (K, C, C)
    ours = ct.queries.mpe(pc, ct.Evidence.observe(holes))
    assert torch.equal(ours.assignment[:, 1], joint.amax(0).argmax(1))
    close(ours.log_score, joint.amax((0, 2)).log())
    given_evidence = peer.sample_with_evidence(holes.float(), is_mpe=True)[:, 1].long()
    assert torch.equal(given_evidence, LEAVES[1][joint.sum(2).argmax(0)].argmax(1))
    without_evidence = peer.mpe(data=holes.float())[:, 1].long()
    assert torch.equal(without_evidence, LEAVES[1][WEIGHTS.argmax()].argmax().expand(C))
    assert not torch.equal(ours.assignment[:, 1], given_evidence)


def test_em_takes_the_same_steps(pc, peer, x):
    history = expectation_maximization(peer, x.float(), max_steps=4)
    result = ct.learning.fit(pc, x, optimizer="em", num_epochs=4, pseudocount=0.0, progress=False)
    close(torch.tensor(result.train_log_likelihood, dtype=torch.float64), history)
    close(pc(x), peer.log_likelihood(x.float()))


def test_the_names_on_the_page_exist(peer):
    assert leaves.Categorical(Scope([0]), out_channels=8, K=3).out_shape.channels == 8
    assert callable(learn_spn)
    assert callable(rat.RatSPN)
    assert callable(hclt.learn_hclt_categorical)
    assert peer.sample(num_samples=5).shape == (5, 2)
    assert callable(peer.sample_with_evidence)
