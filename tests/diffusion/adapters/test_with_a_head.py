"""Tiny models of every architecture decode, score and are measured with a head, alone, together and padded."""

import pytest
import tiny_models as tiny
import torch
from typer.testing import CliRunner

import circuits as ct
import diffusion as df
from diffusion.app.cli import app

NAMES = [tiny.LLADA, tiny.ILLADA, tiny.DREAM, tiny.MDLM, tiny.BD3LM, tiny.SDAR]
BLOCK = 4

pytest.importorskip("transformers", reason="LLaDA, Dream and SDAR run on classes of transformers")


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    return tiny.published(request.param, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory):
    circuit = ct.structures.hmm(seq_length=BLOCK, num_states=3, num_categories=tiny.VOCABULARY)
    folder = tmp_path_factory.mktemp("heads") / "head"
    df.CoupledHead(ct.compile(circuit, seed=0)).save(folder)
    return folder


def test_a_batch_is_decoded_as_its_texts_are_alone(folder, head_folder):
    model, head = df.load_denoiser(folder), df.CoupledHead.load(head_folder)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, tiny.END, (length,), generator=generator) for length in (1, 2, 3, 4, 4, 5, 6, 7)]
    options = {"gen_length": 8, "block_length": BLOCK, "num_steps": 4, "head": head, "stop_at_eos": False}
    together = df.generate(model, prompts, **options).generated
    for row, prompt in enumerate(prompts):
        assert torch.equal(df.generate(model, [prompt], **options).generated[0], together[row])
    forbidden = torch.tensor(model.spec.forbidden_ids)
    assert not bool(torch.isin(together, forbidden).any())


def test_a_batch_is_scored_as_its_texts_are_alone(folder, head_folder):
    model, head = df.load_denoiser(folder), df.CoupledHead.load(head_folder)
    generator = torch.Generator().manual_seed(1)
    prompt, answer = (torch.randint(0, tiny.END, (8, length), generator=generator) for length in (5, BLOCK))
    options = {"head": head, "method": "sequential"}
    together = df.log_likelihood(model, prompt, answer, **options)
    alone = [df.log_likelihood(model, prompt[i : i + 1], answer[i : i + 1], **options) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_gap_is_measured(folder, head_folder):
    model, head = df.load_denoiser(folder), df.CoupledHead.load(head_folder)
    data = torch.randint(0, tiny.END, (4, 3 + BLOCK), generator=torch.Generator().manual_seed(2))
    gap = df.evaluation.misspecification_gap(model, head, data, mask_ratios=(0.5, 1.0), num_bootstrap=10)
    one, many = gap.rows[0], gap.rows[1]
    assert (one.mask_ratio, many.mask_ratio) == (0.5, 1.0)


@pytest.mark.parametrize("command", ["generate --prompt abcab --length 8", "infill ab___c", "score --prompt ab cdef"])
def test_commands_take_it_by_name(folder, head_folder, command):
    result = CliRunner().invoke(app, [*command.split(), "--model", str(folder), "--head", str(head_folder)])
    assert result.exit_code == 0, result.output
    if command.startswith("infill"):
        assert result.output.strip().startswith("ab")
