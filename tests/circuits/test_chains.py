"""Chains of equal steps are evaluated as one recurrence; it gives what the layers give, one by one."""

import pytest
import torch

import circuits as ct
from circuits.chains import finding as schedules
from circuits.chains import recurrence
from circuits.engine.question import Question

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(params=["steps", "blocks", "device"])
def schedule(request, monkeypatch):
    """All ways of evaluating a chain; as on a device, where steps are PyTorch's calls, blocks too."""
    monkeypatch.setattr(recurrence, "_FEW_PRODUCTS", 0 if request.param == "steps" else 1 << 30)
    monkeypatch.setattr(recurrence, "_MANY_STEPS", 1)
    monkeypatch.setattr(recurrence, "_block_length", lambda states: 3)
    if request.param == "device":
        monkeypatch.setattr(recurrence, "_SMALL_STEP", 0)
        monkeypatch.setattr(recurrence, "_SMALL_MAXIMUM", 0)


def compiled(circuit, monkeypatch, *, shortest=4, **options):
    with monkeypatch.context() as patch:
        patch.setattr(schedules, "_SHORTEST", shortest)
        pc = ct.compile(circuit, seed=1, **{"dtype": torch.float64, **options})
    assert any(step.chain for step in pc.schedule) == (shortest < 100)
    return pc


def answers(pc, evidence):
    """Log Z, its gradient in all parameters, flows, and the posteriors of all latents and variables."""
    log_z = pc(evidence)
    gradients = torch.autograd.grad(log_z.sum(), list(pc.parameters()))
    flows, log_likelihood = ct.learning.expected_flows(pc, evidence)
    latents = ct.queries.latent_marginals(pc, evidence)
    marginals = ct.queries.marginals(pc, evidence)
    with torch.no_grad():
        plain = pc(evidence)
    return [log_z, plain, *gradients, *flows.values(), log_likelihood, *latents.values(), marginals]


def padded(batch_size, length, num_categories):
    """Observations with holes, that end at several places, one of them with nothing at all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(num_categories, (batch_size, length), generator=generator)
    ends = torch.randint(length + 1, (batch_size, 1), generator=generator)
    ends[0] = 0
    observed = (torch.rand(x.shape, generator=generator) < 0.8) & (torch.arange(length) < ends)
    return ct.Evidence.observe(x, observed)


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize(("length", "num_states"), [(6, 3), (17, 2), (33, 5)])
def test_a_chain_gives_what_its_layers_give(schedule, monkeypatch, length, num_states, homogeneous):
    circuit = ct.structures.hmm(length, num_states, 4, homogeneous)
    evidence = padded(5, length, 4)
    factors = {f"transition{t}": torch.randn(5, num_states, dtype=torch.float64) for t in (0, 3)}
    for asked in (evidence, evidence.with_latents(factors)):
        found = answers(compiled(circuit, monkeypatch), asked)
        expected = answers(compiled(circuit, monkeypatch, shortest=100), asked)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_a_chain_without_ties_chooses_what_its_layers_choose(schedule, monkeypatch):
    circuit, evidence = ct.structures.hmm(40, 5, 4, homogeneous=False), padded(6, 40, 4)
    pc, layers = compiled(circuit, monkeypatch), compiled(circuit, monkeypatch, shortest=100)
    for temperature in (1.0, 0.5):
        one, other = (
            ct.queries.sample(asked, 3, evidence, ct.RowGenerators(torch.arange(6)), temperature=temperature)
            for asked in (pc, layers)
        )
        assert torch.equal(one, other)
    path, expected = (ct.queries.viterbi(asked, evidence) for asked in (pc, layers))
    torch.testing.assert_close(path.log_score, expected.log_score, **CLOSE)
    assert torch.equal(path.path, expected.path)


def test_sums_that_mix_products_of_more_factors_begin_a_chain_of_their_own():
    """Steps emit two variables in the second half, one in the first, and share one transition."""
    owner, states, num_vars = None, ct.inputs(0, 2, ct.Categorical(3)), 1
    for step in range(12):
        owner = ct.sum(states, num_units=2, tied_to=owner) if owner else ct.sum(states, num_units=2, name="transition")
        emitted = [ct.inputs(num_vars + i, 2, ct.Categorical(3)) for i in range(1 + (step < 6))]
        states, num_vars = ct.product(*emitted, owner), num_vars + len(emitted)
    pc = ct.compile(ct.Circuit(ct.sum(states, num_units=1, name="root")), seed=0, dtype=torch.float64)
    assert sum(step.chain is not None for step in pc.schedule) == 2
    x = torch.randint(3, (4, num_vars), generator=torch.Generator().manual_seed(0))
    below = {leaf.var: pc.log_weights(leaf).exp()[x[:, leaf.var]] for leaf in pc.circuit.inputs}
    y, var = below[0], 1
    for step in range(12):
        y = y @ pc.log_weights("transition").exp().t()
        for _ in range(1 + (step < 6)):
            y, var = y * below[var], var + 1
    torch.testing.assert_close(pc(x), (y @ pc.log_weights("root").exp().t()).squeeze(1).log(), **CLOSE)


def test_a_sum_of_one_unit_of_each_child_ends_no_chain():
    """It has as many weights as a step, but two children."""
    ends = [ct.inputs(0, 2, ct.Categorical(3)) for _ in range(2)]
    last = ct.sum(*ends, num_units=2, unit=1, name="last")
    node = last
    for var in range(1, 7):
        node = ct.sum(ct.product(ct.inputs(var, 2, ct.Categorical(3)), node), num_units=2, tied_to=last)
    pc = ct.compile(ct.Circuit(ct.sum(node, num_units=1)), seed=0, dtype=torch.float64)
    x = torch.randint(3, (5, 7), generator=torch.Generator().manual_seed(0))
    below = {leaf: pc.log_weights(leaf).exp()[x[:, leaf.var]] for leaf in pc.circuit.inputs}
    table = pc.log_weights("last").exp().t()
    y = torch.stack([below[end][:, 1] for end in ends], 1) @ table
    for leaf in sorted(set(below) - set(ends), key=lambda leaf: leaf.var):
        y = (below[leaf] * y) @ table
    root = pc.log_weights(pc.circuit.root).exp().t()
    torch.testing.assert_close(pc(x), (y @ root).squeeze(1).log(), **CLOSE)


def test_the_log_likelihood_is_that_of_the_forward_algorithm(schedule, monkeypatch):
    pc = compiled(ct.structures.hmm(40, 3, 4), monkeypatch)
    x = torch.randint(4, (7, 40), generator=torch.Generator().manual_seed(0))
    tables = {name: pc.log_weights(name).exp().detach() for name in ("initial", "transition0", "emission0")}
    alpha = tables["initial"] * tables["emission0"][x[:, 0]]
    for step in range(1, 40):
        alpha = alpha @ tables["transition0"] * tables["emission0"][x[:, step]]
    torch.testing.assert_close(pc(x), alpha.sum(1).log(), **CLOSE)


def test_sums_below_what_linear_space_can_hold_are_exact(schedule, monkeypatch):
    transition = torch.tensor([[1.0, 0.0], [1e-30, 1.0]])  # back to the first state all but never
    emission = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    circuit = ct.structures.hmm(8, 2, 2, transition=transition, emission=emission, initial=torch.tensor([0.5, 0.5]))
    pc = compiled(circuit, monkeypatch, dtype=torch.float32)
    x = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0]])
    log_p = pc(x)
    log_half = torch.tensor(0.5).log()
    torch.testing.assert_close(log_p[:2], torch.stack([log_half + torch.tensor(1e-30).log(), log_half]))
    assert log_p[2] == -torch.inf
    log_p[:2].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in pc.parameters())


def test_whatever_the_weights_float32_gives_what_layers_give_in_float64(schedule, monkeypatch):
    for seed, scale in enumerate((2.0, 8.0, 16.0, 30.0)):
        generator = torch.Generator().manual_seed(seed)
        transition, emission = ((torch.randn(3, n, generator=generator) * scale).softmax(1) for n in (3, 4))
        circuit = ct.structures.hmm(60, 3, 4, transition=transition.clamp_min(1e-37), emission=emission)
        evidence = padded(6, 60, 4)
        pc = compiled(circuit, monkeypatch, dtype=torch.float32)
        layers = compiled(circuit, monkeypatch, shortest=100)
        for one, other in zip(answers(pc, evidence), answers(layers, evidence), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("many", [1, 1 << 30])
def test_what_underflows_before_it_is_scaled_up_is_not_lost(schedule, monkeypatch, many):
    """Of state 2 at step 1 all but nothing comes from state 0, whose 1e-46 is divided by a maximum of 1e-22."""
    monkeypatch.setattr(recurrence, "_MANY_NUMBERS", many)
    rare, weak = 1e-25, 1e-20
    transition = torch.tensor([[rare, rare, 1.0], [0.9, 0.1, rare], [1.0, rare, rare]], dtype=torch.float64)
    factors = torch.tensor([[0, 0, 1], [weak, weak, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.float64)
    circuit = ct.structures.hmm(5, 3, 3, initial=torch.ones(3) / 3, transition=transition, emission=torch.eye(3))
    pc = compiled(circuit, monkeypatch, dtype=torch.float32)
    y = torch.ones(3, dtype=torch.float64)
    for step in (4, 3, 2, 1):
        y = transition @ (factors[step] * y)
    found = pc(ct.Evidence.soft(factors.log().float().unsqueeze(0)))
    torch.testing.assert_close(found.double(), (factors[0] * y).mean().log().unsqueeze(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("stay", "is_forgotten"), [(0.2, True), (0.999, False)])
def test_blocks_from_guesses_count_only_where_guesses_are_forgotten(monkeypatch, stay, is_forgotten):
    length, num_states = 700, 12
    mixed = torch.rand(num_states, num_states, generator=torch.Generator().manual_seed(0)).softmax(1)
    transition = stay * torch.eye(num_states) + (1 - stay) * mixed
    circuit = ct.structures.hmm(length, num_states, 4, transition=transition)
    observed = torch.ones(3, length, dtype=torch.bool)
    observed[1, 650:] = observed[2, 40:90] = False
    evidence = ct.Evidence.observe(
        torch.randint(4, observed.shape, generator=torch.Generator().manual_seed(0)), observed
    )
    guessed = []

    def spied(*args, original=recurrence._side_by_side, **options):
        guessed.append(original(*args, **options))
        return guessed[-1]

    monkeypatch.setattr(recurrence, "_side_by_side", spied)
    pc = compiled(circuit, monkeypatch)
    found, path = answers(pc, evidence), ct.queries.viterbi(pc, evidence)
    assert guessed
    assert all((one is not None) == is_forgotten for one in guessed)
    monkeypatch.setattr(recurrence, "_side_by_side", lambda *args, **options: None)
    for one, other in zip(found, answers(pc, evidence), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    step_by_step = ct.queries.viterbi(pc, evidence)
    torch.testing.assert_close(path.log_score, step_by_step.log_score, **CLOSE)
    assert torch.equal(path.path, step_by_step.path)


def test_blocks_are_exact_or_refused_where_entries_between_them_underflow():
    num_exact = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        transition = 10 ** (torch.rand(2, 2, generator=generator) * -24).fill_diagonal_(0.0)
        runs = torch.randint(1, 9, (150,), generator=generator)  # of steps that favour the same state
        factors = 10 ** (torch.rand(150, 2, 1, generator=generator) * -9)
        factors = (factors / factors.amax(1, keepdim=True)).repeat_interleave(runs, 0)[:150]
        peak = torch.zeros(150, 1, 1)
        found = recurrence.rise_of_sums(transition, factors.log(), peak, None, every=4, in_blocks=True)
        if found is None:
            continue
        num_exact += 1
        log_y = torch.zeros(2, dtype=torch.float64)
        for factor in factors.double().log().flip(0):
            log_y = (transition.double().log() + (factor[:, 0] + log_y)).logsumexp(1)
        log_found = found.results[0, :, 0].double().log() + found.scales.double().log().sum()
        torch.testing.assert_close(log_found, log_y, rtol=1e-5, atol=1e-3)
    assert num_exact


def test_a_guess_of_what_turns_out_to_be_impossible_is_not_soon_forgotten(monkeypatch):
    emission = torch.tensor([0.5, 0.125, 0.375]).repeat(16, 1)
    emission[0] = torch.tensor([0.5, 0.5, 0.0])  # value 1 is best in state 0, which value 2, much later, rules out
    circuit = ct.structures.hmm(1024, 16, 3, transition=torch.eye(16), emission=emission)
    x = torch.zeros(1, 1024, dtype=torch.int64)
    x[0, :80], x[0, 900] = 1, 2
    found = ct.queries.viterbi(compiled(circuit, monkeypatch), ct.Evidence.observe(x))
    layers = ct.queries.viterbi(compiled(circuit, monkeypatch, shortest=2000), ct.Evidence.observe(x))
    torch.testing.assert_close(found.log_score, layers.log_score, **CLOSE)
    assert 0 not in found.path


def test_second_derivatives_go_through_the_layers(schedule, monkeypatch):
    pc = compiled(ct.structures.hmm(7, 2, 3), monkeypatch)
    factors = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda f: pc(ct.Evidence.soft(f)), (factors,))


def test_a_chain_moves_copies_and_samples_like_any_circuit(monkeypatch):
    import copy

    pc = compiled(ct.structures.hmm(12, 3, 4), monkeypatch)
    layered = compiled(ct.structures.hmm(12, 3, 4), monkeypatch, shortest=100)
    draws = [ct.queries.sample(c, 50, generator=torch.Generator().manual_seed(0)) for c in (pc, layered)]
    assert torch.equal(*draws)
    moved = copy.deepcopy(pc).to(torch.float32)
    torch.testing.assert_close(moved(draws[0]).double(), pc(draws[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "circuit",
    [
        ct.structures.hmm(4, 2, 3),
        ct.structures.linear_tree(8, 2, 3),
    ],
)
def test_other_circuits_have_no_chain(circuit):
    pc = ct.compile(circuit, seed=0)
    assert not any(step.chain for step in pc.schedule)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_large_steps_give_what_layers_give_without_a_gradient_and_by_segments_with_one(monkeypatch, homogeneous):
    circuit = ct.structures.hmm(40, 32, 4, homogeneous=homogeneous)
    evidence = padded(65, 40, 4).with_latents({"transition3": torch.randn(65, 32, dtype=torch.float64)})
    found = answers(compiled(circuit, monkeypatch), evidence)
    expected = answers(compiled(circuit, monkeypatch, shortest=100), evidence)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    silenced = Question(compiled(circuit, monkeypatch), evidence).silenced()
    with torch.no_grad():
        assert silenced.silent
        torch.testing.assert_close(silenced.log_z, expected[0].detach(), **CLOSE)


def test_large_steps_that_underflow_are_exact_without_a_gradient():
    """A half of the states is left for the other one once in 1e30 steps; that happened twice, one after the other."""
    size = 32
    transition = torch.eye(size).clamp_min(1e-30)
    emission = torch.zeros(size, 2)
    emission[: size // 2, 0] = emission[size // 2 :, 1] = 1.0
    initial = torch.full((size,), 1 / size)
    pc = ct.compile(ct.structures.hmm(6, size, 2, transition=transition, emission=emission, initial=initial))
    x = torch.tensor([[1, 1, 0, 1, 1, 1]]).expand(64, -1)
    with torch.no_grad():
        log_p = pc(x)
    expected = torch.tensor(0.5).log() + 2 * (torch.tensor(1e-30).log() + torch.tensor(size / 2).log())
    torch.testing.assert_close(log_p, expected.expand(64), rtol=1e-5, atol=1e-5)
