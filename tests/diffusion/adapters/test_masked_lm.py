"""Masked language models of transformers, written to disk and loaded by name, against the models themselves."""

import json

import masked_models
import pytest
import torch
from safetensors.torch import load_file, save_file

import circuits as ct
import diffusion as df
from diffusion.app.models import open_models
from diffusion.denoisers.masked_lm import MaskedLMDenoiser
from diffusion.errors import ArgumentError, CheckpointError

pytest.importorskip("transformers", reason="masked language models are those of transformers")

KINDS = sorted(masked_models.ARCHITECTURES)


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    """Return a model as transformers has it, and the denoiser that is loaded from its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    model = masked_models.write(request.param, folder)
    return model, df.load_denoiser(folder), folder


class Published(df.testing.DenoiserTestCase):
    kind = ""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        type(self).path = tmp_path_factory.mktemp(self.kind)

    def make_denoiser(self):
        masked_models.write(self.kind, self.path)
        return df.load_denoiser(self.path)


class TestBert(Published):
    kind = "bert"


class TestRoberta(Published):
    kind = "roberta"


class TestModernBert(Published):
    kind = "modernbert"


class TestEsm(Published):
    kind = "esm"


def canvases(denoiser, length=9):
    tokens = torch.randint(5, 21, (8, length), generator=torch.Generator().manual_seed(1))
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    return tokens.masked_fill(hidden, denoiser.spec.mask_id)


def test_it_answers_what_the_model_answers_between_its_special_tokens(published):
    model, denoiser, _ = published
    tokens = canvases(denoiser)
    begin, end = (model.config.pad_token_id == 1 and (0, 2)) or (2, 3)
    framed = torch.nn.functional.pad(torch.nn.functional.pad(tokens, (1, 0), value=begin), (0, 1), value=end)
    with torch.no_grad():
        expected = model(input_ids=framed, attention_mask=torch.ones_like(framed)).logits[:, 1:-1]
        found = denoiser.logits(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_padding_at_either_side_and_in_between_changes_nothing(published):
    _, denoiser, _ = published
    tokens = canvases(denoiser)
    with torch.no_grad():
        expected = denoiser.logits(tokens)
        for columns in ([3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 5, 6, 7, 8, 11, 12]):
            valid = torch.zeros(8, 13, dtype=torch.bool)
            valid[:, columns] = True
            wide = torch.full((8, 13), denoiser.spec.pad_id)
            wide[valid] = tokens.flatten()
            found = denoiser.logits(wide, valid=valid)[:, columns]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_text_is_as_long_as_there_are_positions_for(published):
    _, denoiser, _ = published
    longest = masked_models.LONGEST
    assert denoiser.spec.max_length == longest
    assert denoiser.logits(torch.full((1, longest), 7)).isfinite().all()
    with pytest.raises(ArgumentError, match=f"at most {longest}"):
        denoiser.logits(torch.full((1, longest + 1), 7))


def test_special_tokens_and_ids_without_a_token_are_forbidden(published):
    _, denoiser, _ = published
    assert denoiser.spec.forbidden_ids == (0, 1, 2, 3, 4, *range(21, denoiser.spec.vocab_size))
    assert denoiser.spec.mask_id == 4
    assert denoiser.spec.eos_ids == ()


def test_features_are_what_the_head_of_the_model_reads(published):
    model, denoiser, _ = published
    head = {"bert": "cls", "roberta": "lm_head", "esm": "lm_head"}.get(model.config.model_type)
    tokens = canvases(denoiser)
    with torch.no_grad():
        logits, features = denoiser.logits_and_features(tokens, window=(2, 6))
        read = getattr(model, head)(features) if head else model.decoder(model.head(features))
    torch.testing.assert_close(read, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "torn", "no tokenizer"])
def test_weights_that_are_not_all_there_are_refused(tmp_path, damage):
    masked_models.write("bert", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.0.output.dense.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.zeros(3, 3)
    elif damage == "nan":
        tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "no tokenizer":
        for file in tmp_path.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        df.load_denoiser(tmp_path)


def test_a_model_in_memory_needs_its_ids_only():
    import transformers

    model, _ = masked_models.bert(transformers)
    denoiser = MaskedLMDenoiser(model, mask_id=4, pad_id=0, prefix_ids=(2,), suffix_ids=(3,), forbidden_ids=(1,))
    assert denoiser.spec.forbidden_ids == (0, 1, 2, 3, 4)
    assert not model.training
    with pytest.raises(ArgumentError, match="max_length: expected at most 16"):
        MaskedLMDenoiser(model, mask_id=4, pad_id=0, prefix_ids=(2,), suffix_ids=(3,), max_length=17)
    tokenizer = masked_models.tokenizer_of([*masked_models.PADS_FIRST, "more", "than", "the", "model", "has"])
    with pytest.raises(ArgumentError, match="the model's own"):
        MaskedLMDenoiser.of(model, tokenizer)


def test_half_precision_gives_float32(tmp_path):
    masked_models.write("bert", tmp_path)
    denoiser = df.load_denoiser(tmp_path, dtype="bfloat16")
    logits, features = denoiser.logits_and_features(canvases(denoiser))
    assert (logits.dtype, features.dtype) == (torch.float32, torch.float32)
    assert denoiser.model.dtype == torch.bfloat16


def test_it_decodes_scores_and_is_evaluated_with_a_head_in_any_batch(published):
    _, denoiser, _ = published
    size = denoiser.spec.vocab_size
    head = df.CoupledHead(ct.compile(ct.structures.hmm(4, 3, size), seed=0))
    prompts = [[5, 6, 7][: 1 + row % 3] for row in range(8)]
    options = {"gen_length": 8, "block_length": 4, "num_steps": 4, "head": head, "temperature": 1.0}
    together = df.generate(denoiser, prompts, seeds=list(range(8)), **options)
    written = together.generated
    assert not torch.isin(written, torch.tensor(denoiser.spec.forbidden_ids)).any()
    for row in (0, 1, 2):
        alone = df.generate(denoiser, prompts[row : row + 1], seeds=[row], **options)
        assert torch.equal(alone.generated[0], written[row])
    scores = df.log_likelihood(denoiser, prompts, written, head=head, strategy="entropy", num_steps=2)
    for row in (0, 1, 2):
        one = df.log_likelihood(
            denoiser, prompts[row : row + 1], written[row : row + 1], head=head, strategy="entropy", num_steps=2
        )
        torch.testing.assert_close(one[0], scores[row], atol=1e-4, rtol=1e-4)
    table = df.evaluation.misspecification_gap(denoiser, head, written, mask_ratios=(0.5,))
    assert all(getattr(table.rows[0], name).value > 1 for name in df.evaluation.gap.MODELS)


def test_a_config_of_an_unknown_architecture_is_refused(tmp_path):
    masked_models.write("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(CheckpointError, match="unheard_of"):
        df.load_denoiser(tmp_path)


def test_a_head_of_another_tokenizer_is_refused_when_models_are_opened(tmp_path):
    masked_models.write("bert", tmp_path / "model")
    fingerprint = df.load_denoiser(tmp_path / "model").tokenizer_fingerprint
    assert fingerprint == df.load_tokenizer(tmp_path / "model").fingerprint
    pc = ct.compile(ct.structures.hmm(4, 2, 21), seed=0)
    df.CoupledHead(pc, tokenizer_fingerprint=fingerprint).save(tmp_path / "own")
    df.CoupledHead(pc, tokenizer_fingerprint="another").save(tmp_path / "other")
    options = {"model": str(tmp_path / "model"), "device": "cpu"}
    assert open_models(head=tmp_path / "own", **options).head.tokenizer_fingerprint == fingerprint
    with pytest.raises(ArgumentError, match="got one for another"):
        open_models(head=tmp_path / "other", **options)
