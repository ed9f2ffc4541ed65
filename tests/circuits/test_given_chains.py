"""Chains whose weights are given at run time are one recurrence too; it gives what the tables, written out, give."""

import pytest
import torch

import circuits as ct
from circuits.chains import chain as chains
from circuits.chains import finding, recurrence
from circuits.engine.question import Question
from circuits.weights import Gates, LowRank

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
KINDS = ("gates", "relative", "shared gates", "low rank", "table", "tables", "some", "all")


@pytest.fixture(params=["arrays", "device"])
def calls(request, monkeypatch):
    """As on a processor, and as on a device, where steps are PyTorch's calls."""
    if request.param == "device":
        monkeypatch.setattr(recurrence, "_SMALL_STEP", 0)


@pytest.fixture
def scanned(monkeypatch):
    """Of every chain that is asked for, whether it was one recurrence."""
    found = []

    def spied(*args, original=chains.mixed, **options):
        found.append(original(*args, **options))
        return found[-1]

    monkeypatch.setattr(chains, "mixed", spied)
    return found


def compiled(length, num_states, monkeypatch, *, homogeneous=True, shortest=4, dtype=DOUBLE):
    with monkeypatch.context() as patch:
        patch.setattr(finding, "_SHORTEST", shortest)
        return ct.compile(ct.structures.hmm(length, num_states, 3, homogeneous), seed=1, dtype=dtype)


def tensors_of(kind, length, num_states, batch_size, seed=0):
    """Raw tensors from which the weights of a kind are made; those of gates and low ranks in every step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=DOUBLE, generator=generator)

    steps, size = length - 1, num_states
    sizes = {
        "gates": [(batch_size, steps, 3), (3, size, size)],
        "shared gates": [(steps, 3), (3, size, size)],
        "low rank": [(batch_size, steps, size, 2), (size, 2)],
        "table": [(steps, size, size)],
        "tables": [(steps, batch_size, size, size)],
    }
    several = {"relative": ["gates"], "some": ["gates"], "all": ["gates", "low rank", "table", "tables"]}
    return [normal(*shape) for part in several.get(kind, [kind]) for shape in sizes[part]]


def given_of(kind, tensors):
    """The weights of a kind by name of the node."""
    if kind == "all":
        parts = (given_of("gates", tensors[:2]), given_of("low rank", tensors[2:4]))
        parts = (*parts, given_of("table", tensors[4:5]), given_of("tables", tensors[5:]))
        return {name: parts[number % 4][name] for number, name in enumerate(parts[0])}
    if kind in ("table", "tables"):
        forms = list(tensors[0])
    elif kind == "low rank":
        forms = [LowRank(u.clamp_min(0), tensors[1].exp()) for u in tensors[0].unbind(1)]
    else:
        forms = [Gates(gates, tensors[1], relative=kind == "relative") for gates in tensors[0].unbind(-2)]
    every = {f"transition{step}": form for step, form in enumerate(forms)}
    return {name: every[name] for name in list(every)[1::3]} if kind == "some" else every


def written_out(pc, form):
    """W_b of a form, from its definition, (B or 1, K, K)."""
    own = pc.log_weights("transition0").detach()
    if isinstance(form, Gates):
        tables = (form.tables + own if form.relative else form.tables).softmax(-1)
        found = torch.einsum("...t,tki->...ki", form.gates.softmax(-1), tables)
    elif isinstance(form, LowRank):
        moved = form.v @ form.u.mT
        found = (own.exp() + moved) / (1 + moved.sum(-1, keepdim=True))
    else:
        found = own.exp() if form is None else form.softmax(-1)
    return found if found.dim() == 3 else found.unsqueeze(0)


def forward(pc, given, factors):
    """Log Z of soft evidence, (B, L, C), by the forward algorithm on the tables written out."""
    emission, alpha = pc.log_weights("emission0").detach().exp(), pc.log_weights("initial").detach().exp()
    log_z = 0.0
    for step in range(factors.shape[1]):
        if step:
            table = written_out(pc, given.get(f"transition{step - 1}"))
            alpha = torch.einsum("bk,bki->bi", alpha, table.expand(len(factors), -1, -1))
        alpha = alpha * (factors[:, step].exp() @ emission)
        log_z = log_z + alpha.sum(1, keepdim=True).log()
        alpha = alpha / alpha.sum(1, keepdim=True)
    return log_z.squeeze(1)


def evidence_of(batch_size, length, seed=1):
    return torch.randn(batch_size, length, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "batch_size"), [(9, 1), (150, 4)])
def test_the_log_partition_is_that_of_the_tables_written_out(calls, scanned, monkeypatch, kind, length, batch_size):
    pc, factors = compiled(length, 3, monkeypatch), evidence_of(batch_size, length)
    given = given_of(kind, tensors_of(kind, length, 3, batch_size))
    log_z = ct.queries.log_partition(pc, ct.Evidence.soft(factors), weights=pc.weights(external=given))
    torch.testing.assert_close(log_z, forward(pc, given, factors), **CLOSE)
    assert [one is not None for one in scanned] == [True]


def padded(batch_size, length):
    """Observations with holes, that end at several places, one of them with nothing at all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (batch_size, length), generator=generator)
    ends = torch.randint(length + 1, (batch_size, 1), generator=generator)
    ends[0] = 0
    observed = (torch.rand(x.shape, generator=generator) < 0.8) & (torch.arange(length) < ends)
    return ct.Evidence.observe(x, observed)


def answers(pc, evidence, kind, tensors, **options):
    """Log Z, its gradient in everything, marginals, flows, samples, tempered ones too, the best values and states."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    shape, generator = (evidence.batch_size, pc.sum_node("transition0").num_units), torch.Generator().manual_seed(2)
    latents = torch.randn(shape, dtype=DOUBLE, generator=generator, requires_grad=True)
    evidence = evidence.with_latents({"transition0": latents, "transition5": 2 * latents})
    weights = pc.weights(external=given_of(kind, tensors), **options)
    log_z = ct.queries.log_partition(pc, evidence, weights=weights)
    gradients = torch.autograd.grad(log_z.sum(), [*tensors, latents, *pc.parameters()], materialize_grads=True)
    detached = pc.weights(external=given_of(kind, [tensor.detach() for tensor in tensors]), **options)
    flows, log_likelihood = ct.learning.expected_flows(pc, evidence, weights=detached)
    best = ct.queries.mpe(pc, evidence, weights=weights)
    states = ct.queries.best_latents(pc, evidence, weights=weights)
    return [
        log_z, *gradients, *flows.values(), log_likelihood,
        ct.queries.marginals(pc, evidence, weights=weights),
        *ct.queries.latent_marginals(pc, evidence, weights=weights).values(),
        *(ct.queries.sample(pc, 2, evidence, ct.RowGenerators(torch.arange(evidence.batch_size)), weights=weights,
                            temperature=temperature) for temperature in (1.0, 0.5)),
        best.assignment, best.log_score, states.log_weights(),
    ]  # fmt: skip


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_gives_what_its_layers_give(calls, scanned, monkeypatch, kind, homogeneous):
    length, num_states, batch_size = 16, 4, 5
    tensors = tensors_of(kind, length, num_states, batch_size)
    for options in ({}, {"normalize": False}):
        found, expected = (
            answers(pc, padded(batch_size, length), kind, tensors, **options)
            for pc in (
                compiled(length, num_states, monkeypatch, homogeneous=homogeneous, shortest=shortest)
                for shortest in (4, 100)
            )
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    assert scanned
    assert all(one is not None for one in scanned)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_log_partition_twice(scanned, monkeypatch, kind):
    length, batch_size = 5, 2
    pc = compiled(length, 2, monkeypatch)
    made = tensors_of(kind, length, 2, batch_size)
    (own,) = [p for p in pc.parameters() if tuple(p.shape) == (1, 2, 2)]

    def log_z(factors, *tensors):
        given = given_of(kind, tensors[: len(made)])
        return ct.queries.log_partition(pc, ct.Evidence.soft(factors), weights=pc.weights(external=given))

    tensors = [tensor.requires_grad_() for tensor in (evidence_of(batch_size, length), *made)]
    assert torch.autograd.gradcheck(log_z, (*tensors, own), fast_mode=True)
    assert torch.autograd.gradgradcheck(log_z, tensors, fast_mode=True)
    assert all(one is not None for one in scanned)


def test_steps_that_share_numbers_with_another_history_keep_their_own_gradients(monkeypatch):
    length, batch_size = 12, 3
    u, log_v = tensors_of("low rank", length, 3, batch_size)
    found = []
    for shortest in (4, 100):
        pc, v = compiled(length, 3, monkeypatch, shortest=shortest), log_v.exp().requires_grad_()
        given = {
            f"transition{step}": LowRank(u[:, step].clamp_min(0), v.detach() if step % 2 else v)
            for step in range(length - 1)
        }
        evidence = ct.Evidence.soft(evidence_of(batch_size, length))
        ct.queries.log_partition(pc, evidence, weights=pc.weights(external=given)).sum().backward()
        found.append(v.grad)
    torch.testing.assert_close(*found, **CLOSE)


def test_nothing_flows_where_nothing_is_known_whatever_is_differentiated_later(scanned, monkeypatch):
    length, batch_size = 12, 4
    pc = compiled(length, 3, monkeypatch)
    given = given_of("some", tensors_of("some", length, 3, batch_size))
    weights = pc.weights(external=given).detached(requires_grad=True)
    log_z = Question(pc, padded(batch_size, length), weights).silenced().log_z
    flows, again = (
        torch.autograd.grad(log_z.sum(), weights.own["sum_3x3"].log, retain_graph=True, create_graph=later)[0]
        for later in (False, True)
    )
    torch.testing.assert_close(again, flows, **CLOSE)
    assert scanned


@pytest.mark.parametrize("kind", ["gates", "low rank"])
def test_structural_zeros_and_vanishing_sums_are_left_to_the_layers(scanned, monkeypatch, kind):
    """From some states no other is left; the first steps say that the chain was there, or nearly so."""
    length, batch_size, num_states = 130, 3, 3
    pc, exact = (compiled(length, num_states, monkeypatch, dtype=dtype) for dtype in (torch.float32, DOUBLE))
    emission = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=DOUBLE)
    transition = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.4, 0.3, 0.3]], dtype=DOUBLE)
    for one in (pc, exact):
        one.set_weights("emission0", emission.t())
        one.set_weights("transition0", transition)
    if kind == "gates":
        tables = transition.log().expand(2, -1, -1) + torch.tensor([0.0, 1.0], dtype=DOUBLE)[:, None, None]
        tables[1, 2, 0] = -torch.inf
        given = {f"transition{t}": Gates(evidence_of(batch_size, length)[:, t, :2], tables) for t in range(length - 1)}
    else:
        u = evidence_of(batch_size, length).abs() * torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)
        ones = torch.ones(3, 1, dtype=DOUBLE)
        given = {f"transition{t}": LowRank(u[:, t].unsqueeze(2), ones) for t in range(length - 1)}
    factors = torch.zeros(batch_size, length, 3, dtype=DOUBLE)
    factors[0, :20] = torch.tensor([-torch.inf, -torch.inf, 0.0])
    factors[1, 100:] = torch.tensor([0.0, -60.0, -torch.inf])
    factors[2, 40], factors[2, 41] = torch.tensor([-200.0, 0.0, 0.0]), torch.tensor([0.0, -200.0, 0.0])
    expected = forward(exact, given, factors)
    found = ct.queries.log_partition(exact, ct.Evidence.soft(factors), weights=exact.weights(external=given))
    torch.testing.assert_close(found, expected, **CLOSE)
    found = ct.queries.log_partition(pc, ct.Evidence.soft(factors.float()), weights=pc.weights(external=given))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    impossible = ct.Evidence.soft(torch.full_like(factors, -torch.inf))
    found = ct.queries.log_partition(exact, impossible, weights=exact.weights(external=given))
    assert found.tolist() == [-torch.inf] * batch_size
    assert any(one is None for one in scanned)
