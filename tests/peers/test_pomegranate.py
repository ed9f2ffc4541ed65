"""What docs/coming-from.md says of pomegranate: the same model has the same likelihoods, posteriors and EM there."""

import pytest
import torch

import circuits as ct

pytest.importorskip("pomegranate", reason="pomegranate is not installed; it comes with the extra [peers]")
pytestmark = [pytest.mark.filterwarnings("ignore")]  # what pomegranate's torch calls warn of is not ours

from pomegranate import distributions as peer  # noqa: E402
from pomegranate.bayes_classifier import BayesClassifier  # noqa: E402
from pomegranate.bayesian_network import BayesianNetwork  # noqa: E402
from pomegranate.gmm import GeneralMixtureModel  # noqa: E402
from pomegranate.hmm import DenseHMM, SparseHMM  # noqa: E402

K, C, D, L = 3, 4, 2, 6


def stochastic(*shape, seed):
    draw = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.05
    return draw / draw.sum(-1, keepdim=True)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.detach().double(), rtol=2e-5, atol=2e-5)


WEIGHTS, LEAVES = stochastic(K, seed=0), stochastic(D, K, C, seed=1)
X = torch.randint(C, (200, D), generator=torch.Generator().manual_seed(2))


def components():
    return [
        peer.IndependentComponents([peer.Categorical(LEAVES[d, k : k + 1].clone()) for d in range(D)]) for k in range(K)
    ]


def mixture():
    pc = ct.compile(ct.structures.mixture(D, C, num_components=K), dtype=torch.float64, seed=0)
    for leaf in pc.circuit.inputs:
        pc.set_weights(leaf, LEAVES[leaf.var].t())
    pc.set_weights(pc.circuit.root, WEIGHTS[None])
    return pc


def check_same_weights(pc, model):
    close(pc.log_weights(pc.circuit.root)[0].exp(), model.priors)
    for leaf in pc.circuit.inputs:
        probs = torch.cat([part.distributions[leaf.var].probs for part in model.distributions])
        close(pc.parameters_of(leaf).t(), probs)


def test_likelihoods_of_mixtures_agree():
    close(mixture()(X), GeneralMixtureModel(components(), priors=WEIGHTS).log_probability(X))


@pytest.mark.parametrize("family", ["Bernoulli", "Normal", "Poisson"])
def test_likelihoods_of_mixtures_of_other_families_agree(family):
    rates = stochastic(K, seed=3) + 0.1
    scales = stochastic(K, seed=4) + 0.5
    theirs = {
        "Bernoulli": lambda k: peer.Bernoulli(rates[k : k + 1]),
        "Normal": lambda k: peer.Normal(rates[k : k + 1], scales[k : k + 1], covariance_type="diag"),
        "Poisson": lambda k: peer.Poisson(rates[k : k + 1] * 5),
    }
    ours = {
        "Bernoulli": (ct.Bernoulli(), torch.stack([1 - rates, rates])),
        "Normal": (ct.Gaussian(), torch.stack([rates, scales.sqrt()])),  # pomegranate's Normal has variances
        "Poisson": (ct.Poisson(), (rates * 5)[None]),
    }
    distribution, parameters = ours[family]
    leaf = ct.inputs(0, K, distribution, weights=parameters)
    pc = ct.compile(ct.Circuit(ct.sum(leaf, num_units=1, weights=WEIGHTS[None])), dtype=torch.float64)
    x = (torch.arange(2) if family == "Bernoulli" else torch.arange(6))[:, None]
    x = x.float() + 0.25 if family == "Normal" else x
    model = GeneralMixtureModel([theirs[family](k) for k in range(K)], priors=WEIGHTS)
    close(pc(x.double() if family == "Normal" else x), model.log_probability(x))


def test_a_step_of_em_is_the_same():
    model, pc = GeneralMixtureModel(components(), priors=WEIGHTS), mixture()
    model.summarize(X)
    model.from_summaries()
    ct.learning.em_step(pc, ct.learning.expected_flows(pc, X).flows, pseudocount=0.0)
    check_same_weights(pc, model)


def test_sample_weights_count_the_same():
    weights = torch.rand(len(X), generator=torch.Generator().manual_seed(5)) + 0.1
    model, pc = GeneralMixtureModel(components(), priors=WEIGHTS, max_iter=1, tol=0.0), mixture()
    model.fit(X, sample_weight=weights)
    ct.learning.fit(
        pc, X, optimizer="em", num_epochs=1, sample_weights=weights.double(), pseudocount=0.0, progress=False
    )
    check_same_weights(pc, model)


def test_naive_bayes_is_their_bayes_classifier():
    pc = ct.compile(ct.structures.naive_bayes(D, C, K), dtype=torch.float64, seed=0)
    for leaf in pc.circuit.inputs:
        if leaf.var < D:
            pc.set_weights(leaf, LEAVES[leaf.var].t())
    pc.set_weights(pc.circuit.node("prior"), WEIGHTS[None])
    with_class = torch.cat([X, torch.zeros(len(X), 1, dtype=torch.int64)], 1)
    evidence = ct.Evidence.observe(with_class, torch.tensor([True, True, False]).expand_as(with_class))
    model = BayesClassifier(components(), priors=WEIGHTS)
    close(ct.queries.marginals(pc, evidence)[:, D, :K], model.predict_proba(X))


def hmm_tables(transition):
    return {"initial": stochastic(K, seed=6), "transition": transition, "emission": stochastic(K, C, seed=7)}


def states(tables):
    return [peer.Categorical(tables["emission"][k : k + 1]) for k in range(K)]


SEQUENCES = torch.randint(C, (8, L), generator=torch.Generator().manual_seed(8))


def test_dense_hmms_agree_when_every_state_may_end_a_sequence():
    """Without ``ends`` pomegranate gives each state the probability 1/K to end in, a constant factor."""
    tables = hmm_tables(stochastic(K, K, seed=9))
    log_p = ct.compile(ct.structures.hmm(L, K, C, **tables), dtype=torch.float64)(SEQUENCES)
    for ends, factor in ((torch.ones(K), 1.0), (None, 1 / K)):
        model = DenseHMM(states(tables), edges=tables["transition"], starts=tables["initial"], ends=ends)
        close(log_p + torch.tensor(factor).log(), model.log_probability(SEQUENCES[..., None]))


def test_sparse_hmms_are_zero_weights():
    transition = stochastic(K, K, seed=9)
    transition[0, 2] = transition[2, 0] = 0.0
    tables = hmm_tables(transition / transition.sum(1, keepdim=True))
    ours, nodes = ct.compile(ct.structures.hmm(L, K, C, **tables), dtype=torch.float64), states(tables)
    pairs = tables["transition"].nonzero().tolist()
    edges = [(nodes[i], nodes[j], float(tables["transition"][i, j])) for i, j in pairs]
    model = SparseHMM(nodes, edges=edges, starts=tables["initial"], ends=torch.ones(K))
    close(ours(SEQUENCES), model.log_probability(SEQUENCES[..., None]))


def network_data():
    generator = torch.Generator().manual_seed(10)
    x = torch.randint(2, (400, 5), generator=generator)
    for var in range(1, 5):
        copies = torch.rand(400, generator=generator) < 0.8
        x[:, var] = torch.where(copies, x[:, (var - 1) // 2], x[:, var])
    return x


def test_a_chow_liu_tree_of_theirs_is_the_one_below_our_latents():
    x = network_data()
    model = BayesianNetwork(algorithm="chow-liu").fit(x)
    edges = {frozenset((child, parent)) for child, parents in enumerate(model.structure) for parent in parents}
    ours = {node.scope for node in ct.structures.hclt(x, 2).sums}

    def scopes_below(root):
        """Return the scopes of all subtrees of more than one variable, the whole tree among them."""
        found = set()

        def scope(var, above):
            below = [other for edge in edges if var in edge for other in edge - {var} if other != above]
            whole = frozenset([var]).union(*(scope(child, var) for child in below))
            if below:
                found.add(whole)
            return whole

        scope(root, None)
        return found

    assert edges == {frozenset(edge) for edge in ((0, 1), (0, 2), (1, 3), (1, 4))}
    assert ours in [scopes_below(root) for root in range(5)]


def test_posteriors_of_a_network_with_missing_values_are_marginals():
    """x_0 -> x_1 -> x_2 as a chain whose states are visible: an HMM that emits its state."""
    start, first, second = stochastic(1, 2, seed=11), stochastic(2, 2, seed=12), stochastic(2, 2, seed=13)
    a, b, c = peer.Categorical(start), peer.ConditionalCategorical([first]), peer.ConditionalCategorical([second])
    model = BayesianNetwork([a, b, c], [(a, b), (b, c)])
    x = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1]])
    observed = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    theirs = torch.stack(model.predict_proba(torch.masked.MaskedTensor(x, observed)), 1)
    chain = ct.structures.hmm(
        3, 2, 2, homogeneous=False, initial=start[0], transition=torch.stack([first, second]),
        emission=torch.eye(2).expand(3, 2, 2),
    )  # fmt: skip
    pc = ct.compile(chain, dtype=torch.float64)
    close(ct.queries.marginals(pc, ct.Evidence.observe(x, observed)), theirs)
