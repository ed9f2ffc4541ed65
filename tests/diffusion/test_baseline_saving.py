"""A baseline head that was saved and loaded decodes the same texts; what cannot be saved or is another's is refused."""

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.decoding.baselines import (
    AdaptiveHead,
    AutoregressiveModel,
    CausalHead,
    CircuitModel,
    CopulaHead,
    EnergyHead,
    MixtureHead,
    load_head,
    saving,
)
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.testing import worlds

WORLD = worlds.hidden_markov(3, seed=1)
V = WORLD.spec.vocab_size


def unlike_fresh(module):
    """Return a network whose weights no seed gives."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return module


def autoregressive():
    return unlike_fresh(AutoregressiveModel(V, 3, width=6))


HEADS = {
    "copula": lambda: CopulaHead(WORLD.circuit(dtype=torch.float64), num_sweeps=3, tolerance=1e-3, top_k=2),
    "energy": lambda: EnergyHead(CircuitModel(WORLD.circuit()), num_candidates=3, multiplies=True),
    "energy of a network": lambda: EnergyHead(autoregressive(), num_candidates=5),
    "adaptive": lambda: AdaptiveHead(CircuitModel(WORLD.circuit()), mixture_weight=0.25, corrects=True),
    "adaptive of a network": lambda: AdaptiveHead(autoregressive(), mixture_weight=0.75),
    "causal": lambda: unlike_fresh(CausalHead(V, 3, width=6)),
    "causal in double": lambda: unlike_fresh(CausalHead(V, 3, width=6).double()),
    "mixture": lambda: unlike_fresh(MixtureHead(V, 3, 5, width=6)),
}


def drawn(head):
    nothing = torch.zeros(40, 0, dtype=torch.int64)
    options = {"gen_length": 3, "num_steps": 2, "temperature": 1.0, "seeds": range(40)}
    return df.generate(WORLD.denoiser(), nothing, head=head, **options).generated


@pytest.mark.parametrize("name", HEADS)
def test_a_loaded_head_decodes_the_same_texts(name, tmp_path):
    head = HEADS[name]()
    head.save(tmp_path / "head")
    for load in (type(head).load, load_head):
        loaded = load(tmp_path / "head")
        assert type(loaded) is type(head)
        assert torch.equal(drawn(loaded), drawn(head))
        settings = {key: value for key, value in vars(head).items() if isinstance(value, (int, float))}
        assert settings == {key: vars(loaded)[key] for key in settings}
        if isinstance(head, torch.nn.Module):
            assert {w.dtype for w in loaded.parameters()} == {w.dtype for w in head.parameters()}
    assert not torch.equal(drawn(head), drawn(None))  # the head has a say
    loaded.save(tmp_path / "head")  # in its place
    assert torch.equal(drawn(load_head(tmp_path / "head")), drawn(head))


def test_another_kind_is_refused(tmp_path):
    HEADS["mixture"]().save(tmp_path / "head")
    with pytest.raises(CheckpointError, match="expected CausalHead, got a head of kind 'mixture'; load it with df"):
        CausalHead.load(tmp_path / "head")
    df.CoupledHead(WORLD.circuit()).save(tmp_path / "coupled")
    for load in (load_head, MixtureHead.load):
        with pytest.raises(CheckpointError, match="expected the format unfactor-baseline-head, got 'unfactor-coupled"):
            load(tmp_path / "coupled")
    with pytest.raises(ArgumentError, match="is not a saved baseline head"):
        HEADS["mixture"]().save(tmp_path / "coupled")


def test_a_head_and_the_circuit_of_another_do_not_fit_together(tmp_path):
    HEADS["copula"]().save(tmp_path / "one")
    ct.save(ct.compile(ct.structures.hmm(3, 2, V), seed=5), tmp_path / "one" / "circuit")
    with pytest.raises(CheckpointError, match=r"circuit/manifest.json: expected the content that its hash is of"):
        load_head(tmp_path / "one")
    (tmp_path / "one" / "manifest.json").unlink()  # there was none before
    with pytest.raises(CheckpointError, match=r"expected a head of the circuit beside it, .*; save the head again"):
        load_head(tmp_path / "one")


class OwnModel:
    block_length, vocab_size = 3, V

    def log_conditionals(self, blocks):
        return torch.zeros(*blocks.shape, V).log_softmax(-1)


class OwnHead(CausalHead):
    pass


def test_what_only_its_owner_can_save_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="model: expected CircuitModel or AutoregressiveModel, got OwnModel; save"):
        EnergyHead(OwnModel()).save(tmp_path / "head")
    with pytest.raises(ArgumentError, match="got OwnHead with that of another, 'causal'; give the class a kind"):
        OwnHead(V, 3).save(tmp_path / "head")
    broken = CausalHead(V, 3, width=6)
    with torch.no_grad():
        broken.output.bias[0] = torch.nan
    with pytest.raises(ArgumentError, match=r"head: output.bias has NaN or infinite numbers"):
        broken.save(tmp_path / "head")
    assert not list(tmp_path.iterdir())


def test_a_class_of_your_own_with_a_kind_is_saved_and_loaded(tmp_path):
    kinds = dict(saving.KINDS)
    try:

        class Named(CausalHead):
            kind = "named"

        Named(V, 3, width=6, seed=4).save(tmp_path / "head")
        assert type(load_head(tmp_path / "head")) is Named
        assert type(CausalHead.load(tmp_path / "head")) is Named
    finally:
        saving.KINDS.clear()
        saving.KINDS.update(kinds)
    with pytest.raises(CheckpointError, match=r"got a head of kind 'named'; load it .* once its class is imported"):
        load_head(tmp_path / "head")


def test_settings_that_no_head_has_are_refused(tmp_path):
    """With hashes that are right: a file that another version wrote."""
    for settings in ({"num_sweeps": 0}, {"sweeps": 3}, [1], {"num_sweeps": -1.5}):
        content = saving.Content(settings, {}, WORLD.circuit())
        saving.save_content(tmp_path / "head", "copula", CopulaHead, content)
        with pytest.raises(CheckpointError, match=r"expected what a .* is built of, got "):
            load_head(tmp_path / "head")
    saving.save_content(tmp_path / "head", "copula", CopulaHead, saving.Content({}, {}))
    with pytest.raises(CheckpointError, match="is built of, got 'circuit'"):
        load_head(tmp_path / "head")
