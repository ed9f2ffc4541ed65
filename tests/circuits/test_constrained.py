"""A circuit under an automaton is the circuit's law on what is accepted: everything against enumeration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from query_cases import RELATIVE, all_assignments, chains, run_weight

import circuits as ct
from circuits.testing.conformance._chi_square import assert_distributed

DFA = ct.queries.DeterministicAutomaton
IMPOSSIBLE = torch.tensor(-torch.inf, dtype=torch.float64)


def law(dist):
    """Return log p(x) of every assignment under a distribution that knows no automaton, (A, B)."""
    x = all_assignments(dist.pc.circuit)
    return dist.log_prob(x.unsqueeze(1).expand(-1, dist.batch_shape[0], -1))


def check(dist, unconstrained, log_weights):
    """Compare with an unconstrained distribution times log-weights of every assignment, (A, B)."""
    log_joint = law(unconstrained) + log_weights
    log_accepted = torch.logsumexp(log_joint, 0)
    torch.testing.assert_close(dist.log_acceptance, log_accepted, **RELATIVE)
    torch.testing.assert_close(dist.log_partition, log_accepted + unconstrained.log_partition, **RELATIVE)
    if bool((log_accepted == -torch.inf).any()):
        for query in (lambda: dist.marginal_probs, lambda: dist.mode, dist.sample):
            with pytest.raises(ct.ImpossibleEvidenceError, match=r"automaton|zero"):
                query()
        return
    expected = log_joint - log_accepted
    torch.testing.assert_close(law(dist), expected, **RELATIVE)
    x = all_assignments(dist.pc.circuit)
    values = torch.arange(max(dist.pc.circuit.num_categories))
    is_value = (x.unsqueeze(-1) == values).double()  # (A, D, C)
    marginals = torch.einsum("ab,adc->bdc", expected.exp(), is_value)
    torch.testing.assert_close(dist.marginal_probs, marginals, **RELATIVE)
    numbers = torch.einsum("ab,ad->bd", expected.exp(), x.double())
    torch.testing.assert_close(dist.mean, numbers, **RELATIVE)
    squares = torch.einsum("ab,ad->bd", expected.exp(), x.double().square())
    torch.testing.assert_close(dist.variance, squares - numbers.square(), rtol=1e-7, atol=1e-9)
    assert bool((dist.log_prob(dist.sample((20,))) > -torch.inf).all())
    assert bool((dist.log_prob(dist.mode) > -torch.inf).all())


def union_of_random_automata(num_automata, num_states, num_values, generator):
    """Return many automata in one, and where each begins: (num_automata, S), bool."""
    table = torch.randint(-1, num_states, (num_automata, num_states, num_values), generator=generator)
    offset = (torch.arange(num_automata) * num_states).view(-1, 1, 1)
    table = torch.where(table >= 0, table + offset, -1).flatten(0, 1)
    accepting = (torch.rand(len(table), generator=generator) < 0.4).nonzero().flatten()
    starts = torch.arange(len(table)) == offset.flatten().unsqueeze(1)
    return DFA.from_table(table, accepting.tolist()), starts


@pytest.mark.parametrize("seed", range(20))
def test_a_thousand_random_automata(seed):
    """Fifty at once: every query begins in an automaton of its own."""
    generator = torch.Generator().manual_seed(seed)
    num_queries, num_values, length = 50, 2 + seed % 2, 3 + (seed % 4 == 0)
    automaton, starts = union_of_random_automata(num_queries, 1 + seed % 4, num_values, generator)
    structure = ct.structures.hmm(length, 1 + seed % 3, num_values, homogeneous=seed % 5 < 3)
    pc = ct.compile(structure, dtype=torch.float64, seed=seed)
    evidence = soft((num_queries, length, num_values), generator)
    x = all_assignments(pc.circuit)
    states = starts.long().argmax(1).repeat(len(x))
    end = automaton.run(x.repeat_interleave(num_queries, 0), states)[:, -1]
    accepted = ((end >= 0) & automaton.accepting[end.clamp_min(0)]).reshape(len(x), num_queries)
    everything = ct.ConstrainedDistribution(pc, evidence, automaton, start=starts)
    possible = accepted.any(0)
    assert torch.equal(everything.log_partition > -torch.inf, possible)
    rows = possible.nonzero().flatten()
    assert 0 < len(rows) < num_queries
    evidence, log_accepted = evidence.rows(rows), torch.where(accepted[:, rows], 0.0, IMPOSSIBLE)
    dist = ct.ConstrainedDistribution(pc, evidence, automaton, start=starts[rows])
    check(dist, ct.CircuitDistribution(pc, evidence), log_accepted)
    draws = dist.sample((50,), generator=generator)
    ends = automaton.run(draws.flatten(0, 1), starts[rows].long().argmax(1).repeat(50))[:, -1]
    assert bool(automaton.accepting[ends].all())
    log_best = ct.queries.mpe(pc, ct.Evidence.observe(x)).log_score  # max over z of log p(x, z)
    log_e = evidence.log_factors[:, torch.arange(length), x].sum(2).t()  # (A, B)
    scores = log_best.unsqueeze(1) + log_e + log_accepted
    mode = (dist.mode.unsqueeze(0) == x.unsqueeze(1)).all(2)  # (A, B)
    torch.testing.assert_close(scores[mode].sort().values, scores.amax(0).sort().values, **RELATIVE)


@given(chains(), st.integers(1, 3), st.integers(0, 1000))
def test_any_chain_and_any_weighted_automaton(case, num_states, seed):
    """Chains read forwards and backwards, with outer products, several leaves a step, sums over leaves."""
    pc, evidence = case
    generator = torch.Generator().manual_seed(seed)
    num_values = max(pc.circuit.num_categories) + 1
    shapes = (num_states, num_values, num_states), (num_states,), (num_states,)
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    automaton = ct.queries.Automaton(*(w.masked_fill(w.abs() < 0.3, -torch.inf) for w in weights))
    unconstrained = ct.CircuitDistribution(pc, evidence)
    dist = ct.ConstrainedDistribution(pc, evidence, automaton)
    if bool((unconstrained.log_partition == -torch.inf).any()):
        assert bool((dist.log_partition == -torch.inf).any())
        return
    log_weights = [run_weight(automaton, x) for x in all_assignments(pc.circuit).tolist()]
    check(dist, unconstrained, torch.stack(log_weights).unsqueeze(1).expand(-1, evidence.batch_size))
    by_query = ct.queries.automaton_log_probability(pc, automaton, evidence)
    torch.testing.assert_close(dist.log_acceptance, by_query, **RELATIVE)


def even_number_of_ones(num_values):
    table = torch.tensor([[0, 1], [1, 0]])[:, torch.arange(num_values).eq(1).long()]
    return DFA.from_table(table, [0])


def soft(shape, generator):
    return ct.Evidence.soft(torch.randn(shape, dtype=torch.float64, generator=generator))


def test_weights_at_both_ends(generator):
    pc = ct.compile(ct.structures.hmm(4, 3, 3), dtype=torch.float64, seed=0)
    evidence = soft((2, 4, 3), generator)
    automaton = even_number_of_ones(3)
    start, accept = (torch.randn(2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    x = all_assignments(pc.circuit)
    is_odd = (x == 1).sum(1) % 2
    log_weights = torch.logsumexp(
        torch.stack([start[:, s] + accept[:, (is_odd + s) % 2].t() for s in range(2)]), 0
    )  # (A, B)
    dist = ct.ConstrainedDistribution(pc, evidence, automaton, start=start, accept=accept)
    check(dist, ct.CircuitDistribution(pc, evidence), log_weights)
    only = ct.ConstrainedDistribution(pc, evidence, automaton, accept=torch.tensor([False, True]))
    check(only, ct.CircuitDistribution(pc, evidence), torch.where(is_odd == 1, 0.0, IMPOSSIBLE)[:, None].expand(-1, 2))


@pytest.mark.parametrize("is_listed", [False, True])
def test_variables_that_are_not_read(is_listed, generator):
    pc = ct.compile(ct.structures.hmm(4, 2, 3), dtype=torch.float64, seed=1)
    reads = torch.tensor([[True, False, True, True], [True, True, True, False]])
    evidence = soft((2, 4, 3), generator)
    if is_listed:
        values = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(8)]).reshape(2, 4, 2)
        missing = torch.tensor([[False, True, False, False], [False, False, False, True]])
        evidence = ct.Evidence.sparse(values, evidence.log_factors[..., :2], missing)
    x = all_assignments(pc.circuit)
    is_even = ((x == 1).unsqueeze(1) & reads).sum(2) % 2 == 0
    dist = ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(3), reads=reads)
    check(dist, ct.CircuitDistribution(pc, evidence), torch.where(is_even, 0.0, IMPOSSIBLE))


EVIDENCE = {
    "observed": lambda g: ct.Evidence.observe(torch.tensor([[1, 0, 2], [2, 2, 1]])),
    "partly observed": lambda g: ct.Evidence.observe(
        torch.tensor([[1, 0, 2], [2, 2, 1]]), torch.tensor([[True, False, False], [False, True, True]])
    ),
    "listed": lambda g: ct.Evidence.sparse(
        torch.tensor([[[0, 1], [2, 1], [1, 0]]] * 2), torch.randn(2, 3, 2, dtype=torch.float64, generator=g)
    ),
    "two lists": lambda g: ct.Evidence.where(
        torch.tensor([[True, False, True], [False, True, True]]),
        EVIDENCE["listed"](g),
        ct.Evidence.observe(torch.tensor([[1, 1, 1], [1, 1, 0]])),
    ),
    "list and nothing": lambda g: ct.Evidence.where(
        torch.tensor([[True, False, True], [False, True, True]]), EVIDENCE["listed"](g), ct.Evidence.nothing(2, 3)
    ),
    "interval": lambda g: ct.Evidence.interval(torch.full((2, 3), -1.0), torch.full((2, 3), 1.0)),
    "relative": lambda g: soft((2, 3, 3), g).relative_to(soft((2, 3, 3), g)),
    "list, relative": lambda g: EVIDENCE["listed"](g).relative_to(EVIDENCE["listed"](g)),
    "latents": lambda g: soft((2, 3, 3), g).with_latents(
        {"transition1": torch.randn(2, 2, dtype=torch.float64, generator=g)}
    ),
}


@pytest.mark.parametrize("kind", EVIDENCE)
def test_all_kinds_of_evidence(kind, generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=2)
    evidence = EVIDENCE[kind](generator)
    is_even = (all_assignments(pc.circuit) == 1).sum(1) % 2 == 0
    log_weights = torch.where(is_even, 0.0, IMPOSSIBLE).unsqueeze(1).expand(-1, 2)
    check(
        ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(3)),
        ct.CircuitDistribution(pc, evidence),
        log_weights,
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_given_at_run_time(normalize, generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=3)
    evidence = soft((2, 3, 3), generator)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    external = {"transition1": draw(2, 2, 2), "emission0": draw(2, 3, 2), "emission2": draw(3, 2)}
    weights = pc.weights(external=external, normalize=normalize)
    is_even = (all_assignments(pc.circuit) == 1).sum(1) % 2 == 0
    check(
        ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(3), weights=weights),
        ct.CircuitDistribution(pc, evidence, weights=weights),
        torch.where(is_even, 0.0, IMPOSSIBLE).unsqueeze(1).expand(-1, 2),
    )


@pytest.mark.parametrize("is_mixed", [False, True])
def test_classes(is_mixed, generator):
    circuit = classes()
    pc = ct.compile(circuit, dtype=torch.float64, seed=4)
    evidence = soft((2, 3, 3), generator)
    if is_mixed:
        evidence = evidence.with_class_prior(torch.tensor([0.3, 0.7], dtype=torch.float64).log())
    else:
        evidence = evidence.with_class(torch.tensor([1, 0]))
    is_even = (all_assignments(circuit) == 1).sum(1) % 2 == 0
    check(
        ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(3)),
        ct.CircuitDistribution(pc, evidence),
        torch.where(is_even, 0.0, IMPOSSIBLE).unsqueeze(1).expand(-1, 2),
    )


def classes():
    leaves = [ct.inputs(var, 2, ct.Categorical(3)) for var in range(3)]
    rest = ct.sum(ct.product(leaves[1], leaves[2]), num_units=2)
    return ct.Circuit(ct.sum(ct.product(leaves[0], rest), num_units=2), num_classes=2)


@pytest.mark.parametrize("kind", ["soft", "class", "run-time weights", "unread", *list(EVIDENCE)[1:]])
def test_samples_have_the_law(kind, generator):
    circuit = classes() if kind == "class" else ct.structures.hmm(3, 2, 3)
    pc, options = ct.compile(circuit, dtype=torch.float64, seed=5), {}
    evidence = EVIDENCE.get(kind, lambda g: soft((2, 3, 3), g))(generator)
    if kind == "class":
        evidence = evidence.with_class_prior(torch.tensor([0.3, 0.7], dtype=torch.float64).log())
    if kind == "run-time weights":
        shapes = {"transition1": (2, 2, 2), "emission0": (2, 3, 2)}
        external = {n: 6 * torch.randn(s, dtype=torch.float64, generator=generator) for n, s in shapes.items()}
        options["weights"] = pc.weights(external=external)
    if kind == "unread":
        options["reads"] = torch.tensor([[True, False, True], [False, True, True]])
    dist = ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(3), **options)
    table = law(dist).detach().t().reshape(2, 3, 3, 3)
    num_samples = 500 if kind == "run-time weights" else 2000
    assert_distributed(lambda n: dist.sample((n,), generator=generator), table, num_samples)


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_at_a_temperature(temperature, is_listed, generator):
    """Explanations, latents and values together, are drawn from p(x, z | e, A)^(1 / tau)."""
    initial, transition, emission = (
        torch.rand(shape, dtype=torch.float64, generator=generator) for shape in ((2,), (2, 2), (2, 3))
    )
    initial, transition, emission = (table / table.sum(-1, keepdim=True) for table in (initial, transition, emission))
    structure = ct.structures.hmm(3, 2, 3, initial=initial, transition=transition, emission=emission)
    pc = ct.compile(structure, dtype=torch.float64)
    evidence = EVIDENCE["listed"](generator) if is_listed else soft((2, 3, 3), generator)
    x = all_assignments(pc.circuit)
    z = torch.cartesian_prod(*[torch.arange(2)] * 3).unsqueeze(1)  # (8, 1, 3)
    log_p = initial[z[..., 0]].log() + transition[z[..., :-1], z[..., 1:]].log().sum(-1)
    log_p = log_p + emission[z, x].log().sum(-1)  # (8, 27)
    log_e = evidence.dense(3, torch.float64)[:, torch.arange(3), x].sum(-1)  # (2, 27)
    is_even = (x == 1).sum(1) % 2 == 0
    scores = torch.logsumexp((log_p.unsqueeze(1) + log_e) / temperature, 0).masked_fill(~is_even, -torch.inf)
    table = torch.log_softmax(scores, 1).reshape(2, 3, 3, 3)
    dist = ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(3))
    assert_distributed(lambda n: dist.sample((n,), generator=generator, temperature=temperature), table, 3000)


def test_autocast_changes_nothing(generator):
    pc = ct.compile(ct.structures.hmm(4, 8, 20), seed=0)
    evidence = ct.Evidence.soft(5 * torch.randn(2, 4, 20, generator=generator))
    dist = ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(20))
        values = under.log_partition, under.marginal_probs, under.log_prob(under.mode)
    expected = dist.log_partition, dist.marginal_probs, dist.log_prob(dist.mode)
    for value, right in zip(values, expected, strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("is_listed", [False, True])
def test_given_latents_and_path_the_values_are_independent_and_accepted(is_listed, generator):
    """sum over (z, path) of p(z, path | e) prod_i p(x_i | z, path), as an average over draws, is the law."""
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=6)
    automaton = even_number_of_ones(3)
    evidence = EVIDENCE["listed"](generator) if is_listed else soft((2, 3, 3), generator)
    dist = ct.ConstrainedDistribution(pc, evidence, automaton)
    choice = dist.sample_latents(10_000, generator=generator)
    values = None if evidence.values is None else evidence.values[choice.query]
    scores = choice.log_weights(values) + evidence.log_factors[choice.query]
    allowed = scores > -torch.inf
    clocks = torch.empty_like(scores).exponential_(generator=generator)
    drawn = torch.where(allowed, -clocks.log(), -torch.inf).argmax(-1)  # of any value that the path allows
    drawn = drawn if values is None else values.gather(2, drawn.unsqueeze(-1)).squeeze(-1)
    assert bool(automaton.accepts(drawn).all())
    given = torch.log_softmax(scores, -1)
    marginals = given.exp().unflatten(0, (10_000, 2)).mean(0)
    torch.testing.assert_close(marginals, dist.listed_marginal_probs.detach(), rtol=0, atol=0.02)


def test_the_best_latents_and_path(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=6)
    evidence, automaton = soft((2, 3, 2), generator), even_number_of_ones(2)
    best = ct.ConstrainedDistribution(pc, evidence, automaton).best_latents()
    draws = ct.ConstrainedDistribution(pc, evidence, automaton).sample_latents(20_000, generator=generator)
    for query in range(2):
        is_own = draws.query == query
        paths = torch.cat([draws.units[0][:, is_own], draws.labels[is_own].t()]).t()
        found, counts = paths.unique(dim=0, return_counts=True)
        mine = torch.cat([best.units[0][:, query], best.labels[query]])
        assert counts[(found == mine).all(1)] > 0.95 * counts.max()


def test_other_evidence(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=7)
    one, two = soft((2, 3, 3), generator), EVIDENCE["listed"](generator)
    reads = torch.tensor([True, False, True])
    dist = ct.ConstrainedDistribution(pc, one, even_number_of_ones(3), reads=reads)
    assert dist.log_partition.shape == dist.marginal_probs.shape[:1]
    fresh = ct.ConstrainedDistribution(pc, two, even_number_of_ones(3), reads=reads)
    torch.testing.assert_close(dist.given(two).log_partition, fresh.log_partition)
    torch.testing.assert_close(dist.given(two).marginal_probs, fresh.marginal_probs)


def test_gradients(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=8)
    factors = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    factors[0, 1, 0] = -torch.inf
    finite = factors[1:].clone().requires_grad_()

    def log_partition(factors):
        return ct.ConstrainedDistribution(pc, ct.Evidence.soft(factors), even_number_of_ones(2)).log_partition

    assert torch.autograd.gradcheck(log_partition, finite)
    one_one = DFA.from_table(torch.tensor([[0, 1], [-1, -1]]), [1])  # only the last is 1: impossible in query 0
    factors.requires_grad_()
    log_z = ct.ConstrainedDistribution(pc, ct.Evidence.soft(factors), one_one).log_partition
    log_z[1].backward()
    assert log_z[0] == -torch.inf
    assert bool(factors.grad.isfinite().all())


def test_nothing_underflows_in_single_precision():
    """The one accepted value has a factor of e^-300, far below the smallest number of float32."""
    pc = ct.compile(ct.structures.hmm(3, 2, 4), seed=9)
    factors = torch.zeros(1, 3, 4)
    factors[..., 3] = -300.0
    only_threes = DFA.from_table(torch.tensor([[-1, -1, -1, 0]]), [0])
    dist = ct.ConstrainedDistribution(pc, ct.Evidence.soft(factors), only_threes)
    expected = pc(torch.tensor([[3, 3, 3]])) - 900
    torch.testing.assert_close(dist.log_partition, expected)
    assert dist.sample().tolist() == dist.mode.tolist() == [[3, 3, 3]]
    torch.testing.assert_close(dist.marginal_probs[0, :, 3], torch.ones(3))


def test_lists_stay_lists(generator, monkeypatch):
    """Nothing of the size of the vocabulary is made of evidence on few values."""
    pc = ct.compile(ct.structures.hmm(3, 2, 50), dtype=torch.float64, seed=10)
    values = torch.stack([torch.randperm(50, generator=generator)[:5] for _ in range(6)]).reshape(2, 3, 5)
    evidence = ct.Evidence.sparse(values, torch.randn(2, 3, 5, dtype=torch.float64, generator=generator))
    dist = ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(50))
    listed = dist.marginal_probs.gather(2, values)

    def refuse(*arguments):
        raise AssertionError("evidence was made dense")

    monkeypatch.setattr(ct.Evidence, "dense", refuse)
    torch.testing.assert_close(dist.listed_marginal_probs, listed)
    assert dist.log_partition.isfinite().all()
    assert dist.log_prob(values[..., 0]).shape == (2,)
    assert dist.sample_latents().labels.shape == (2, 3)


def in_any_order(mode):
    """Three chains whose products are one layer, written leaf first and leaf last, over five or three variables."""

    def mixed(*parts):
        return ct.sum(ct.product(*parts, mode=mode), num_units=2)

    chains = []
    for turn in (1, -1, 1):
        leaves = [ct.inputs(var, 2, ct.Categorical(2)) for var in range(5)]
        rest = mixed(*[*leaves[3:], leaves[2]][::turn])
        chains.append(ct.product(*[leaves[0], leaves[1], rest][::turn], mode=mode))
    return ct.Circuit(ct.sum(*chains, num_units=1))


def many_children():
    """Products of so many factors that they are gathered at once, leaves beside what follows them."""
    leaves = [ct.inputs(var, 2, ct.Categorical(2)) for var in range(7)]
    rest = ct.sum(ct.product(*leaves[5:]), num_units=2)
    return ct.Circuit(ct.sum(ct.product(rest, *leaves[4::-1]), num_units=1))


def leaves_beside_chains():
    """A mixture of the mixtures of one variable is one layer with a mixture of two."""
    leaves = [ct.inputs(var, 2, ct.Categorical(2)) for var in range(4)]
    leaf = ct.sum(ct.sum(leaves[0], num_units=2), num_units=2)
    rest = ct.sum(ct.product(*leaves[2:]), num_units=2)
    return ct.Circuit(ct.sum(ct.product(leaf, ct.sum(ct.product(leaves[1], rest), num_units=2)), num_units=1))


UNUSUAL = {
    "elementwise": lambda: in_any_order("elementwise"),
    "outer": lambda: in_any_order("outer"),
    "many children": many_children,
    "leaves beside chains": leaves_beside_chains,
}


@pytest.mark.parametrize("num_states", [1, 2, 5])
@pytest.mark.parametrize("structure", UNUSUAL)
def test_layers_of_products_that_read_in_several_orders(structure, num_states, generator):
    """Fewer labels than states, and more: the vectors that meet in a layer need not be of one length."""
    pc = ct.compile(UNUSUAL[structure](), dtype=torch.float64, seed=11)
    evidence = soft((2, pc.circuit.num_vars, 2), generator)
    shapes = (num_states, 2, num_states), (num_states,), (num_states,)
    automaton = ct.queries.Automaton(*(torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes))
    count = torch.arange(num_states).unsqueeze(1).add(torch.arange(2)) % num_states
    counting = ct.queries.Automaton.deterministic(count, [0])
    for read in (automaton, counting):
        log_weights = torch.stack([run_weight(read, x) for x in all_assignments(pc.circuit).tolist()])
        dist = ct.ConstrainedDistribution(pc, evidence, read)
        check(dist, ct.CircuitDistribution(pc, evidence), log_weights.unsqueeze(1).expand(-1, 2))
        by_query = ct.queries.automaton_log_probability(pc, read, evidence)
        torch.testing.assert_close(dist.log_acceptance, by_query, **RELATIVE)
    table = law(dist).detach().t().reshape(2, *pc.circuit.num_categories)
    seeds = torch.randint(1 << 40, (2,), generator=generator)
    assert_distributed(lambda n: dist.sample((n,), generator=ct.RowGenerators(seeds)), table, 2000)


@pytest.mark.parametrize("structure", ["hmm", *UNUSUAL])
def test_a_seed_decides_its_row_alone(structure, generator):
    circuit = ct.structures.hmm(4, 3, 2) if structure == "hmm" else UNUSUAL[structure]()
    pc = ct.compile(circuit, dtype=torch.float64, seed=12)
    evidence, seeds = soft((3, pc.circuit.num_vars, 2), generator), torch.tensor([5, 6, 7])
    rows, dist = torch.tensor([2, 0]), ct.ConstrainedDistribution(pc, evidence, even_number_of_ones(2))
    some = ct.ConstrainedDistribution(pc, evidence.rows(rows), even_number_of_ones(2))
    draw = lambda dist, seeds: dist.sample((64,), generator=ct.RowGenerators(seeds))  # noqa: E731
    together, alone = draw(dist, seeds), draw(some, seeds[rows])
    assert torch.equal(together[:, rows], alone)
    assert not torch.equal(draw(some, seeds[rows] + 1), alone)
    with pytest.raises(ct.ArgumentError, match="generator: expected 3 seeds, one per query, got 2"):
        draw(dist, seeds[:2])


def branching():
    leaves = [ct.inputs(var, 2, ct.Categorical(2)) for var in range(4)]
    halves = [ct.sum(ct.product(*pair), num_units=2) for pair in (leaves[:2], leaves[2:])]
    return ct.Circuit(ct.sum(ct.product(*halves), num_units=1))


def test_what_cannot_be_constrained():
    pc = ct.compile(ct.structures.hmm(2, 2, 2), seed=0)
    evidence, automaton = ct.Evidence.nothing(3, 2), even_number_of_ones(2)
    with pytest.raises(ct.PropertyError, match="chain"):
        ct.ConstrainedDistribution(ct.compile(branching(), seed=0), ct.Evidence.nothing(1, 4), automaton)
    gaussian = ct.compile(ct.structures.hmm(2, 2, ct.Gaussian()), seed=0)
    with pytest.raises(ct.PropertyError, match="finitely many"):
        ct.ConstrainedDistribution(gaussian, ct.Evidence.nothing(1, 2), automaton)
    with pytest.raises(ct.ArgumentError, match="automaton: expected one over at least 2 values, got 1"):
        ct.ConstrainedDistribution(pc, evidence, DFA.from_table(torch.tensor([[0]]), [0]))
    with pytest.raises(ct.ArgumentError, match=r"start: expected a tensor of shape \(3, 2\) or \(2,\)"):
        ct.ConstrainedDistribution(pc, evidence, automaton, start=torch.zeros(2, 2))
    with pytest.raises(ct.ArgumentError, match="accept: expected bool, or log-weights"):
        ct.ConstrainedDistribution(pc, evidence, automaton, accept=torch.tensor([0.0, torch.inf]))
    with pytest.raises(ct.ArgumentError, match="reads: expected bool"):
        ct.ConstrainedDistribution(pc, evidence, automaton, reads=torch.ones(3, 2))
    with pytest.raises(ct.ArgumentError, match=r"evidence: expected ct\.Evidence"):
        ct.ConstrainedDistribution(pc, None, automaton)
    with pytest.raises(ct.ArgumentError, match="automaton: expected"):
        ct.ConstrainedDistribution(pc, evidence, torch.zeros(2, 2))
    dist = ct.ConstrainedDistribution(pc, evidence, automaton)
    with pytest.raises(ct.PropertyError, match="it knows nothing of the automaton"):
        dist.query(ct.queries.mutual_information)
    with pytest.raises(ct.PropertyError, match="entropy"):
        dist.entropy()
