"""Everything that is computed with a circuit on another device is what the CPU computes, in float64.

The other device is a GPU where there is one, and a pretended one everywhere, see ``tests/pretended_device.py``.
"""

from collections.abc import Mapping

import pytest
import torch

import circuits as ct

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
FAMILIES = {
    "categorical": ct.Categorical(4),
    "bernoulli": ct.Bernoulli(),
    "binomial": ct.Binomial(3),
    "logistic": ct.DiscretizedLogistic(4),
    "embedding": ct.EmbeddingCategorical(4, 2),
    "gaussian": ct.Gaussian(),
    "poisson": ct.Poisson(),
}


def on_cpu(result):
    """Return what a query returned as a flat list of tensors on the CPU."""
    if isinstance(result, torch.Tensor):
        return [result.detach().cpu()]
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in on_cpu(part)]
    return [torch.tensor(result)]


def assert_same(found, expected):
    found, expected = on_cpu(found), on_cpu(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def both(circuit, elsewhere, seed=0):
    """Return one circuit on the CPU and the same one elsewhere."""
    return (
        ct.compile(circuit, dtype=torch.float64, seed=seed),
        ct.compile(circuit, dtype=torch.float64, seed=seed, device=elsewhere.device),
    )


def chain(**options):
    return ct.structures.hmm(5, 3, 4, **options)


def soft_evidence(num_vars=5, num_values=4, batch_size=3):
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(batch_size, num_vars, num_values, dtype=torch.float64, generator=generator)
    return ct.Evidence.soft(factors.masked_fill(factors < -1.5, -torch.inf))


def integers(num_samples=40, num_vars=5, num_values=4, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_values, (num_samples, num_vars), generator=generator)


QUERIES = {
    "log_partition": ct.queries.log_partition,
    "marginals": ct.queries.marginals,
    "mpe": ct.queries.mpe,
    "latent_marginals": ct.queries.latent_marginals,
    "latent_entropy": ct.queries.latent_entropy,
    "entropy_bounds": ct.queries.entropy_bounds,
    "pairwise_marginals": ct.queries.pairwise_marginals,
    "mutual_information": ct.queries.mutual_information,
    "mean": ct.queries.mean,
    "variance": ct.queries.variance,
    "covariance": ct.queries.covariance,
    "fourth moment": lambda pc, e: ct.queries.moments(pc, 4, e, about="mean"),
    "product": lambda pc, e: ct.queries.expectation(pc, torch.full((5, 4), 0.5), e, of="product"),
    "k_best": lambda pc, e: ct.queries.k_best(pc, 3, e),
    "log_inner_product": lambda pc, e: ct.queries.log_inner_product(pc, pc, e),
    "cauchy_schwarz": lambda pc, e: ct.queries.cauchy_schwarz_divergence(pc, pc, e),
    "order": ct.queries.order_log_probability,
}


@pytest.mark.parametrize("name", QUERIES)
def test_queries(name, elsewhere):
    pc, there = both(chain(), elsewhere)
    evidence = soft_evidence()
    assert_same(QUERIES[name](there, evidence.to(elsewhere.device)), QUERIES[name](pc, evidence))


@pytest.mark.parametrize(
    "circuit", [ct.structures.quad_graph((2, 3), 3, ct.Categorical(4)), chain()], ids=["quad", "hmm"]
)
def test_likelihoods_and_gradients(circuit, elsewhere):
    x = integers(num_vars=circuit.num_vars)
    observed = x > 0
    found = []
    for pc in both(circuit, elsewhere):
        given, mask = x.to(pc.device), observed.to(pc.device)
        log_p = pc(given)
        gradients = torch.autograd.grad(log_p.sum(), list(pc.parameters()))
        marginal, conditional = (q(pc, given, mask) for q in (ct.queries.log_marginal, ct.queries.log_conditional))
        found.append([log_p, marginal, conditional, *gradients])
    assert_same(*found)


def test_chains_of_weights_given_at_run_time(elsewhere):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6), (2, 3, 3), (6, 3, 3), (6, 3, 2), (3, 2), (6, 3, 3), (3, 3)]
    tensors = [torch.rand(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    x = integers(num_samples=6, num_vars=6)
    found = []
    for pc in both(ct.structures.hmm(6, 3, 4), elsewhere):
        gates, tables, dense, u, v, others, table = made = [t.to(pc.device).requires_grad_() for t in tensors]
        forms = [ct.weights.Gates(gates.t(), tables), dense, ct.weights.LowRank(u, v), others, table]
        external = {f"transition{step}": form for step, form in enumerate(forms)}
        log_p = ct.queries.log_likelihood(pc, x.to(pc.device), weights=pc.weights(external=external))
        found.append([log_p, *torch.autograd.grad(log_p.sum(), made)])
    assert_same(*found)


def in_two_orders():
    leaves = [ct.inputs(var, 3, ct.Categorical(4)) for var in range(5)]
    rest = ct.sum(ct.product(*leaves[1:]), num_units=3)
    return ct.Circuit(ct.sum(ct.product(leaves[0], rest), ct.product(rest, leaves[0]), num_units=1))


@pytest.mark.parametrize("circuit", [chain(), in_two_orders()], ids=["hmm", "two orders"])
def test_under_an_automaton(circuit, elsewhere):
    counting = torch.tensor([[0, 1, 0, 2], [1, 2, 0, 0], [2, 0, 1, 1]])
    automaton, found = ct.queries.DeterministicAutomaton.from_table(counting, [0]), []
    for pc in both(circuit, elsewhere):
        dist = ct.ConstrainedDistribution(pc, soft_evidence().to(pc.device), automaton)
        seeds = ct.RowGenerators(torch.tensor([5, 6, 7], device=pc.device))
        weighted = ct.queries.Automaton.deterministic(counting, [0])
        log_p = ct.queries.automaton_log_probability(pc, weighted, soft_evidence().to(pc.device))
        found.append([dist.log_partition, dist.marginal_probs, dist.mode, dist.sample((4,), generator=seeds), log_p])
    assert_same(*found)


@pytest.mark.parametrize("form", ["sparse", "mixed", "interval", "where", "latents"])
def test_forms_of_evidence(form, elsewhere):
    pc, there = both(chain(), elsewhere)
    factors = soft_evidence().log_factors
    x = integers(3)

    def built(device):
        on = factors.to(device)
        if form == "sparse":
            best, values = on.topk(2, -1)
            return ct.Evidence.sparse(values, best, x.to(device) == 0)
        if form == "mixed":
            return ct.Evidence.mixed(x.to(device), x.to(device) > 1, on)
        if form == "interval":
            return ct.Evidence.interval(x.to(device).double() - 2, x.to(device).double() + 1)
        if form == "where":
            return ct.Evidence.where(x.to(device) > 1, ct.Evidence.observe(x.to(device)), ct.Evidence.soft(on))
        return ct.Evidence.soft(on).with_latents({"transition1": on[:, 0, :3]})

    for query in (ct.queries.log_partition, ct.queries.marginals, ct.queries.mpe):
        assert_same(query(there, built(elsewhere.device)), query(pc, built("cpu")))
        assert_same(query(there, built("cpu").to(elsewhere.device)), query(pc, built("cpu")))


def test_the_device_of_the_evidence_is_named(elsewhere):
    _, there = both(chain(), elsewhere)
    for call in (there, lambda x: ct.queries.log_likelihood(there, x)):
        with pytest.raises(ct.ArgumentError, match=r"evidence: expected it on .*evidence\.to"):
            call(integers())


def test_samples_follow_the_posterior(elsewhere):
    _, there = both(chain(), elsewhere)
    evidence = soft_evidence(batch_size=2).to(elsewhere.device)
    samples = ct.queries.sample(there, 4000, evidence, elsewhere.generator())
    assert samples.device == there.device
    again = ct.queries.sample(there, 4000, evidence, elsewhere.generator())
    assert torch.equal(samples.cpu(), again.cpu())
    frequencies = torch.nn.functional.one_hot(samples.cpu(), 4).double().mean(0)
    torch.testing.assert_close(frequencies, ct.queries.marginals(there, evidence).detach().cpu(), rtol=0, atol=0.04)


def test_distinct_samples(elsewhere):
    _, there = both(chain(), elsewhere)
    evidence = soft_evidence(batch_size=1).to(elsewhere.device)
    drawn = ct.queries.sample_without_replacement(there, 20, evidence, elsewhere.generator())
    rows = drawn.assignment.cpu()[0]
    assert len(rows.unique(dim=0)) == 20
    log_p = there(rows.to(elsewhere.device)) - ct.queries.log_partition(there, evidence)
    factors = evidence.log_factors.cpu()[0].gather(1, rows.t()).sum(0)
    torch.testing.assert_close(drawn.log_prob.cpu()[0], log_p.detach().cpu() + factors, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_input_families(name, elsewhere):
    pc, there = both(ct.structures.mixture(3, FAMILIES[name], 3), elsewhere)
    x = integers(8, 3, 2).double()
    x[0, 1] = torch.nan
    for query in (ct.queries.log_likelihood, lambda pc, x: ct.queries.mpe(pc, ct.Evidence.observe(x))):
        assert_same(query(there, x.to(elsewhere.device)), query(pc, x))
    for query in (ct.queries.mean, ct.queries.variance):
        assert_same(query(there, None), query(pc, None))
    bound = x.nan_to_num(1.0) if name in ("gaussian", "poisson") else x.nan_to_num(1.0).long()
    assert_same(ct.queries.log_cdf(there, bound.to(elsewhere.device)), ct.queries.log_cdf(pc, bound))
    samples = ct.queries.sample(there, 5, ct.Evidence.observe(x).to(elsewhere.device), elsewhere.generator())
    known = ~x.isnan().expand(5, -1, -1)
    torch.testing.assert_close(samples.cpu().double()[known], x.expand(5, -1, -1)[known])
    found = []
    for each in (pc, there):
        ct.learning.fit(each, x, num_epochs=2, progress=False)
        found.append(list(each.parameters()))
    assert_same(*found)


def test_classes(elsewhere):
    circuit = ct.structures.rat_spn(5, 2, 2, 3, ct.Categorical(4), num_classes=3, seed=0)
    x, labels = integers(), torch.arange(40) % 3
    found = []
    for pc in both(circuit, elsewhere):
        ct.learning.fit(pc, x, labels=labels, num_epochs=2, progress=False)
        evidence = ct.Evidence.observe(x).to(pc.device)
        posterior = ct.queries.class_posterior(pc, evidence, torch.tensor([0.0, 0.5, 1.0]).to(pc.device))
        of_class = ct.queries.log_partition(pc, evidence.with_class(labels.to(pc.device)))
        found.append([posterior, of_class, pc(x.to(pc.device)), ct.queries.mpe(pc, evidence.with_class(1))])
        ct.learning.fit(pc, x, labels=labels, num_epochs=2, optimizer="anemone", progress=False)
        found[-1].append(pc(x.to(pc.device)))
    assert_same(*found)


def test_weights_at_run_time(elsewhere):
    pc, there = both(chain(), elsewhere)
    evidence = soft_evidence()
    table = torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    emission = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = []
    for each in (pc, there):
        banks = each.weights(external={"transition1": table.to(each.device), "emission2": emission.to(each.device)})
        given = evidence.to(each.device)
        queries = (ct.queries.log_partition, ct.queries.marginals, ct.queries.mpe, ct.queries.latent_entropy)
        found.append([query(each, given, weights=banks) for query in queries])
        assert ct.queries.sample(each, 2, given, weights=banks).device == each.device
    assert_same(*found)


@pytest.mark.parametrize("optimizer", ["em", "minibatch_em", "anemone", "viterbi_em", "adam"])
def test_learning(optimizer, elsewhere, tmp_path):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.05)

    x = integers(60)
    options = {"optimizer": adam if optimizer == "adam" else optimizer, "batch_size": 16, "progress": False}
    options |= {"observed": x > 0, "validation_data": x[:10], "sample_weights": torch.linspace(0.5, 1.5, 60).double()}
    found = []
    for pc in both(chain(), elsewhere):
        result = ct.learning.fit(pc, x, num_epochs=3, **options)
        found.append([*pc.parameters(), *result.train_log_likelihood, *result.validation_log_likelihood])
    assert_same(*found)


@pytest.mark.parametrize("optimizer", ["em", "anemone", "adam"])
def test_an_interrupted_fit_goes_on_elsewhere(optimizer, elsewhere, tmp_path):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.05)

    options = {"optimizer": adam if optimizer == "adam" else optimizer, "batch_size": 16, "progress": False}
    pc, there = both(chain(), elsewhere)
    whole, _ = both(chain(), elsewhere)
    path = tmp_path / "run.safetensors"
    ct.learning.fit(pc, integers(), num_epochs=2, checkpoint_path=path, **options)
    ct.learning.fit(there, integers(), num_epochs=4, checkpoint_path=path, **options)
    ct.learning.fit(whole, integers(), num_epochs=4, **options)
    assert_same(list(there.parameters()), list(whole.parameters()))


def test_flows(elsewhere):
    x = integers()
    found = []
    for pc in both(ct.structures.quad_graph((2, 3), 3, ct.Categorical(4)), elsewhere):
        evidence = ct.Evidence.observe(integers(num_vars=6)).to(pc.device)
        flows = ct.learning.expected_flows(pc, evidence)
        found.append([flows, ct.learning.top_down_flows(pc), ct.learning.viterbi_flows(pc, evidence)])
        state = ct.learning.anemone_step(pc, flows.flows, float(len(x)))
        ct.learning.em_step(pc, flows.flows, pseudocount=0.1, entropy=0.1, step_size=0.5)
        found[-1] += [state.flows, list(pc.parameters()), ct.batteries.roughness(pc)]
    assert_same(*found)


def test_starts(elsewhere):
    x = integers(60, 6)
    latents = ct.structures.hclt(x, 3, 4, seed=0)
    for begin in (
        lambda pc: ct.learning.initialize_inputs(pc, x, by="quantiles"),
        lambda pc: ct.learning.initialize_inputs(pc, x, bandwidth=1.0),
        lambda pc: ct.learning.initialize_by_kmeans(pc, x),
        lambda pc: ct.batteries.distill_latents(pc, x, {pc.circuit.inputs[0]: x[:, 0] % 3}),
    ):
        found = []
        for pc in both(latents, elsewhere):
            begin(pc)
            found.append(list(pc.parameters()))
        assert_same(*found)


TRANSFORMS = {
    "condition": lambda pc, x: ct.transforms.condition(pc, ct.Evidence.observe(x[:1], x[:1] > 1)),
    "marginalize": lambda pc, x: ct.transforms.marginalize(pc, [1, 3]),
    "permute": lambda pc, x: ct.transforms.permute(pc, [4, 3, 2, 1, 0]),
    "grow": lambda pc, x: ct.transforms.grow(pc, seed=0),
    "prune": lambda pc, x: ct.transforms.prune(pc, x, fraction=0.3).pc,
    "trim": lambda pc, x: ct.transforms.trim(pc),
    "merge": lambda pc, x: ct.transforms.merge_equal_units(pc),
    "multiply": lambda pc, x: ct.transforms.multiply(pc, pc).pc,
    "untie": lambda pc, x: ct.transforms.untie_parameters(pc),
    "combine": lambda pc, x: ct.batteries.convex_combination([pc, pc]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations(name, elsewhere):
    pc, there = both(chain(), elsewhere)
    x = integers()
    expected, found = TRANSFORMS[name](pc, x), TRANSFORMS[name](there, x.to(elsewhere.device))
    assert found.device == there.device
    assert_same(list(found.parameters()), list(expected.parameters()))


def test_the_tables_of_a_chain(elsewhere):
    chains = [ct.transforms.to_chain(pc) for pc in both(chain(), elsewhere)]
    assert_same(*([c.initial, *c.transition, *c.emission] for c in reversed(chains)))


def test_files(elsewhere, tmp_path):
    pc, there = both(chain(), elsewhere)
    ct.save(there, tmp_path / "there")
    for device in ("cpu", elsewhere.device):
        loaded = ct.load(tmp_path / "there", device=device)
        assert loaded.device == torch.device(device)
        assert_same(list(loaded.parameters()), list(pc.parameters()))
    moved = there.to("cpu")
    assert_same(moved(integers()), pc(integers()))


def test_structures_from_data_elsewhere(elsewhere):
    x = integers(200, 6)
    there = x.to(elsewhere.device)
    for build in (
        lambda data: ct.structures.hclt(data, 3, 4, seed=0),
        lambda data: ct.batteries.learn_spn(data, seed=0),
    ):
        assert repr(build(there)) == repr(build(x))
    assert torch.equal(ct.learning.kmeans(there.double(), 3).cpu(), ct.learning.kmeans(x.double(), 3))


def test_as_a_torch_distribution(elsewhere):
    pc, there = both(chain(), elsewhere)
    evidence = soft_evidence()
    found = []
    for each in (pc, there):
        dist = ct.CircuitDistribution(each, evidence.to(each.device))
        found.append([dist.log_prob(integers(3).to(each.device)), dist.mean, dist.variance])
        assert dist.sample((2,)).device == each.device
    assert_same(*found)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # on import of pyjuice
def test_exchange_with_pyjuice(elsewhere, tmp_path):
    pc, there = both(chain(), elsewhere)
    ct.interop.save_jpc(there, tmp_path / "there.jpc")
    loaded = ct.interop.load_jpc(tmp_path / "there.jpc", device=elsewhere.device, dtype=torch.float64)
    x = integers()
    torch.testing.assert_close(loaded(x.to(elsewhere.device)).detach().cpu(), pc(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_estimator(elsewhere):
    pytest.importorskip("sklearn")
    x = integers(60).numpy()
    found = []
    for device in ("cpu", elsewhere.device):
        model = ct.CircuitDensity("hmm", device=device, num_latents=2, num_epochs=2, random_state=0).fit(x)
        found.append(torch.from_numpy(model.score_samples(x)))
        assert model.sample(3).shape == (3, 5)
    assert_same(*found)


def test_a_continuous_mixture(elsewhere):
    if elsewhere.pretended is not None:
        pytest.skip("torch.random.fork_rng knows real devices alone")
    options = {"num_components": 16, "num_points": 16, "latent_dim": 2, "hidden_units": 8, "num_steps": 4}
    fitted = ct.batteries.fit_continuous_mixture(integers(50).to(elsewhere.device), 4, progress=False, **options)
    assert fitted.pc.device == elsewhere.device
