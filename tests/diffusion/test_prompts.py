"""Prompts: padding is seen, and what is no prompt is named."""

import pytest
import torch

from diffusion import DenoiserSpec, generate
from diffusion.decoding.prompts import padded_rows, token_rows
from diffusion.errors import ArgumentError

V, MASK, PAD, EOS = 7, 6, 5, 4
SPEC = {"vocab_size": V, "mask_id": MASK, "eos_ids": (EOS,), "pad_id": PAD, "forbidden_ids": (MASK, PAD)}


def spec(**change):
    return DenoiserSpec(**{**SPEC, "max_length": 20, **change})


def padded_prompts(prompt, spec):
    return padded_rows("prompt", token_rows("prompt", prompt, spec), None, spec, at_left=True)


class NextToken:
    """Predicts the number of valid tokens before the window, so that padding read as text shows."""

    spec = spec()

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window
        return 9.0 * torch.nn.functional.one_hot(valid[:, :start].sum(1), V).float().unsqueeze(1).repeat(
            1, stop - start, 1
        )


def test_padding_at_the_left_is_padding_in_tensors_and_lists():
    padded = [[PAD, PAD, 1, 2], [3, 1, 2, 0], [PAD, PAD, PAD, PAD]]
    valid = torch.tensor([[False, False, True, True], [True] * 4, [False] * 4])
    for prompt in (
        torch.tensor(padded),
        padded,
        torch.tensor(padded, dtype=torch.int32),
        [torch.tensor(r) for r in padded],
    ):
        tokens, found = padded_prompts(prompt, spec())
        assert torch.equal(tokens, torch.tensor(padded))
        assert torch.equal(found, valid)
    ragged, found = padded_prompts([[1, 2], [3, 1, 2, 0], []], spec())
    assert torch.equal(ragged, torch.tensor(padded))
    assert torch.equal(found, valid)


def test_a_padded_tensor_is_continued_like_the_rows_without_padding():
    options = {"gen_length": 2, "block_length": 2, "num_steps": 1, "temperature": 0.0, "stop_at_eos": False}
    padded = generate(NextToken(), torch.tensor([[PAD, PAD, 1, 2], [3, 1, 2, 1]]), **options)
    ragged = generate(NextToken(), [[1, 2], [3, 1, 2, 1]], **options)
    assert torch.equal(padded.tokens, ragged.tokens)
    assert torch.equal(padded.valid, ragged.valid)
    assert padded.generated.tolist() == [[2, 2], [4, 4]]


def test_a_pad_id_that_can_be_generated_is_text():
    tokens, valid = padded_prompts([[EOS, 1]], spec(pad_id=EOS, forbidden_ids=(MASK,)))
    assert tokens.tolist() == [[EOS, 1]]
    assert valid.all()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", "got text; encode it with the denoiser's tokenizer"),
        (["text", "more"], "got text"),
        ([[1.7, 2.2]], r"got torch.float32; token ids are whole numbers"),
        (torch.tensor([[1.0, 2.0]]), r"got torch.float32"),
        ([[True, False]], r"got torch.bool"),
        (torch.tensor([1, 2]), "with 2 rows; one prompt is a row too"),
        ([1, 2], "with 2 rows"),
        (3, "got int"),
        ([[[1], [2, 3]]], "got list: "),
        ([], "with 0 rows"),
        ([[0, 1], [2, PAD]], r"expected padding \(5\) at the left only, got one at position 1 of row 1"),
        ([[PAD, 1, PAD, 2]], "got one at position 2 of row 0"),
        ([[V]], "expected token ids from 0 to 6, got 7"),
        ([[-1]], "got -1"),
    ],
)
def test_what_is_no_prompt_is_named(prompt, message):
    with pytest.raises(ArgumentError, match=f"prompt: expected .*{message}|prompt: {message}"):
        generate(NextToken(), prompt, gen_length=2, block_length=2, num_steps=1)


def test_a_mask_that_is_the_pad_id_too_is_a_mask_where_it_was_given():
    tokens, valid = padded_prompts([[MASK, 1]], spec(pad_id=MASK, forbidden_ids=(MASK,)))
    assert valid.all()
    tokens, valid = padded_prompts([[1], [1, 2]], spec(pad_id=MASK, forbidden_ids=(MASK,)))
    assert tokens.tolist() == [[MASK, 1], [1, 2]]
    assert valid.tolist() == [[False, True], [True, True]]
