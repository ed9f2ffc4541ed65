"""Checkpoints in the form of CoDD's circuits: input families with soft evidence, external weights, large tables."""

import itertools
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import circuits as ct
from circuits.interop import _build, _pickle, from_pyjuice, load_jpc, save_jpc

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, that import what lies beside them

import jpc as benchmark

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    juice = pytest.importorskip("pyjuice", reason="needs PyJuice")

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

LENGTH, STATES, VOCAB = 3, 4, 5
MODULE = "pyjuice.nodes.distributions."
FAMILIES = {
    "ExternProductCategorical": f"c{MODULE}external_categorical\nExternProductCategorical\n(I{VOCAB}\ntR.",
    "SoftEvidenceCategorical": f"c{MODULE}softevi_categorical\nSoftEvidenceCategorical\n(I{VOCAB}\nI01\ntR.",
    "Categorical": f"c{MODULE}categorical\nCategorical\n)\x81}}X\x08\x00\x00\x00num_catsI{VOCAB}\nsb.",
}
EXTERNAL = {
    "BlockScaleSumParams": "cpyjuice.nodes.external_params.block_scale\nBlockScaleSumParams\n(NNI00\nI00\ntR.",
    "LowRankSumParams": "cpyjuice.nodes.external_params.lowrank\nLowRankSumParams\n(I2\ntR.",
}


def records(block=2):
    return benchmark.hmm_records(LENGTH, STATES, VOCAB, block=block, seed=0)


def joint_of(nodes, block=2):
    """Enumerate the hidden Markov model of :func:`records` by its tables, over all paths: (C,) * L."""
    emission = nodes[0]["params"].astype(float).reshape(STATES, VOCAB)
    emission /= emission.sum(1, keepdims=True)
    blocks = next(node["params"] for node in nodes if node["type"] == "Sum" and "params" in node).astype(float)
    num_blocks = STATES // block
    transition = blocks.reshape(num_blocks, num_blocks, block, block).transpose(0, 2, 1, 3).reshape(STATES, STATES)
    transition /= transition.sum(1, keepdims=True)
    joint = np.zeros((VOCAB,) * LENGTH)
    for path in itertools.product(range(STATES), repeat=LENGTH):
        probability = 1 / STATES * np.prod([transition[a, b] for a, b in itertools.pairwise(path)])
        joint += probability * np.einsum("a,b,c->abc", *(emission[state] for state in path))
    return torch.from_numpy(joint)


def written(nodes, path, protocol=4):
    path.write_bytes(pickle.dumps(nodes, protocol))
    return path


def every(nodes, kind, **entries):
    return [{**node, **entries} if node["type"] == kind else node for node in nodes]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_family_with_soft_evidence_is_a_categorical_one(family, protocol, tmp_path):
    nodes = every(records(), "Input", dist=FAMILIES[family].encode("latin-1"))
    pc = load_jpc(written(nodes, tmp_path / "model.jpc", protocol), dtype=torch.float64)
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), joint_of(nodes), rtol=1e-6, atol=1e-9)
    assert pc.circuit.num_parameters == STATES + STATES**2 + STATES * VOCAB


@pytest.mark.parametrize("external", EXTERNAL)
def test_of_sums_with_external_weights_the_shared_ones_are_read(external, tmp_path):
    nodes = every(records(), "Sum", external_params=EXTERNAL[external].encode())
    pc = load_jpc(written(nodes, tmp_path / "model.jpc"), dtype=torch.float64)
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), joint_of(nodes), rtol=1e-6, atol=1e-9)


def test_pyjuice_pickles_these_families_in_the_forms_that_are_read(tmp_path):
    """PyJuice's own objects instead of ours, and its own reader on our file."""
    distributions, external = juice.distributions, juice.nodes.external_params
    for dist in (distributions.ExternProductCategorical(VOCAB), distributions.SoftEvidenceCategorical(VOCAB, False)):
        nodes = every(records(), "Input", dist=pickle.dumps(dist))
        path = written(nodes, tmp_path / "model.jpc")
        loaded, theirs = load_jpc(path, dtype=torch.float64), from_pyjuice(juice.load(str(path)), dtype=torch.float64)
        torch.testing.assert_close(ct.testing.enumerate_joint(loaded).exp(), joint_of(nodes), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ct.testing.enumerate_joint(loaded), ct.testing.enumerate_joint(theirs))
    for descriptor in (external.LowRankSumParams(rank=2), external.BlockScaleSumParams(ch_block_size=1)):
        nodes = every(records(), "Sum", external_params=pickle.dumps(descriptor))
        loaded = load_jpc(written(nodes, tmp_path / "model.jpc"), dtype=torch.float64)
        torch.testing.assert_close(ct.testing.enumerate_joint(loaded).exp(), joint_of(nodes), rtol=1e-6, atol=1e-9)


def test_masked_weights_are_zero(tmp_path):
    nodes = records()
    where = next(i for i, node in enumerate(nodes) if node["type"] == "Sum")
    mask = np.zeros(nodes[where]["params"].shape, bool)
    mask[0, 0, :] = True
    as_zeros = [dict(node) for node in nodes]
    as_zeros[where]["params"] = np.where(mask, 0, nodes[where]["params"])
    nodes[where]["zero_param_mask"] = mask
    pc = load_jpc(written(nodes, tmp_path / "model.jpc"), dtype=torch.float64)
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), joint_of(as_zeros), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_tables_are_read_in_every_precision_and_order(kind, order, tmp_path):
    nodes = records()
    table = np.asarray(nodes[0]["params"].reshape(STATES, VOCAB), dtype=kind, order=order)
    nodes[0]["params"] = table
    pc = load_jpc(written(nodes, tmp_path / "model.jpc"), dtype=torch.float64)
    bank = next(bank for name, bank in pc.bank.items() if name.startswith("input"))
    expected = torch.from_numpy(table.astype(float)).log().t()
    torch.testing.assert_close(bank[0].detach(), expected, rtol=1e-6 if kind != "<f8" else 1e-15, atol=0)


@pytest.mark.parametrize("units", [1, 2, 3])
def test_a_large_table_is_read_a_part_at_a_time(units, tmp_path, monkeypatch):
    vocab, bytes_of_unit = 100, 400
    path = written(benchmark.hmm_records(LENGTH, STATES, vocab, block=2, seed=0), tmp_path / "model.jpc")
    whole = load_jpc(path)
    monkeypatch.setattr(_build, "_PART", units * vocab)
    monkeypatch.setattr(_pickle, "_LONG_RUN", bytes_of_unit)
    sizes = []
    own = _pickle.FileBytes.read

    def recorded(self, start, stop):
        sizes.append(stop - start)
        return own(self, start, stop)

    monkeypatch.setattr(_pickle.FileBytes, "read", recorded)
    again = load_jpc(path)
    assert all(torch.equal(again.bank[name], whole.bank[name]) for name in whole.bank)
    assert sizes.count(units * bytes_of_unit) == STATES // units
    assert max(sizes) == units * bytes_of_unit


def test_numbers_in_float32_stay_in_float32(tmp_path):
    nodes = records()
    pc = load_jpc(written(nodes, tmp_path / "model.jpc"))
    bank = next(bank for name, bank in pc.bank.items() if name.startswith("input"))
    assert torch.equal(bank[0].detach(), torch.from_numpy(nodes[0]["params"].reshape(STATES, VOCAB)).log().t())


# Files for CoDD


def test_a_file_for_codd_has_the_inputs_whose_evidence_its_decoder_hears(tmp_path):
    pc = ct.compile(ct.structures.hmm(4, 4, 6), seed=0, dtype=torch.float64)
    save_jpc(pc, tmp_path / "model.jpc", for_="codd")
    inputs = [node for node in juice.load(str(tmp_path / "model.jpc")) if node.is_input()]
    assert {type(node.dist) for node in inputs} == {juice.distributions.ExternProductCategorical}
    assert {node.dist.num_cats for node in inputs} == {6}
    assert sum(node.is_tied() for node in inputs) == 3
    back = load_jpc(tmp_path / "model.jpc", dtype=torch.float64)
    torch.testing.assert_close(ct.testing.enumerate_joint(back), ct.testing.enumerate_joint(pc), rtol=1e-5, atol=1e-5)


def test_what_codd_cannot_read_is_not_written(tmp_path):
    bernoulli = ct.compile(ct.structures.hmm(3, 2, ct.Bernoulli()), seed=0)
    with pytest.raises(ct.PropertyError, match="Bernoulli"):
        save_jpc(bernoulli, tmp_path / "model.jpc", for_="codd")
    with pytest.raises(ct.ArgumentError, match="for_: expected 'pyjuice' or 'codd'"):
        save_jpc(bernoulli, tmp_path / "model.jpc", for_="dream")
    assert list(tmp_path.iterdir()) == []


# Hostile files


def deep_tuple_as_key():
    """A dictionary whose key is a tuple in a tuple in a tuple ...: its hash overflows the stack of C."""
    return b"\x80\x04}(" + b"N" + b"\x85" * 200_000 + b"N" + b"u."


def evil():
    nodes = records()
    huge = 1 << 200_000
    yield "a huge integer for a type", pickle.dumps(every(nodes, "Sum", type=huge), 4)
    yield "edges that are a number", pickle.dumps(every(nodes, "Product", edge_ids=np.array(5)), 4)
    yield "no edges at all", pickle.dumps(every(nodes, "Product", edge_ids=np.zeros((2, 0), int)), 4)
    yield "a huge size", pickle.dumps(every(nodes, "Sum", num_node_blocks=huge), 4)
    yield "a huge child", pickle.dumps(every(nodes, "Sum", chs=(huge,)), 4)
    yield "a deep key", deep_tuple_as_key()
    yield "numbers as a name", b"\x80\x04](}(\x8c\x04typeK\x01K\x02\x93ue."
    yield "one node many times", pickle.dumps([nodes[0]] * 3 + nodes, 4)
    yield "a far variable", pickle.dumps(every(nodes, "Input", scope=[1 << 23]), 4)
    yield "a numpy array of another shape", pickle.dumps(every(nodes, "Sum", zero_param_mask=np.ones(3, bool)), 4)
    yield "a text as a mask", pickle.dumps(every(nodes, "Sum", zero_param_mask="none"), 4)
    call = b"cos\nsystem\n(S'touch executed.flag'\ntR."
    yield "a call as external weights", pickle.dumps(every(nodes, "Sum", external_params=call), 4)
    yield "a call as a family", pickle.dumps(every(nodes, "Input", dist=call), 4)
    yield "an unknown descriptor", pickle.dumps(every(nodes, "Sum", external_params=b"cpyjuice.nodes\nEvil\n(tR."), 4)
    yield (
        "a class of elsewhere",
        pickle.dumps(
            every(nodes, "Input", dist=FAMILIES["ExternProductCategorical"].replace("pyjuice.", "evil.").encode()), 4
        ),
    )
    yield (
        "no number of categories",
        pickle.dumps(every(nodes, "Input", dist=f"c{MODULE}categorical\nCategorical\n(tR.".encode()), 4),
    )
    yield "a text longer than the file", b"\x80\x04]\x8d" + b"\xff" * 7 + b"\x0f."
    yield "a number longer than the file", b"\x80\x04]\x8b\xff\xff\xff\x7f."
    yield "a mask that leaves nothing", pickle.dumps(every(nodes, "Sum", zero_param_mask=np.ones((4, 2, 2), bool)), 4)


@pytest.mark.parametrize("name", [name for name, _ in evil()])
def test_hostile_files_are_refused_and_run_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.jpc"
    path.write_bytes(dict(evil())[name])
    with pytest.raises(ct.CheckpointError, match=r"bad\.jpc"):
        load_jpc(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_file_lacks_is_drawn_up_to_a_bound_in_all(tmp_path, monkeypatch):
    """A few bytes can name any number of tables."""
    monkeypatch.setattr(_build, "_MAX_DRAWN", STATES * VOCAB + 3)
    nodes = every(records(), "Input", dist=benchmark.family(VOCAB))
    one = [
        {key: value for key, value in node.items() if key != "params"} if node is nodes[0] else node for node in nodes
    ]
    load_jpc(written(one, tmp_path / "model.jpc"), seed=0)
    for node in one:
        node.pop("params", None)
    with pytest.raises(ct.CheckpointError, match="the limit to draw is 23 in all"):
        load_jpc(written(one, tmp_path / "model.jpc"), seed=0)


def test_the_instructions_of_a_pickle_are_counted(monkeypatch, tmp_path):
    path = written(records(), tmp_path / "model.jpc")
    monkeypatch.setattr(_pickle, "_MAX_INSTRUCTIONS", 100)
    with pytest.raises(ct.CheckpointError, match="expected at most 100 instructions"):
        load_jpc(path)


def test_one_table_that_many_nodes_name_takes_no_more_memory_than_the_file_stands_for(tmp_path, monkeypatch):
    """A pickle can hand one array to any number of nodes; each would get a table of its own."""
    monkeypatch.setattr("circuits.interop.jpc._LEAST_LIMIT", 1 << 10)
    states, vocab, length = 4, 500, 50
    table = np.full(states * vocab, 1 / vocab, np.float32)
    dist = benchmark.family(vocab)
    sizes = {"num_node_blocks": states, "block_size": 1}
    nodes = [
        {"type": "Input", **sizes, "chs": (), "scope": [var], "dist": dist, "params": table} for var in range(length)
    ]
    edges = np.repeat(np.arange(states)[:, None], length, 1)
    nodes.append({"type": "Product", **sizes, "chs": tuple(range(length)), "edge_ids": edges})
    root = {"type": "Sum", "num_node_blocks": 1, "block_size": 1, "chs": (length,)}
    edges = np.stack([np.zeros(states, int), np.arange(states)])
    nodes.append({**root, "edge_ids": edges, "params": np.full((states, 1, 1), 1 / states, np.float32)})
    path = written(nodes, tmp_path / "bad.jpc")
    assert path.stat().st_size < 4 * states * vocab * 4
    with pytest.raises(ct.CheckpointError, match="more than the file can stand for"):
        load_jpc(path)
    own = [{**node, "params": table.copy()} if node["type"] == "Input" else node for node in nodes]
    assert load_jpc(written(own, path)).circuit.num_vars == length


def test_a_chain_of_sources_is_followed_and_a_circle_refused(tmp_path):
    nodes = records()
    tied = [i for i, node in enumerate(nodes) if node["type"] == "Input"][1:]
    nodes[tied[1]]["source_node"] = tied[0]
    pc = load_jpc(written(nodes, tmp_path / "model.jpc"), dtype=torch.float64)
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), joint_of(nodes), rtol=1e-6, atol=1e-9)
    assert pc.circuit.num_parameters == STATES + STATES**2 + STATES * VOCAB
    nodes[tied[0]]["source_node"] = tied[1]
    with pytest.raises(ct.CheckpointError, match="circle"):
        load_jpc(written(nodes, tmp_path / "model.jpc"))


def test_every_cut_of_a_file_with_long_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_pickle, "_LONG_RUN", 400)
    path = written(benchmark.hmm_records(LENGTH, STATES, 100, block=2, seed=0), tmp_path / "model.jpc")
    assert load_jpc(path).circuit.num_vars == LENGTH
    data = path.read_bytes()
    for length in range(0, len(data), 41):
        path.write_bytes(data[:length])
        with pytest.raises(ct.CheckpointError):
            load_jpc(path)


def test_the_benchmark_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jpc.py", "--vocab", "40", "--states", "4", "--length", "3", "--threads", "1"])
    benchmark.main()
    assert "loaded in" in capsys.readouterr().out
