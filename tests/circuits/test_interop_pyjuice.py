"""PyJuice's nodes and checkpoints: the same distribution there and back, and hostile files execute nothing."""

import contextlib
import os
import pickle
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits.interop import backend, from_pyjuice, load_jpc, save_jpc, to_pyjuice
from circuits.interop.backend import kernel_inputs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    juice = pytest.importorskip("pyjuice", reason="needs PyJuice")

# PyJuice normalises with a sparse tensor, and torch warns about it once per process.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # PyJuice keeps float32


def compiled(circuit, seed=0):
    return ct.compile(circuit, dtype=torch.float64, seed=seed)


def assert_same(pc, other):
    joint, expected = ct.testing.enumerate_joint(pc), ct.testing.enumerate_joint(other)
    torch.testing.assert_close(joint.exp(), expected.exp(), **CLOSE)
    assert torch.equal(joint == -torch.inf, expected == -torch.inf)


def oracle(root):
    """Enumerate PyJuice's own nodes, unit by unit of their blocks, from their documented meaning."""
    num_categories = {}
    for ns in root:
        if ns.is_input():
            num_categories[ns.scope.to_list()[0]] = 2 if ns.dist.get_signature() == "Bernoulli" else ns.dist.num_cats
    shape = [num_categories[var] for var in range(len(num_categories))]
    tables = {}
    for ns in root:
        params = ns.get_source_ns()._params
        if ns.is_input():
            var = ns.scope.to_list()[0]
            if ns.dist.get_signature() == "Bernoulli":
                weights = torch.stack([1 - params, params], 1)
            else:
                weights = params.reshape(ns.num_nodes, -1)
            tables[ns] = weights.double().reshape(-1, *(n if v == var else 1 for v, n in enumerate(shape)))
        elif ns.is_prod():
            rows = []
            for unit in range(ns.num_nodes):
                row = 1.0
                for slot, child in enumerate(ns.chs):
                    if len(ns.edge_ids) == ns.num_nodes:
                        index = int(ns.edge_ids[unit, slot])
                    else:
                        block, offset = divmod(unit, ns.block_size)
                        index = int(ns.edge_ids[block, slot]) * child.block_size + offset
                    row = row * tables[child][index]
                rows.append(row)
            tables[ns] = torch.stack(rows)
        else:
            children = torch.cat([tables[child].expand(-1, *_largest(ns, tables)) for child in ns.chs])
            total = torch.zeros(ns.num_nodes, *children.shape[1:], dtype=torch.float64)
            size, child_size = ns.block_size, ns.ch_block_size
            for edge, (row, column) in enumerate(ns.edge_ids.t().tolist()):
                part = children[column * child_size : (column + 1) * child_size]
                total[row * size : (row + 1) * size] += torch.tensordot(params[edge].double(), part, 1)
            tables[ns] = total
    return tables[root][0]


def _largest(ns, tables):
    return torch.broadcast_shapes(*(tables[child].shape[1:] for child in ns.chs))


@given(ct.testing.circuits(max_vars=4, max_categories=3, families="table"), st.sampled_from([None, 1, 2, 4]))
@settings(max_examples=40)
def test_there_and_back_is_the_same_distribution(circuit, block_size):
    pc = compiled(circuit)
    root = to_pyjuice(pc, block_size=block_size)
    joint = ct.testing.enumerate_joint(pc).exp()
    torch.testing.assert_close(oracle(root), joint, **CLOSE)
    assert_same(from_pyjuice(root, dtype=torch.float64), pc)


@given(ct.testing.circuits(max_vars=4, max_categories=3, families="table"), st.sampled_from([None, 2]))
@settings(max_examples=30)
def test_a_checkpoint_is_read_by_pyjuice_and_by_us(circuit, block_size):
    pc = compiled(circuit)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "pc.jpc")
        save_jpc(pc, path, block_size=block_size)
        loaded = load_jpc(path, dtype=torch.float64)
        theirs = juice.load(path)
    assert_same(loaded, pc)
    torch.testing.assert_close(oracle(theirs), ct.testing.enumerate_joint(pc).exp(), **CLOSE)


def test_padding_units_disappear_when_trimmed():
    pc = compiled(ct.structures.hmm(3, 5, 3))
    back = from_pyjuice(to_pyjuice(pc, block_size=4), dtype=torch.float64)
    assert {node.num_units for node in back.circuit.nodes} == {8, 1}
    trimmed = ct.transforms.trim(back)
    assert {node.num_units for node in trimmed.circuit.nodes} == {5, 1}
    assert trimmed.circuit.num_parameters == pc.circuit.num_parameters
    assert_same(trimmed, pc)


def test_tied_parameters_stay_tied():
    pc = compiled(ct.structures.hmm(4, 4, 3))
    root = to_pyjuice(pc)
    assert sum(ns.is_tied() for ns in root) == 3 + 2
    assert {ns.block_size for ns in root} == {4, 1}
    back = from_pyjuice(root)
    assert back.circuit.num_parameters == pc.circuit.num_parameters
    assert len(back.circuit.nodes) == len(pc.circuit.nodes)


def test_zero_weights_stay_masked():
    transition = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1.0]])
    root = to_pyjuice(compiled(ct.structures.hmm(3, 4, 2, transition=transition)), block_size=2)
    sums = [ns for ns in root if ns.is_sum() and not ns.is_tied() and ns.num_nodes == 4]
    assert [ns.edge_ids.tolist() for ns in sums] == [[[0, 0, 1], [0, 1, 1]]]
    assert torch.equal(sums[0].get_zero_param_mask(), sums[0].get_params() == 0)


def structures():
    data = (torch.rand(60, 6, generator=torch.Generator().manual_seed(0)) * 3).long()
    categorical = juice.distributions.Categorical(num_cats=3)
    yield "hmm", lambda: juice.structures.HMM(4, 4, 3, block_size=2)
    yield "inhomogeneous", lambda: juice.structures.HMM(4, 4, 3, homogeneous=False)
    yield "hclt", lambda: juice.structures.HCLT(data.float(), num_latents=4, num_bins=3, input_dist=categorical)
    yield (
        "rat",
        lambda: juice.structures.RAT_SPN(num_vars=6, num_latents=4, depth=2, num_repetitions=2, input_dist=categorical),
    )
    yield "pd", lambda: juice.structures.PD((2, 3), num_latents=4, split_intervals=1, input_dist=categorical)


@pytest.mark.parametrize("name", [name for name, _ in structures()])
def test_structures_of_pyjuice_are_circuits(name):
    root = dict(structures())[name]()
    root.init_parameters()
    pc = from_pyjuice(root, dtype=torch.float64)
    joint = ct.testing.enumerate_joint(pc).exp()
    torch.testing.assert_close(joint.sum(), torch.ones((), dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(joint, oracle(root), **CLOSE)


def test_weights_that_are_not_there_are_drawn_with_the_seed():
    root = juice.structures.HMM(3, 4, 3, block_size=2)
    one, other = (from_pyjuice(root, seed=1) for _ in range(2))
    assert all(torch.equal(one.bank[name], other.bank[name]) for name in one.bank)
    assert one.circuit.num_parameters == 4 + 16 + 12


def test_products_that_choose_units_get_selections():
    a, b = (juice.inputs(var, num_node_blocks=3, dist=juice.distributions.Categorical(num_cats=2)) for var in (0, 1))
    product = juice.multiply(a, b, edge_ids=torch.tensor([[0, 2], [1, 1], [2, 2], [0, 0]]))
    root = juice.summate(product, num_node_blocks=1)
    root.init_parameters()
    for ns in (a, b):
        ns.init_parameters()
    torch.testing.assert_close(
        ct.testing.enumerate_joint(from_pyjuice(root, dtype=torch.float64)).exp(), oracle(root), **CLOSE
    )


def test_a_device_that_is_not_here_is_no_fault_of_the_checkpoint(tmp_path):
    save_jpc(compiled(ct.structures.hmm(3, 2, 2)), tmp_path / "pc.jpc")
    with pytest.raises(ct.ArgumentError, match="device: expected a device of this machine"):
        load_jpc(tmp_path / "pc.jpc", device="nowhere")


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "pc.jpc"
    save_jpc(compiled(ct.structures.hmm(3, 2, 2)), path)
    before = path.read_bytes()

    def fail(target, nodes):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(juice, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_jpc(compiled(ct.structures.hmm(4, 2, 2)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_does_not_fit_says_so():
    with pytest.raises(ct.ArgumentError, match="nodes of PyJuice"):
        from_pyjuice("a circuit")
    gaussian = juice.inputs(0, num_node_blocks=2, dist=juice.distributions.Gaussian(0.0, 1.0))
    with pytest.raises(ct.PropertyError, match="Gaussian"):
        from_pyjuice(juice.summate(gaussian, num_node_blocks=1))
    with pytest.raises(ct.ArgumentError, match="power of two"):
        to_pyjuice(compiled(ct.structures.hmm(3, 3, 2)), block_size=3)
    classes = compiled(ct.structures.rat_spn(3, 1, 1, 2, 3, num_classes=2, seed=0))
    with pytest.raises(ct.PropertyError, match="one root unit"):
        to_pyjuice(classes)
    to_pyjuice(ct.transforms.condition(classes, ct.Evidence.nothing(1, 3).with_class(1)))
    with pytest.raises(ct.ArgumentError, match=r"\.jpc"):
        save_jpc(compiled(ct.structures.hmm(3, 3, 2)), "pc.pkl")


# Hostile checkpoints

FLAG = "executed.flag"


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Sized:
    """Pretends to be an array of any shape."""

    def __init__(self, shape, code, data=b"\0" * 8):
        self.shape, self.code, self.data = shape, code, data

    def __reduce__(self):
        reconstruct = np.zeros(1).__reduce__()[0]
        state = (1, self.shape, np.dtype(self.code), False, self.data)
        return reconstruct, (np.ndarray, (0,), b"b"), state


def records(tmp_path):
    path = tmp_path / "good.jpc"
    save_jpc(compiled(ct.structures.hmm(3, 2, 2)), path)
    return pickle.loads(path.read_bytes())


def attacks():
    yield "system", lambda good: Attack(os.system, f"touch {FLAG}")
    yield "eval", lambda good: Attack(eval, f"open({FLAG!r}, 'w')")
    yield "in a parameter", lambda good: change(good, -1, params=Attack(os.system, f"touch {FLAG}"))
    yield "in a size", lambda good: change(good, 0, num_node_blocks=Attack(eval, f"open({FLAG!r}, 'w') and 2"))
    yield "in dist", lambda good: change(good, 0, dist=pickle.dumps(Attack(os.system, f"touch {FLAG}")))
    yield "getattr chain", lambda good: Attack(getattr, Attack(__import__, "os"), "system")
    yield "object array", lambda good: change(good, -1, params=np.array([Attack(os.system, f"touch {FLAG}")], object))
    yield "torch storage", lambda good: change(good, -1, params=torch.ones(2, 1, 2))
    yield "other family", lambda good: change(good, 0, dist=pickle.dumps(juice.distributions.Gaussian(0.0, 1.0)))
    yield "huge array", lambda good: change(good, -1, params=Sized((1 << 60,), "f4"))
    yield "negative shape", lambda good: change(good, -1, params=Sized((-1, -2), "f4"))
    yield "huge units", lambda good: change(good, 0, num_node_blocks=1 << 40)
    yield "huge categories", lambda good: change(good, 0, dist=pickle.dumps(juice.distributions.Categorical(1 << 50)))
    yield "later child", lambda good: change(good, -1, chs=(len(good) - 1,))
    yield "circle of sources", lambda good: change(change(good, 0, source_node=1), 1, source_node=0)
    yield "edges out of range", lambda good: change(good, -1, edge_ids=np.array([[0], [9]]))
    yield "negative weights", lambda good: change(good, -1, params=-np.ones((1, 1, 2), np.float32))
    yield "nan weights", lambda good: change(good, -1, params=np.full((1, 1, 2), np.nan, np.float32))
    yield "no list", lambda good: {"type": "Sum"}
    yield "no nodes", lambda good: []
    yield "no dictionary", lambda good: [1]
    yield "unknown type", lambda good: change(good, 0, type="Evil")
    yield "external parameters", lambda good: change(good, -1, external_params=b"")


def change(good, position, **entries):
    good = list(good)
    good[position] = {**good[position], **entries}
    return good


@pytest.mark.parametrize("name", [name for name, _ in attacks()])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_hostile_checkpoints_execute_nothing(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = dict(attacks())[name](records(tmp_path))
    Path("bad.jpc").write_bytes(pickle.dumps(hostile, protocol))
    with pytest.raises(ct.CheckpointError, match=r"bad\.jpc"):
        load_jpc("bad.jpc")
    assert not Path(FLAG).exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'touch executed.flag'\ntR.",
        b"(S'touch executed.flag'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch executed.flag'\no.",
        b"\x80\x02cos\nsystem\nX\x15\x00\x00\x00touch executed.flag\x85\x81.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04Pid\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04\x8d\xff\xff\xff\x7f\x00\x00\x00\x00.",
        b"\x80\x04(((((((.",
        b"\x80\x04t.",
        b"\x80\x04]q\xffa.",
        b"",
        b".",
        b"\x89PNG",
    ],
)
def test_handmade_pickles_execute_nothing(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.jpc").write_bytes(payload)
    with pytest.raises(ct.CheckpointError, match=r"bad\.jpc"):
        load_jpc("bad.jpc")
    assert not Path(FLAG).exists()


def test_every_truncation_is_refused(tmp_path):
    records(tmp_path)
    data = (tmp_path / "good.jpc").read_bytes()
    path = tmp_path / "cut.jpc"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ct.CheckpointError):
            load_jpc(path)


@given(st.data())
@settings(max_examples=150)
def test_damaged_bytes_never_raise_anything_else(data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records(folder)
        damaged = bytearray((folder / "good.jpc").read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        (folder / "bad.jpc").write_bytes(damaged)
        with contextlib.suppress(ct.CheckpointError):
            load_jpc(folder / "bad.jpc")


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(ct.CheckpointError, match="expected a file that can be read"):
        load_jpc(tmp_path / "none.jpc")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_and_new_pickle_protocols_are_read(protocol, tmp_path):
    good = records(tmp_path)
    (tmp_path / "other.jpc").write_bytes(pickle.dumps(good, protocol))
    if protocol == 2:
        with pytest.raises(ct.CheckpointError, match="array: expected bytes"):
            load_jpc(tmp_path / "other.jpc")
        return
    assert_same(load_jpc(tmp_path / "other.jpc"), load_jpc(tmp_path / "good.jpc"))


def test_the_backend_says_what_it_needs():
    circuit = ct.structures.hmm(3, 2, 2)
    if not torch.cuda.is_available():
        with pytest.raises(ct.ArgumentError, match=r"CUDA.*ct\.compile"):
            ct.interop.compile_with_pyjuice(circuit)


def test_a_wrong_dtype_is_not_the_fault_of_the_file_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "pc.jpc"
    save_jpc(compiled(ct.structures.hmm(3, 2, 2)), path)
    with pytest.raises(ct.ArgumentError, match="dtype: expected"):
        load_jpc(path, dtype=torch.float16)


def test_the_kernels_get_integers_in_whole_blocks():
    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    values, options = kernel_inputs(ct.Evidence.observe(x))
    assert (values.dtype, tuple(values.shape)) == (torch.int64, (32, 2))
    assert values[:2].tolist() == [[1, 0], [2, 3]]
    assert options["missing_mask"][:2].tolist() == [[False, True], [False, False]]
    assert kernel_inputs(ct.Evidence.observe(torch.zeros(33, 2).long()))[1] == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyJuice's kernels need a CUDA device")
def test_likelihoods_of_the_backend_are_ours():
    circuit = ct.structures.hmm(6, 32, 8)
    with pytest.raises(ct.ArgumentError, match="device='cuda'"):
        ct.interop.compile_with_pyjuice(circuit, device="cpu")
    theirs = ct.interop.compile_with_pyjuice(circuit, seed=0)
    ours = ct.compile(circuit, device="cuda", seed=0)
    x = torch.randint(8, (50, 6), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    observed = torch.rand(50, 6, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.5
    with torch.no_grad():
        for step in range(2):
            torch.testing.assert_close(theirs(x), ours(x), rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(theirs(x.float()), theirs(x))
            assert theirs(x[:0]).shape == (0,)
            marginals = [ct.queries.log_marginal(pc, x, observed) for pc in (theirs, ours)]
            torch.testing.assert_close(*marginals, rtol=1e-2, atol=1e-2)
            for pc in (theirs, ours):
                pc.randomize(seed=step + 1)
    gradients = [torch.autograd.grad(pc(x).sum(), list(pc.bank.values())) for pc in (theirs, ours)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


class FakeKernels:
    """Stands for the package: it compiles the present weights into their sum."""

    @staticmethod
    def compile(weights, **options):
        return torch.tensor(weights)


def on_a_pretended_gpu(monkeypatch):
    monkeypatch.setattr(backend, "import_pyjuice", lambda: FakeKernels)
    monkeypatch.setattr(
        backend, "to_pyjuice", lambda pc: sum(float(p.detach().double().sum()) for p in pc.bank.values())
    )
    pc = backend.JuiceCircuit(ct.structures.hmm(4, 2, 3))
    pc.randomize(seed=0)
    return pc


@pytest.mark.parametrize("write", ["data", "numpy", "optimizer"])
def test_the_kernels_are_those_of_the_present_weights(write, monkeypatch):
    pc = on_a_pretended_gpu(monkeypatch)
    before = float(pc._kernels())
    assert pc._kernels() is pc._kernels()
    first = next(iter(pc.parameters()))
    if write == "data":
        first.data.sub_(1.0)
    elif write == "numpy":
        first.detach().numpy()[...] -= 1.0
    else:
        with torch.no_grad():
            first.sub_(1.0)
    assert float(pc._kernels()) == pytest.approx(before - first.numel(), rel=1e-6)


def test_the_kernels_are_not_asked_about_evidence_that_is_relative_to_other_evidence(monkeypatch):
    pc = on_a_pretended_gpu(monkeypatch)
    plain = ct.compile(pc.circuit, seed=0)
    monkeypatch.setattr(backend.JuiceCircuit, "device", torch.device("cuda"))
    monkeypatch.setattr(pc, "_kernels", lambda: pytest.fail("the kernels know no relative evidence"))
    x = torch.tensor([[0, 1, 2, 1]])
    soft = ct.Evidence.soft(torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)))
    evidence = ct.Evidence.observe(x).relative_to(soft)
    with torch.no_grad():
        assert torch.equal(pc.log_partition(evidence), plain.log_partition(evidence))
