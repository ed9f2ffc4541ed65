"""What nobody observed teaches nothing: learning on padded samples is learning on the samples."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import circuits as ct

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = torch.tensor([0.5, 0.5])
TRANSITION, EMISSION = torch.tensor([[0.6, 0.4], [0.4, 0.6]]), torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
METHODS = ("em", "viterbi_em", "minibatch_em", "anemone")


def chain(length):
    tables = {"initial": HALF, "transition": TRANSITION, "emission": EMISSION}
    return ct.compile(ct.structures.hmm(length, 2, 3, **tables), dtype=torch.float64)


@pytest.fixture(scope="module")
def sequences():
    transition, emission = torch.tensor([[0.95, 0.05], [0.1, 0.9]]), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    model = ct.structures.hmm(10, 2, 3, initial=HALF, transition=transition, emission=emission)
    return ct.queries.sample(ct.compile(model), 300, generator=torch.Generator().manual_seed(0))


def padded(x, length):
    """Return the sequences with missing values at their ends: (data, observed)."""
    data = torch.nn.functional.pad(x, (0, length - x.shape[1]))
    return data, (torch.arange(length) < x.shape[1]).expand(len(x), length)


def tables_of(pc):
    return {name: weights.linear for name, weights in pc.weights().own.items()}


def baum_welch(rows, initial, transition, emission):
    """Return the tables after one step of Baum and Welch's algorithm on rows of any lengths, by numpy."""
    counts = [np.zeros_like(table) for table in (initial, transition, emission)]
    for row in rows:
        alpha = [initial * emission[:, row[0]]]
        for symbol in row[1:]:
            alpha.append(alpha[-1] @ transition * emission[:, symbol])
        beta = [np.ones_like(initial)]
        for symbol in row[:0:-1]:
            beta.insert(0, transition @ (emission[:, symbol] * beta[0]))
        likelihood = alpha[-1].sum()
        counts[0] += alpha[0] * beta[0] / likelihood
        for t, symbol in enumerate(row):
            counts[2][:, symbol] += alpha[t] * beta[t] / likelihood
            if t + 1 < len(row):
                after = emission[:, row[t + 1]] * beta[t + 1]
                counts[1] += alpha[t][:, None] * transition * after / likelihood
    return [count / count.sum(-1, keepdims=True) for count in counts]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [11, 50])
def test_padding_changes_no_step_of_learning(method, length, sequences):
    plain, long = chain(10), chain(length)
    data, observed = padded(sequences, length)
    options = {"optimizer": method, "num_epochs": 5, "progress": False, "batch_size": 64}
    expected = ct.learning.fit(plain, sequences, **options)
    found = ct.learning.fit(long, data, observed=observed, **options)
    assert found.train_log_likelihood == pytest.approx(expected.train_log_likelihood, abs=1e-10)
    for name, table in tables_of(plain).items():
        torch.testing.assert_close(tables_of(long)[name], table, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("method", "right"), [("em", -9.6755), ("viterbi_em", -9.9387)])
def test_fifty_epochs_end_where_those_without_padding_do(method, right, sequences):
    data, observed = padded(sequences, 30)
    pc = chain(30)
    ct.learning.fit(pc, data, observed=observed, optimizer=method, num_epochs=50, pseudocount=0.0, progress=False)
    assert float(ct.queries.log_marginal(pc, data, observed).detach().mean()) == pytest.approx(right, abs=1e-4)


def test_em_on_ragged_rows_is_the_algorithm_of_baum_and_welch(sequences):
    lengths = 1 + torch.arange(40) % 10
    rows = [row[:length].numpy() for row, length in zip(sequences, lengths, strict=False)]
    tables = [table.double().numpy() for table in (HALF, TRANSITION, EMISSION)]
    pc = ct.compile(ct.structures.hmm(17, 2, 3, initial=HALF, transition=TRANSITION, emission=EMISSION), seed=0)
    pc = pc.to(torch.float64)
    data, _ = padded(sequences[:40], 17)
    observed = torch.arange(17) < lengths.unsqueeze(1)
    for _ in range(3):
        ct.learning.fit(pc, data, observed=observed, num_epochs=1, pseudocount=0.0, progress=False)
        tables = baum_welch(rows, *tables)
    found = [pc.log_weights(pc.circuit.node(name)).exp().detach() for name in ("initial", "transition0", "emission0")]
    for ours, right in zip((found[0][0], found[1], found[2].t()), tables, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(right), rtol=1e-6, atol=1e-6)


def test_a_sequence_of_n_symbols_has_n_minus_1_transitions():
    pc, observed = chain(9), torch.arange(9) < torch.tensor([[3], [5]])
    x = torch.randint(3, (2, 9), generator=torch.Generator().manual_seed(0))
    flows = ct.learning.expected_flows(pc, ct.Evidence.observe(x, observed)).flows
    assert float(flows["sum_2x2"].sum()) == pytest.approx(2 + 4)
    assert float(flows["input_3x2"].sum()) == pytest.approx(3 + 5)
    own = ct.learning.top_down_flows(pc, ct.Evidence.observe(x, observed))
    assert float(own["sum_2x2"].sum()) == pytest.approx((2 + 4) / 2)
    assert float(own["input_3x2"].sum()) == pytest.approx((3 + 5) / 2)


@settings(max_examples=40)
@given(st.data())
def test_a_step_where_variables_are_missing_is_one_of_the_circuit_without_them(data):
    """``marginalize`` takes the variables out of the graph, so nothing is left to count."""
    circuit = data.draw(
        ct.testing.circuits(min_vars=2, max_vars=4, max_units=2, families="table", zero_weights=False), label="circuit"
    )
    step = data.draw(st.sampled_from(["em", "hard", "anemone"]), label="step")
    is_merged = any(node.mode == "outer" for node in circuit.nodes if isinstance(node, ct.Product))
    assume(step == "em" or not is_merged)  # where units become equal, their weights become one
    pc = ct.compile(circuit, dtype=torch.float64, seed=data.draw(st.integers(0, 99), label="seed"))
    count = data.draw(st.integers(1, circuit.num_vars - 1), label="missing")
    missing = data.draw(st.permutations(range(circuit.num_vars)), label="order")[:count]
    kept = [var for var in range(circuit.num_vars) if var not in missing]
    x = torch.stack(
        [torch.randint(c, (20,), generator=torch.Generator().manual_seed(c)) for c in circuit.num_categories], 1
    )
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[:, missing] = False
    smaller = ct.transforms.marginalize(pc, missing)
    for model, evidence in ((pc, ct.Evidence.observe(x, observed)), (smaller, ct.Evidence.observe(x[:, kept]))):
        flows_of = ct.learning.viterbi_flows if step == "hard" else ct.learning.expected_flows
        flows = flows_of(model, evidence).flows
        if step == "anemone":
            own = ct.learning.top_down_flows(model, evidence)
            ct.learning.anemone_step(model, flows, 20.0, own_flows=own, pseudocount=0.0)
        else:
            ct.learning.em_step(model, flows, step_size=0.7)
    left = ct.testing.enumerate_joint(ct.transforms.marginalize(pc, missing))
    torch.testing.assert_close(left, ct.testing.enumerate_joint(smaller), rtol=1e-8, atol=1e-8)


def test_clusters_that_learning_starts_from_do_not_see_padding(sequences):
    starts = []
    for length in (10, 25):
        data, observed = padded(sequences, length)
        pc = chain(length)
        ct.learning.initialize_by_kmeans(pc, data, observed=observed, max_samples=100_000)
        starts.append(tables_of(pc))
    for name, table in starts[0].items():
        torch.testing.assert_close(starts[1][name], table, rtol=1e-9, atol=1e-10)


def test_latents_that_are_known_where_nothing_is_observed_are_counted():
    pc, x = chain(3), torch.tensor([[0, 1, 0]])
    observed = torch.tensor([[True, False, False]])
    states = {node: torch.tensor([1]) for node in pc.circuit.inputs}
    ct.batteries.distill_latents(pc, x, states, observed=observed, pseudocount=0.0)
    transition = pc.log_weights(pc.circuit.node("transition0")).exp().detach()
    torch.testing.assert_close(transition[1], torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_pruning_does_not_keep_what_only_padding_uses(sequences):
    data, observed = padded(sequences, 14)
    plain = ct.transforms.prune(chain(10), sequences, fraction=0.3)
    long = ct.transforms.prune(chain(14), ct.Evidence.observe(data, observed), fraction=0.3)
    assert long.num_removed == plain.num_removed
    assert long.max_loss == pytest.approx(plain.max_loss, abs=1e-9)


ADAM, SGD = (lambda p: torch.optim.Adam(p, lr=0.1)), (lambda p: torch.optim.SGD(p, lr=0.1))


@pytest.mark.parametrize("method", [*METHODS, ADAM, SGD], ids=[*METHODS, "adam", "sgd"])
def test_rows_that_observe_nothing_count_nothing(method, sequences):
    x = sequences[:50]
    data = torch.cat([x, torch.zeros_like(x)])
    observed = (torch.arange(100) < 50).unsqueeze(1).expand_as(data)
    options = {"optimizer": method, "num_epochs": 3, "batch_size": 1000, "progress": False}
    options |= {"pseudocount": 1.0} if isinstance(method, str) else {}
    plain, other = chain(10), chain(10)
    expected = ct.learning.fit(plain, x, validation_data=x, **options)
    found = ct.learning.fit(
        other, data, observed=observed, validation_data=data, validation_observed=observed, **options
    )
    assert found.train_log_likelihood == pytest.approx(expected.train_log_likelihood, abs=1e-10)
    assert found.validation_log_likelihood == pytest.approx(expected.validation_log_likelihood, abs=1e-10)
    for name, table in tables_of(plain).items():
        torch.testing.assert_close(tables_of(other)[name], table, rtol=1e-9, atol=1e-10)


def test_data_without_an_observed_value_are_refused():
    data = torch.zeros(5, 4, dtype=torch.int64)
    with pytest.raises(ct.ImpossibleEvidenceError, match="observe nothing"):
        ct.learning.fit(chain(4), data, observed=torch.zeros(5, 4, dtype=torch.bool), progress=False)


def silent_after(x, length, kind):
    """Return evidence that says nothing after ``length`` variables, and the log of the factor it has there."""
    log_factor = {"uniform": -np.log(3), "constant": 1.7}.get(kind, 0.0)
    factors = torch.full((*x.shape, 3), -torch.inf, dtype=torch.float64).scatter(2, x.unsqueeze(-1), 0.0)
    factors[:, length:] = log_factor
    lower, upper = x - 0.5, x + 0.5
    lower[:, length:], upper[:, length:] = -0.5, 7.0
    if kind == "interval":
        return ct.Evidence.interval(lower, upper), 0.0
    if kind == "listed":
        factors[:, length:] = log_factor = 0.3
        return ct.Evidence.sparse(torch.arange(3).expand(*x.shape, 3), factors), log_factor
    return ct.Evidence.soft(factors), log_factor


@pytest.mark.parametrize("kind", ["zero", "uniform", "constant", "listed", "interval"])
@pytest.mark.parametrize("flows_of", [ct.learning.expected_flows, ct.learning.viterbi_flows])
def test_factors_that_all_values_share_say_nothing(kind, flows_of, sequences):
    """The posterior does not depend on them: the flows are those of missing values, and log Z has their sum more."""
    x, pc = sequences[:30], chain(10)
    evidence, log_factor = silent_after(x, 4, kind)
    missing = ct.Evidence.observe(x, (torch.arange(10) < 4).expand_as(x))
    (found, score), (expected, plain) = flows_of(pc, evidence), flows_of(pc, missing)
    for name, flow in expected.items():
        torch.testing.assert_close(found[name], flow, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(score, plain + 6 * log_factor, rtol=1e-10, atol=1e-10)
    own = [ct.learning.top_down_flows(pc, given) for given in (evidence, missing)]
    for name, flow in own[1].items():
        torch.testing.assert_close(own[0][name], flow, rtol=1e-9, atol=1e-10)


def test_impossible_everywhere_is_not_nothing():
    evidence = ct.Evidence.soft(torch.full((1, 3, 3), -torch.inf))
    assert ct.learning.expected_flows(chain(3), evidence).log_likelihood.tolist() == [-torch.inf]


@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_the_bound_of_pruning_is_that_of_the_sequences(fraction, sequences):
    data, observed = padded(sequences, 14)
    plain = ct.transforms.prune(chain(10), sequences, fraction=fraction)
    for rows in (0, 100):
        evidence = ct.Evidence.observe(*(torch.nn.functional.pad(part, (0, 0, 0, rows)) for part in (data, observed)))
        long = ct.transforms.prune(chain(14), evidence, fraction=fraction)
        assert long.num_removed == plain.num_removed
        assert long.max_loss == pytest.approx(plain.max_loss * 300 / (300 + rows), abs=1e-9)


def test_rows_that_tell_no_members_apart_do_not_slow_stacking_down():
    scores = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = ct.batteries.convex_weights(scores, max_steps=20)
    found = ct.batteries.convex_weights(torch.cat([scores, torch.zeros(400, 3)]), max_steps=20)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
