"""The compiled module: folding, ties, seeds, devices, dtypes, autograd, torch.compile, and what it costs to import."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits.algebra.semirings import LogSemiring, Semiring


def hmm(length=5, states=3, categories=4, **options):
    return ct.structures.hmm(length, states, categories, **options)


def test_equal_shapes_of_a_layer_are_folded():
    pc = ct.compile(ct.structures.mixture(50, 4, 3), seed=0)
    assert len(pc.input_layers) == 1
    assert len(pc.inner_layers) == 2
    assert pc.layer_sizes == [(50, 3), (1, 3), (1, 1)]


def test_tied_weights_are_stored_once():
    tied, free = (ct.compile(hmm(homogeneous=homogeneous), seed=0) for homogeneous in (True, False))
    assert tied.bank["sum_3x3"].shape == (1, 3, 3)
    assert free.bank["sum_3x3"].shape == (4, 3, 3)
    assert sum(p.numel() for p in tied.parameters()) == tied.circuit.num_parameters == 3 + 9 + 12
    circuit = tied.circuit
    assert torch.equal(tied.log_weights(circuit.node("transition0")), tied.log_weights(circuit.node("transition3")))


def test_an_hmm_is_the_textbook_forward_algorithm(generator):
    initial, transition, emission = (
        torch.softmax(torch.randn(*shape, dtype=torch.float64, generator=generator), -1)
        for shape in ((3,), (3, 3), (3, 4))
    )
    circuit = hmm(initial=initial, transition=transition, emission=emission)
    pc = ct.compile(circuit, dtype=torch.float64)
    x = torch.randint(4, (20, 5), generator=generator)
    expected = []
    for row in x:
        alpha = initial * emission[:, row[0]]
        for value in row[1:]:
            alpha = (alpha @ transition) * emission[:, value]
        expected.append(alpha.sum().log())
    torch.testing.assert_close(pc(x), torch.stack(expected), rtol=1e-12, atol=0)


def test_one_seed_gives_one_circuit_in_every_dtype():
    single, double = (ct.compile(hmm(), seed=5, dtype=dtype) for dtype in (torch.float32, torch.float64))
    for name, bank in single.bank.items():
        torch.testing.assert_close(bank.double(), double.bank[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(single.bank["sum_3x3"], ct.compile(hmm(), seed=6).bank["sum_3x3"])
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(*(ct.compile(hmm(), generator=g).bank["sum_3x3"] for g in generators))


def test_weights_stay_normalised_whatever_the_optimizer_does():
    pc = ct.compile(hmm(), seed=0)
    optimizer = torch.optim.Adam(pc.parameters(), lr=1.0)
    x = torch.randint(4, (30, 5))
    for _ in range(5):
        optimizer.zero_grad()
        (-pc(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(pc.log_partition(ct.Evidence.nothing(1, 5)), torch.zeros(1), atol=1e-5, rtol=0)
        everything = torch.cartesian_prod(*[torch.arange(4)] * 5)
        torch.testing.assert_close(pc(everything).exp().sum(), torch.ones(()), atol=1e-4, rtol=0)


def test_kept_weights_notice_every_change(generator):
    pc = ct.compile(hmm(), seed=0)
    x = torch.randint(4, (3, 5), generator=generator)
    with torch.no_grad():
        before = pc(x)
        pc.randomize(seed=1)
        after = pc(x)
        assert not torch.equal(before, after)
        pc.load_state_dict(ct.compile(hmm(), seed=0).state_dict())
        assert torch.equal(pc(x), before)
        with torch.inference_mode():
            assert torch.equal(pc(x), before)
        pc.bank["sum_3x3"][0, 0, 0] += 1
        assert not torch.equal(pc(x), before)
        assert pc.to(torch.float64)(x).dtype == torch.float64


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_optimizers_are_seen_without_gradients(fused):
    pc = ct.compile(hmm(), seed=0)
    x = torch.zeros(1, 5, dtype=torch.int64)
    optimizer = torch.optim.Adam(pc.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            before = pc(x)
        (-pc(x).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            assert float(pc(x)) > float(before)


def test_values_and_gradients_agree_between_grad_modes(generator):
    pc = ct.compile(hmm(), seed=0, dtype=torch.float64)
    x = torch.randint(4, (3, 5), generator=generator)
    with torch.inference_mode():
        frozen = pc(x)
        marginals = ct.queries.marginals(pc, ct.Evidence.observe(x, torch.rand(3, 5, generator=generator) > 0.5))
    assert torch.equal(frozen.clone(), pc(x).detach())
    assert marginals.sum(-1).allclose(torch.ones(3, 5, dtype=torch.float64))
    pc(x).sum().backward()  # a cache made in inference mode does not disturb training
    assert all(parameter.grad is not None for parameter in pc.parameters())


@settings(max_examples=15)
@given(ct.testing.circuits(max_vars=3, zero_weights=False), st.integers(0, 100))
def test_gradients_are_exact_to_second_order(circuit, seed):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, circuit.num_vars, max(circuit.num_categories), dtype=torch.float64, generator=generator)
    factors.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: pc(ct.Evidence.soft(f)), (factors,))
    assert torch.autograd.gradgradcheck(lambda f: pc(ct.Evidence.soft(f)), (factors,))


@settings(max_examples=15)
@given(ct.testing.circuits(max_vars=3, zero_weights=False), st.integers(0, 100))
def test_weight_gradients_are_the_numeric_ones(circuit, seed):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    x = torch.tensor([[seed % count for count in circuit.num_categories]])
    evidence = [ct.Evidence.observe(x), ct.Evidence.soft(torch.zeros(1, *x.shape[1:], max(circuit.num_categories)))]
    for given_evidence in evidence:
        names = [name for name, parameter in pc.bank.items() if parameter.numel()]
        grads = torch.autograd.grad(pc(given_evidence).sum(), [pc.bank[n] for n in names], allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            parameter = pc.bank[name]
            index = tuple(int(torch.randint(n, ()).item()) for n in parameter.shape)
            values = []
            with torch.no_grad():
                for change in (1e-6, -2e-6):
                    parameter[index] += change
                    values.append(pc(given_evidence).sum())
                parameter[index] += 1e-6
            numeric = (values[0] - values[1]) / 2e-6
            torch.testing.assert_close(grad[index], numeric, rtol=1e-5, atol=1e-7)


def test_torch_compile_gives_the_same_values_and_gradients(generator):
    pc = ct.compile(hmm(), seed=0)
    x = torch.randint(4, (6, 5), generator=generator)
    compiled = torch.compile(pc, backend="aot_eager")
    torch.testing.assert_close(compiled(x), pc(x))
    grads = []
    for call in (compiled, pc):
        pc.zero_grad()
        call(x).sum().backward()
        grads.append([parameter.grad.clone() for parameter in pc.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), pc(x))


def test_the_default_product_of_a_semiring_is_repeated_times():
    factors = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(Semiring.product(LogSemiring(), factors), factors.sum(1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), "has 5 variables, the evidence has 4"),
        (torch.full((2, 5), 4), "x: expected values from 0 to 3, got 4 at batch 0, variable 0"),
        (torch.full((2, 5), -1), "got -1 at batch 0"),
        (torch.zeros(2, 5) + 0.5, "x: expected values from 0 to 3, got 0.5 at batch 0, variable 0"),
        (torch.zeros(2, 5, dtype=torch.complex64), "x: expected"),
        (torch.zeros(5, dtype=torch.int64), "x: expected int64"),
        ([[0] * 5], "x: expected a tensor"),
    ],
)
def test_wrong_data_is_named(x, message):
    with pytest.raises(ct.ArgumentError, match=message):
        ct.compile(hmm(), seed=0)(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ct.Evidence.soft(torch.full((1, 5, 4), torch.nan)), "NaN or \\+inf"),
        (lambda: ct.Evidence.soft(torch.zeros(1, 5)), "expected floating point \\(B, D, C\\)"),
        (lambda: ct.Evidence.soft(torch.zeros(1, 5, 4, dtype=torch.int64)), "expected floating point"),
        (lambda: ct.Evidence.observe(torch.zeros(1, 5).long(), torch.ones(1, 4).bool()), "observed: expected a bool"),
        (lambda: ct.Evidence.sparse(torch.zeros(1, 5, 2).long(), torch.zeros(1, 5, 2)), "expected distinct values"),
        (lambda: ct.Evidence.sparse(torch.zeros(1, 5, 2).long(), torch.zeros(1, 5, 3)), "expected the shape of values"),
    ],
)
def test_wrong_evidence_is_named(build, message):
    with pytest.raises(ct.ArgumentError, match=message):
        build()


@pytest.mark.gpu
def test_the_same_answers_on_a_gpu(generator):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pc = ct.compile(hmm(), seed=0, dtype=torch.float64)
    x = torch.randint(4, (6, 5), generator=generator)
    expected = pc(x).detach()
    on_gpu = pc.to("cuda")
    torch.testing.assert_close(on_gpu(x.cuda()).detach().cpu(), expected)
    evidence = ct.Evidence.soft(torch.randn(6, 5, 4, dtype=torch.float64, device="cuda"))
    marginals = ct.queries.marginals(on_gpu, evidence)
    torch.testing.assert_close(marginals.sum(-1).cpu(), torch.ones(6, 5, dtype=torch.float64))
    assert ct.queries.sample(on_gpu, 3, evidence, torch.Generator("cuda").manual_seed(0)).shape == (3, 6, 5)


def test_importing_circuits_imports_nothing_heavy():
    heavy = ["pyjuice", "transformers", "matplotlib", "hypothesis", "rich", "typer", "scipy", "networkx", "tokenizers"]
    code = (
        "import torch, sys; before = set(sys.modules); import circuits; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", 1.5])
def test_a_device_that_is_not_here_is_named(tmp_path, device):
    circuit = ct.structures.hmm(3, 2, 2)
    with pytest.raises(ct.ArgumentError, match="device: expected a device of this machine"):
        ct.compile(circuit, device=device)
    ct.save(ct.compile(circuit, seed=0), tmp_path / "pc")
    with pytest.raises(ct.ArgumentError, match="device: expected a device of this machine"):
        ct.load(tmp_path / "pc", device=device)


@pytest.mark.parametrize("seed", [1.0, "0", True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ct.ArgumentError, match="seed: expected an integer"):
        ct.compile(ct.structures.hmm(3, 2, 2), seed=seed)


def test_names_work_where_nodes_do():
    pc = ct.compile(ct.structures.hmm(3, 2, [3, ct.Gaussian()]), seed=0, dtype=torch.float64)
    emission, normal, transition = (pc.circuit.node(name) for name in ("emission1_0", "emission1_1", "transition0"))
    table = torch.tensor([[0.5, 0.1], [0.3, 0.2], [0.2, 0.7]], dtype=torch.float64)
    pc.set_weights("emission1_0", table)
    torch.testing.assert_close(pc.parameters_of("emission0_0"), table)  # tied
    pc.set_weights("transition0", torch.eye(2))
    assert torch.equal(pc.log_weights("transition0").exp(), torch.eye(2, dtype=torch.float64))
    for name, node in (("emission1_0", emission), ("emission1_1", normal), ("transition0", transition)):
        assert torch.equal(pc.parameters_of(name), pc.parameters_of(node))
        assert torch.equal(pc.bank_row(name), pc.bank_row(node))
        assert pc.address(name) == pc.address(node)
        assert pc.bank_address(name) == pc.bank_address(node)


@pytest.mark.parametrize(
    "ask",
    [
        lambda pc, n: pc.set_weights(n, torch.eye(2)),
        lambda pc, n: pc.log_weights(n),
        lambda pc, n: pc.parameters_of(n),
        lambda pc, n: pc.address(n),
        lambda pc, n: pc.bank_address(n),
    ],
)
def test_an_unknown_name_is_told_the_near_ones(ask):
    pc = ct.compile(ct.structures.hmm(3, 2, 3))
    with pytest.raises(
        ct.ArgumentError,
        match="name: expected one of the 6 names of nodes, got 'transitions0'; did you mean transition0, transition1",
    ):
        ask(pc, "transitions0")


def test_a_product_has_no_weights():
    pc = ct.compile(ct.structures.hmm(2, 2, 3))
    product = next(node for node in pc.circuit.nodes if isinstance(node, ct.Product))
    with pytest.raises(ct.ArgumentError, match=r"node: expected a sum or an input node, .* got Product"):
        pc.parameters_of(product)
