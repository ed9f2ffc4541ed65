"""Circuits and settings in CoDD's form: heads of them, conversion, and its names on the command line."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import typer

import circuits as ct
import diffusion as df
from circuits.interop import load_jpc
from diffusion.app import cli
from diffusion.app.commands.decode import lengths
from diffusion.app.options import OPTIONS, DecodingOptions
from diffusion.decoding import names
from diffusion.decoding.config import STRATEGIES
from diffusion.errors import ArgumentError, CheckpointError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, that import what lies beside them

import jpc as benchmark

V, MASK, L = 6, 0, 4
SETTINGS = {
    "base_model_id": "GSAI-ML/LLaDA-8B-Instruct", "pc_model_id": "some/circuit", "base_model_type": "llada",
    "mask_id": 126336, "vocab_size": V, "num_steps": 8, "gen_length": 12, "block_length": L, "temperature": 0.0,
    "cfg_scale": 0.0, "remasking": "low_confidence", "pc_temperature": 0.2, "pc_frac": 0.5, "reverse_frac": False,
}  # fmt: skip


@pytest.fixture
def jpc(tmp_path):
    path = tmp_path / "circuit" / "model.jpc"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(benchmark.hmm_records(L, 4, V, block=2, seed=0)))
    return path


@pytest.fixture
def repository(jpc):
    folder = jpc.parents[1] / "codd"
    folder.mkdir()
    (folder / "pc_model.jpc").write_bytes(jpc.read_bytes())
    (folder / "codd_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture
def run(run_program):
    return run_program


def tiny_denoiser():
    config = df.TransformerConfig(
        vocab_size=V, mask_id=MASK, pad_id=1, eos_id=2, width=8, num_layers=1, num_heads=2, max_length=64
    )
    return df.TransformerDenoiser(config, seed=0).eval()


# Heads and settings


def test_a_head_is_made_of_a_file_and_of_a_folder(jpc, repository):
    x = torch.tensor([[3, 4, 5, 3], [0, 1, 2, 5]])
    expected = load_jpc(jpc)(x)
    for place in (jpc, str(jpc), jpc.parent, repository):
        head = df.CoupledHead.from_jpc(place, activation_threshold=0.5)
        assert torch.equal(head.pc(x), expected)
        assert (head.activation_threshold, head.vocab_size, head.block_length) == (0.5, V, L)


def test_a_repository_is_a_head_and_how_it_decodes(repository):
    head, config = df.codd.load(repository)
    assert (head.temperature, head.activation_threshold) == (0.2, 0.5)
    assert config == df.codd.CoddConfig(**SETTINGS)
    expected = df.DecodingConfig(decode="latent", strategy="low_confidence", temperature=0.2, activation_threshold=0.5)
    assert config.decoding == expected
    assert config.options == {
        "num_steps": 8, "gen_length": 12, "block_length": L, "config": expected, "controls": [],
    }  # fmt: skip
    out = df.generate(tiny_denoiser(), torch.tensor([[3]]), head=head, seeds=[0], **config.options)
    assert out.tokens.shape == (1, 13)
    assert out.num_calls <= 8


@pytest.mark.parametrize(
    ("pc_temperature", "temperature", "tau"), [(0.1, 0.0, 0.1), (0.0, 0.0, 1.0), (1.5, 0.0, 1.0), (0.1, 0.7, 0.7)]
)
def test_the_temperature_is_the_one_that_codd_heeds(pc_temperature, temperature, tau):
    config = df.codd.CoddConfig(pc_temperature=pc_temperature, temperature=temperature)
    assert config.decoding.temperature == tau


def test_guidance_and_names_of_strategies_come_along():
    config = df.codd.CoddConfig(cfg_scale=1.5, remasking="topprob", reverse_frac=True)
    assert config.options["controls"] == [df.controls.Guidance(1.5)]
    assert (config.decoding.strategy, config.decoding.reverse_activation) == ("top_prob", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pc_frac": "half"}, "pc_frac: expected a number from 0"),
        ({"pc_frac": -1}, "pc_frac"),
        ({"pc_temperature": float("nan")}, "pc_temperature"),
        ({"num_steps": 1.5}, "num_steps: expected an integer from 0"),
        ({"num_steps": True}, "num_steps: expected an integer from 0"),
        ({"reverse_frac": 1}, "reverse_frac: expected bool"),
        ({"remasking": None}, "remasking: expected str"),
        ({"pc_fraction": 0.5}, "keys: expected no others, got 'pc_fraction'"),
        ({"vocab_size": V - 1}, "expected a circuit of at most 5 tokens.*got 6"),
    ],
)
def test_settings_that_are_none_are_refused(repository, changes, message):
    (repository / "codd_config.json").write_text(json.dumps({**SETTINGS, **changes}))
    with pytest.raises(CheckpointError, match=message):
        df.codd.load(repository)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_file_of_settings_that_is_none_is_refused(repository, text):
    (repository / "codd_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"codd_config\.json"):
        df.codd.load(repository)


def test_what_is_missing_is_said(jpc, repository, tmp_path):
    with pytest.raises(ArgumentError, match=r"expected a folder or repository with codd_config\.json"):
        df.codd.load(jpc.parent)
    (repository / "pc_model.jpc").unlink()
    with pytest.raises(CheckpointError, match="expected one checkpoint"):
        df.codd.load(repository)
    for name in ("a.jpc", "b.jpc"):
        (repository / name).write_bytes(jpc.read_bytes())
    with pytest.raises(CheckpointError, match=r"a\.jpc, b\.jpc.*name the file"):
        df.CoupledHead.from_jpc(repository)
    with pytest.raises(CheckpointError, match="expected a file that can be read"):
        df.CoupledHead.from_jpc(tmp_path / "none.jpc")
    with pytest.raises(CheckpointError, match="expected a file, a folder or a repository"):
        df.CoupledHead.from_jpc(tmp_path / "none")


# Above the threshold in place of below it


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_the_circuit_is_used_below_the_threshold_or_above_it(jpc, reverse, threshold):
    """One block of four positions, one a call: shares 1, 3/4, 1/2, 1/4."""
    head = df.CoupledHead.from_jpc(jpc)
    out = df.generate(
        tiny_denoiser(),
        torch.tensor([[3]]),
        gen_length=L,
        num_steps=L,
        head=head,
        stop_at_eos=False,
        config=df.DecodingConfig(activation_threshold=threshold, reverse_activation=reverse),
    )
    shares = [1, 3 / 4, 1 / 2, 1 / 4]
    used = sum(share > threshold if reverse else share < threshold for share in shares)
    assert out.num_coupled.tolist() == [used]


def test_reverse_activation_is_true_or_false():
    with pytest.raises(ArgumentError, match="reverse_activation: expected True or False"):
        df.DecodingConfig(reverse_activation=1)


# Names


def test_every_name_of_the_table_is_an_option_of_the_command_line():
    commands = typer.main.get_command(cli.app).commands
    options = [option for command in ("generate", "evaluate") for option in commands[command].params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    for one in names.OPTIONS:
        for name in one.theirs.values():
            assert f"--{name.replace('_', '-')}" in known, name


def test_every_name_of_a_strategy_stands_for_one_of_ours():
    assert set(names.STRATEGIES.values()) <= set(STRATEGIES)
    assert not set(names.STRATEGIES) & set(STRATEGIES)
    assert names.strategy_named("entropy") == "entropy"
    assert names.strategy_named(None) is None


def given(**values):
    return DecodingOptions({**dict.fromkeys(OPTIONS), **DecodingOptions.DEFAULTS, **values})


@pytest.mark.parametrize(
    ("option", "message"), [("factor", "entropy_bound"), ("alg_temp", "random"), ("sampler_config", "its parts")]
)
def test_options_that_are_not_here_are_refused_with_a_way_out(option, message):
    with pytest.raises(ArgumentError, match=f"another project's.*{message}"):
        given(**{option: "0.5"}).changes  # noqa: B018


def test_the_names_of_strategies_are_those_of_the_library():
    assert given(strategy="topprob").changes["strategy"] == "top_prob"
    assert given(strategy="origin", activation_threshold=0.5).changes["strategy"] == "random"


def test_tokens_a_step_are_steps():
    assert lengths(given(), 10, 4, None, 3) == {"gen_length": 10, "block_length": 4, "num_steps": 4}
    assert lengths(given(), 10, 4, 5, None)["num_steps"] == 5
    assert lengths(given(), 10, 4, None, None)["num_steps"] == 10
    plan = df.DynamicWindows(5, 4)
    assert lengths(given(dynamic_windows=True), 10, 4, 5, None) == {"gen_length": 10, "plan": plan}
    with pytest.raises(ArgumentError, match="tokens_per_step: expected it or steps"):
        lengths(given(), 10, 4, 5, 3)


# Conversion


def test_a_file_becomes_a_head_and_a_file_for_codd_again(run, jpc, tmp_path):
    pytest.importorskip("pyjuice", reason="needs PyJuice")
    code, said, _ = run("convert", jpc, "--out", tmp_path / "head")
    assert (code, "--head" in said) == (0, True)
    head = df.CoupledHead.load(tmp_path / "head")
    expected = ct.testing.enumerate_joint(load_jpc(jpc))
    torch.testing.assert_close(ct.testing.enumerate_joint(head.pc), expected)
    for source, form in ((tmp_path / "head", "codd"), (tmp_path / "head" / "circuit", "jpc")):
        target = tmp_path / f"{form}.jpc"
        code, said, _ = run("convert", source, "--to", form, "--out", target)
        assert code == 0
        assert ("--pc_frac 1" in said) == (form == "codd")
        assert (b"ExternProductCategorical" in target.read_bytes()) == (form == "codd")
        torch.testing.assert_close(ct.testing.enumerate_joint(load_jpc(target)), expected, rtol=1e-5, atol=1e-5)


def test_what_a_file_cannot_hold_is_not_lost_silently(run, tmp_path):
    pc = ct.compile(ct.structures.hmm(L, 2, V), seed=0)
    df.CoupledHead(pc, calibration=df.NoiseCalibration(V)).save(tmp_path / "calibrated")
    df.CoupledHead(pc, normalization="local").save(tmp_path / "local")
    for name, lost in (("calibrated", "NoiseCalibration"), ("local", "normalization 'local'")):
        code, _, error = run("convert", tmp_path / name, "--to", "codd", "--out", tmp_path / "out.jpc")
        assert code == 2
        assert lost in error
        assert str(tmp_path / name / "circuit") in error
    assert run("convert", tmp_path / "none", "--out", tmp_path / "out")[0] == 2
    assert run("convert", tmp_path / "local", "--to", "dream", "--out", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out.jpc").exists()
