"""Heads travel through folders and a hub that is played by a folder; nothing here touches the network."""

import pytest
import torch
from huggingface_hub import ModelCard

import circuits as ct
import diffusion as df
from diffusion.errors import ArgumentError, CheckpointError

LENGTH, C, V = 4, 3, 6


@pytest.fixture
def head():
    pc = ct.compile(ct.structures.hmm(LENGTH, 2, C), dtype=torch.float64, seed=0)
    calibration = df.NoiseCalibration(C)
    torch.nn.init.normal_(calibration.bias)
    return df.CoupledHead(
        pc, 0.7, top_k=2, calibration=calibration, vocabulary=(5, 1, 2), tokenizer_fingerprint="0123456789abcdef"
    )


def same(one, other):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, LENGTH, V, dtype=torch.float64, generator=generator)
    targets = torch.tensor([5, 1, 2, 5]).expand(3, -1)
    masked = torch.tensor([True, True, False, True]).expand(3, -1)
    scores = [made.conditional_log_likelihood(logits, targets, masked) for made in (one, other)]
    return torch.equal(*scores) and one.tokenizer_fingerprint == other.tokenizer_fingerprint


def test_a_folder_holds_the_head_and_a_card_with_its_facts(head, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    for _ in range(2):  # a second time replaces the first
        head.save_pretrained(tmp_path, decoding=df.DecodingConfig(decode="marginal", strategy="entropy"))
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    text = (tmp_path / "README.md").read_text()
    for fact in (
        str(head.pc.circuit),
        "4 positions",
        "3, with ids of their own",
        "fingerprint 0123456789abcdef",
        "the 2 best tokens",
        "noise_calibration",
        "less than 0.7 of a block",
        "decode='marginal', strategy='entropy'",
        "df.CoupledHead.from_pretrained(",
        "gen_length=4",
    ):
        assert fact in text
    assert "Needed" not in text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "unfactor"
    assert "coupled-head" in card.data.tags
    assert same(df.CoupledHead.from_pretrained(tmp_path), head)
    assert same(df.CoupledHead.load(tmp_path), head)
    assert head.decoding == {}


def test_what_is_pushed_is_what_is_pulled(head, fake_hub):
    assert head.push_to_hub("head") == "https://example.org/somebody/head"
    assert same(df.CoupledHead.from_pretrained("somebody/head"), head)


def test_a_mixture_of_heads_travels_too(head, fake_hub, tmp_path):
    mixture = df.HeadMixture([head, df.CoupledHead(head.pc, vocabulary=(5, 1, 2))], vocab_size=V, num_knots=3)
    torch.nn.init.normal_(mixture.log_weights)
    mixture.save_pretrained(tmp_path, decoding={"decode": "marginal"})
    text = (tmp_path / "README.md").read_text()
    assert "df.HeadMixture.from_pretrained(" in text
    assert f"the plain prediction; {head.pc.circuit}, conditioners: noise_calibration; " in text
    assert "decode='marginal'" in text
    assert mixture.push_to_hub("mixture") == "https://example.org/somebody/mixture"
    generator = torch.Generator().manual_seed(0)
    said = df.Prediction.from_logits(torch.randn(2, LENGTH, V, dtype=torch.float64, generator=generator))
    tokens, masked = torch.tensor([[5, 1, 2, 5]] * 2), torch.tensor([[True, True, False, True]] * 2)
    expected = mixture.conditional_log_likelihood(said, tokens, masked)
    for found in (df.HeadMixture.from_pretrained(tmp_path), df.HeadMixture.from_pretrained("somebody/mixture")):
        assert torch.equal(found.conditional_log_likelihood(said, tokens, masked), expected)
    assert df.HeadMixture.load(tmp_path).decoding == {"decode": "marginal"}
    mixture.save(tmp_path / "smaller")
    df.HeadMixture([head], vocab_size=V).save(tmp_path / "smaller")
    assert len(df.HeadMixture.load(tmp_path / "smaller").heads) == 1
    mixture.log_weights.data[0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="log_weights: expected finite numbers"):
        mixture.save(tmp_path / "smaller")
    assert len(df.HeadMixture.load(tmp_path / "smaller").heads) == 1


def test_what_is_not_there_says_so(fake_hub, tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder, or a repository"):
        df.CoupledHead.from_pretrained("somebody/else")
    with pytest.raises(CheckpointError):
        df.CoupledHead.from_pretrained(tmp_path)


class Flat:
    """A denoiser for which all tokens but the mask are equally probable."""

    spec = df.DenoiserSpec(vocab_size=V, mask_id=0, eos_ids=(), pad_id=0, forbidden_ids=(0,), max_length=8)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        return torch.zeros(len(tokens), stop - start, V)


def test_a_head_is_decoded_as_it_says_unless_something_else_is_said(head, tmp_path):
    head.save_pretrained(tmp_path, decoding={"temperature": 1.0, "decode": "marginal", "activation_threshold": 0.0})
    loaded = df.CoupledHead.from_pretrained(tmp_path)
    assert loaded.decoding == {"temperature": 1.0, "decode": "marginal", "activation_threshold": 0.0}

    def written(head, **options):
        return df.generate(Flat(), [[]] * 8, gen_length=4, num_steps=2, head=head, seeds=range(8), **options)

    own, said = written(loaded), written(head, temperature=1.0, decode="marginal", activation_threshold=0.0)
    assert torch.equal(own.tokens, said.tokens)
    assert int(own.num_coupled.sum()) == 0
    assert int(written(loaded, activation_threshold=1.0).num_coupled.sum()) > 0
    assert len(written(loaded, temperature=0.0, decode="independent").tokens.unique(dim=0)) == 1
    assert torch.equal(written(loaded, config=df.DecodingConfig()).tokens, written(head).tokens)


@pytest.mark.parametrize("decoding", ["joint", 3, df.DecodingConfig])
def test_what_says_nothing_of_decoding_is_refused(head, tmp_path, decoding):
    with pytest.raises(ArgumentError, match="decoding"):
        head.save_pretrained(tmp_path / "head", decoding=decoding)
    assert not (tmp_path / "head").exists() or not any((tmp_path / "head").iterdir())


def test_unknown_options_of_decoding_are_named(head):
    head.decoding = {"temprature": 1.0}
    with pytest.raises(ArgumentError, match="temprature"):
        df.generate(Flat(), [[]], gen_length=4, head=head)
