"""What was saved is what is loaded; what is broken, hostile or from the future is refused with a CheckpointError."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import circuits as ct
from circuits import store
from circuits.files import file_hash
from circuits.io import records
from circuits.io import saving as io
from circuits.io.records import circuit_of, records_of


@pytest.fixture(scope="module")
def pc():
    a = [ct.inputs(0, 2, ct.Categorical(3), name="a"), ct.inputs(1, 2, ct.Bernoulli())]
    mixed = ct.sum(ct.product(*a, mode="outer"), ct.product(*a), num_units=2)
    return ct.compile(ct.Circuit(ct.sum(mixed, num_units=1, name="root ✓")), seed=0)


@pytest.fixture
def folder(pc, tmp_path):
    io.save(pc, tmp_path / "pc")
    return tmp_path / "pc"


def rewrite(folder, change):
    """Change the structure the way somebody who knows the hash would."""
    path = folder / io.STRUCTURE_FILE
    structure = json.loads(path.read_text())
    structure.pop("sha256")
    change(structure)
    path.write_text(json.dumps({"sha256": io._structure_hash(structure), **structure}))
    (folder / store.MANIFEST).unlink(missing_ok=True)  # there was none before


def rewrite_weights(folder, change):
    tensors = load_file(folder / io.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / io.WEIGHTS_FILE)
    rewrite(folder, lambda s: s.update(weights_sha256=file_hash(folder / io.WEIGHTS_FILE)))


def same_weights(one, other):
    return one.bank.keys() == other.bank.keys() and all(torch.equal(one.bank[k], other.bank[k]) for k in one.bank)


@given(ct.testing.circuits(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 100))
def test_a_loaded_circuit_is_the_saved_one_to_the_last_bit(circuit, dtype, seed):
    pc = ct.compile(circuit, dtype=dtype, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        io.save(pc, folder)
        loaded = io.load(folder)
    assert repr(loaded.circuit) == repr(circuit)  # the code that builds it: nodes, sharing, ties, names
    assert loaded.dtype == dtype
    assert loaded.circuit.num_parameters == circuit.num_parameters
    assert same_weights(loaded, pc)
    x = ct.queries.sample(pc, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), pc(x))


def test_ties_to_nodes_outside_of_the_circuit_or_later_in_it_survive():
    outside = ct.inputs(9, 2, ct.Categorical(3))
    chained = ct.inputs(0, 2, ct.Categorical(3), tied_to=ct.inputs(5, 2, ct.Categorical(3), tied_to=outside))
    also_outside = ct.inputs(1, 2, ct.Categorical(3), tied_to=outside)
    owner = ct.sum(ct.product(chained, also_outside), num_units=2)
    leaves = ct.inputs(2, 2, ct.Categorical(3)), ct.inputs(3, 2, ct.Bernoulli())
    first = ct.sum(ct.product(*leaves), num_units=2, tied_to=owner)
    circuit = ct.Circuit(ct.sum(ct.product(first, owner), num_units=1))
    loaded = circuit_of(json.loads(json.dumps(records_of(circuit))), circuit.num_vars)
    assert circuit.nodes.index(owner) > circuit.nodes.index(first)
    assert repr(loaded) == repr(circuit)
    assert loaded.num_parameters == circuit.num_parameters == 3 * 2 * 2 + 2 * 2 + 2 * 2 + 2
    pcs = [ct.compile(c, seed=1) for c in (circuit, loaded)]
    assert same_weights(*pcs)


def test_a_hundred_thousand_nodes_need_no_recursion():
    node = ct.inputs(0, 1, ct.Bernoulli())
    for _ in range(100_000):
        node = ct.sum(node, num_units=1)
    circuit = ct.Circuit(node)
    records = json.loads(json.dumps(records_of(circuit)))
    assert repr(circuit_of(records, 1)) == repr(circuit)


def test_dtype_and_device_can_be_chosen(pc, folder):
    loaded = io.load(folder, dtype=torch.float64, device="cpu")
    assert loaded.dtype == torch.float64
    assert all(torch.equal(loaded.bank[name].float(), pc.bank[name]) for name in pc.bank)
    with pytest.raises(ct.ArgumentError, match="dtype"):
        io.load(folder, dtype=torch.float16)


def test_saving_replaces_a_saved_circuit_and_nothing_else(pc, folder, tmp_path):
    other = ct.compile(ct.structures.hmm(3, 2, 2), seed=1)
    io.save(other, folder)
    assert same_weights(io.load(folder), other)
    assert os.listdir(tmp_path) == ["pc"]
    (folder / "thesis.tex").write_text("ten years of work")
    for path in (folder, folder / "thesis.tex"):
        with pytest.raises(ct.ArgumentError, match="not a saved circuit"):
            io.save(pc, path)
    assert (folder / "thesis.tex").read_text() == "ten years of work"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_circuits_that_could_not_be_loaded_are_not_saved(folder, tmp_path, bad):
    broken = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    with torch.no_grad():
        broken.bank["sum_2x2"][0, 0, 0] = bad
    with pytest.raises(ct.ArgumentError, match="NaN"):
        io.save(broken, folder)
    assert os.listdir(tmp_path) == ["pc"]
    io.load(folder)


def test_a_reader_who_is_overtaken_by_a_writer_reads_the_new_version(pc, folder, monkeypatch):
    new = ct.compile(ct.structures.hmm(3, 2, 2), seed=5)
    read, calls = io._read_weights, []

    def overtaken(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            io.save(new, folder)
        return read(*arguments)

    monkeypatch.setattr(io, "_read_weights", overtaken)
    assert same_weights(io.load(folder), new)


# Broken folders ---------------------------------------------------------------------------------------------------


def refused(folder, match=None):
    with pytest.raises(ct.CheckpointError, match=match) as caught:
        io.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_files_are_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", r"structure.json: expected a file that can be read, got No")
    (folder / io.WEIGHTS_FILE).unlink()
    refused(folder, r"weights.safetensors: expected a file that can be read, got No such file")
    refused(folder / io.STRUCTURE_FILE, r"structure.json: expected a file that can be read, got No")
    (folder / store.MANIFEST).unlink()
    refused(folder, r"weights.safetensors: expected a file that can be read, got No")
    (folder / io.STRUCTURE_FILE).unlink()
    refused(folder, r"structure.json: expected a file that can be read, got No")


@given(st.data())
def test_truncated_or_altered_files_are_refused(pc, data):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent).resolve() / "pc"
        io.save(pc, folder)
        path = folder / data.draw(st.sampled_from([io.STRUCTURE_FILE, io.WEIGHTS_FILE, store.MANIFEST]))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans(), label="truncate"):
            content = content[:position]
        else:
            content[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        refused(folder)


HUGE = 10**12
MUTATIONS = {
    "newer version": lambda s: s.update(format_version=2),
    "version of a wrong type": lambda s: s.update(format_version=[1]),
    "other format": lambda s: s.update(format="something else"),
    "missing key": lambda s: s.pop("num_vars"),
    "unknown key": lambda s: s.update(extra=1),
    "missing node key": lambda s: s["nodes"][0].pop("var"),
    "unknown node key": lambda s: s["nodes"][0].update(code="import os"),
    "no nodes": lambda s: s.update(nodes=[]),
    "nodes of a wrong type": lambda s: s.update(nodes={"0": 1}),
    "node of a wrong type": lambda s: s["nodes"].__setitem__(0, "input"),
    "unknown kind": lambda s: s["nodes"][0].update(kind="__class__"),
    "kind of a wrong type": lambda s: s["nodes"][0].update(kind=["input"]),
    "unknown family": lambda s: s["nodes"][0].update(family="os.system"),
    "unknown dtype": lambda s: s.update(dtype="int8"),
    "dtype of a wrong type": lambda s: s.update(dtype={}),
    "other dtype": lambda s: s.update(dtype="float64"),
    "unknown mode": lambda s: s["nodes"][2].update(mode=[]),
    "negative variable": lambda s: s["nodes"][0].update(var=-1),
    "huge variable": lambda s: s["nodes"][0].update(var=HUGE),
    "huge num_vars": lambda s: s.update(num_vars=HUGE),
    "huge sum": lambda s: s["nodes"][-1].update(num_units=HUGE),
    "large sum": lambda s: s["nodes"][4].update(num_units=1 << 31),
    "huge input": lambda s: [s["nodes"][i].update(num_units=1 << 31) for i in (0, 1)],
    "huge categories": lambda s: s["nodes"][0].update(num_categories=1 << 31),
    "fractional units": lambda s: s["nodes"][0].update(num_units=2.0),
    "boolean units": lambda s: s["nodes"][-1].update(num_units=True),
    "infinite units": lambda s: s["nodes"][0].update(num_units=float("inf")),
    "child is itself": lambda s: s["nodes"][-1].update(children=[len(s["nodes"]) - 1]),
    "child is later": lambda s: s["nodes"][2].update(children=[5]),
    "negative child": lambda s: s["nodes"][-1].update(children=[-1]),
    "text as child": lambda s: s["nodes"][-1].update(children=["0"]),
    "no children": lambda s: s["nodes"][-1].update(children=[]),
    "overlapping product": lambda s: s["nodes"][3].update(children=[0, 0]),
    "sum that is not smooth": lambda s: s["nodes"][4].update(children=[0, 2]),
    "two roots": lambda s: s["nodes"].append(dict(s["nodes"][-1], name="second root")),
    "name twice": lambda s: s["nodes"][1].update(name="a"),
    "name of a wrong type": lambda s: s["nodes"][0].update(name=["a"]),
    "tied to another shape": lambda s: s["nodes"][1].update(tied_to=0),
    "tied to another kind": lambda s: s["nodes"][-1].update(tied_to=0),
    "tied to a later node": lambda s: s["nodes"][0].update(tied_to=1),
    "unreachable node": lambda s: s["nodes"].insert(5, dict(s["nodes"][0], name="b")),
    "hash of a wrong type": lambda s: s.update(weights_sha256=None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_hostile_structures_are_refused(folder, mutation):
    rewrite(folder, MUTATIONS[mutation])
    refused(folder, "newer one" if mutation == "newer version" else None)


def test_outer_products_cannot_explode(folder):
    def change(structure):
        leaves = [
            {"kind": "input", "var": i, "num_units": 1 << 30, "family": "bernoulli", **({"tied_to": 0} if i else {})}
            for i in range(3000)
        ]
        top = {"kind": "product", "children": list(range(3000)), "mode": "outer"}
        structure.update(num_vars=3000, nodes=[*leaves, top])

    rewrite(folder, change)
    refused(folder, "expected an outer product of at most")


LEAF = {"kind": "input", "var": 0, "num_units": 1, "family": "categorical", "num_categories": 2}


def one_more(count):
    return {"kind": "sum", "num_units": 1, "children": [count - 1]}


LARGE = {
    "twenty tables, each of which is allowed": [
        {"kind": "input", "var": i, "num_units": 1, "family": "binomial", "num_trials": 1 << 26} for i in range(20)
    ]
    + [{"kind": "product", "mode": "elementwise", "children": list(range(20))}],
    "a long chain": [LEAF, *map(one_more, range(1, 200))],
    "many children": [LEAF, {"kind": "sum", "num_units": 1, "children": [0] * 300}],
    "products without end": [LEAF | {"num_units": 1 << 14, "var": i} for i in range(2)]
    + [{"kind": "product", "mode": "outer", "children": [0, 1]}] * 2,
}


@pytest.mark.parametrize("nodes", LARGE.values(), ids=LARGE)
def test_what_would_take_long_or_much_memory_is_refused_before_it_is_built(nodes, folder, monkeypatch):
    rewrite(
        folder,
        lambda structure: structure.update(
            num_vars=20 if len(nodes) == 21 else 2 if len(nodes) == 4 else 1, nodes=nodes
        ),
    )
    monkeypatch.setattr(io, "CompiledCircuit", None)  # calling it would fail
    monkeypatch.setattr(records, "_MAX_DEPTH", 100)
    monkeypatch.setattr(records, "_MAX_EDGES", 250)
    refused(folder, "expected at most")


def test_what_would_not_be_loaded_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_DEPTH", 5)
    with pytest.raises(
        ct.ArgumentError, match="expected at most 5 nodes on one path, got more; such a circuit cannot be saved"
    ):
        ct.save(ct.compile(ct.structures.hmm(3, 2, 2), seed=0), tmp_path / "pc")
    ct.save(ct.compile(ct.structures.hmm(2, 2, 2), seed=0), tmp_path / "pc")


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'"' + b"a" * 100],
    ids=lambda text: text[:4].decode("latin-1"),
)
def test_texts_that_are_no_structure_are_refused(folder, text):
    (folder / io.STRUCTURE_FILE).write_bytes(text)
    refused(folder)


def test_deep_nesting_inside_a_valid_file_is_refused(folder):
    path = folder / io.STRUCTURE_FILE
    path.write_text(path.read_text().replace('"nodes":[', '"nodes":' + "[" * 900 + "]" * 900 + ',"old":['))
    refused(folder)


WEIGHT_MUTATIONS = {
    "NaN": lambda t: t["sum_2x6"].fill_(torch.nan),
    "one NaN": lambda t: t["sum_2x6"][0, 0, :1].fill_(torch.nan),
    "+inf": lambda t: t["sum_2x6"][0, 0, :1].fill_(torch.inf),
    "no weight at all": lambda t: t["input_3x2"][0, :, 1].fill_(-torch.inf),
    "missing bank": lambda t: t.pop("sum_2x6"),
    "other name": lambda t: t.update(other=t.pop("sum_2x6")),
    "other shape": lambda t: t.update(sum_2x6=t["sum_2x6"].reshape(1, 6, 2)),
    "other dtype": lambda t: t.update(sum_2x6=t["sum_2x6"].to(torch.float16)),
    "one more": lambda t: t.update(more=torch.zeros(1 << 10)),
    "an empty one more": lambda t: t.update(more=torch.zeros(0)),
}


@pytest.mark.parametrize("mutation", WEIGHT_MUTATIONS)
def test_hostile_weights_are_refused(folder, mutation):
    rewrite_weights(folder, WEIGHT_MUTATIONS[mutation])
    refused(folder, "weights.safetensors")


def positions_in(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from positions_in(item, (*path, key))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([HUGE, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.data())
def test_any_change_of_the_structure_is_refused_or_is_a_circuit(pc, data):
    def change(structure):
        *path, last = data.draw(st.sampled_from(list(positions_in(structure))[1:]), label="where")
        container = structure
        for key in path:
            container = container[key]
        if data.draw(st.booleans(), label="delete"):
            del container[last]
        else:
            container[last] = data.draw(json_values, label="value")

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "pc"
        io.save(pc, folder)
        rewrite(folder, change)
        try:
            loaded = io.load(folder)
        except ct.CheckpointError:
            return
    assert not torch.isnan(loaded.log_partition(ct.Evidence.nothing(1, loaded.circuit.num_vars))).any()


def test_importing_loads_no_heavy_packages():
    code = "import sys, circuits.io, circuits.learning; print({'safetensors', 'hypothesis', 'rich'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "set()"
