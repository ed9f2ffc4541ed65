"""Pictures of decoding, and the terminal: what is shown of each token at each step."""

import io

import pytest
import torch
from PIL import Image
from rich.console import Console

import diffusion as df
from diffusion.app.stream import streamed
from diffusion.decoding.generation import Step
from diffusion.decoding.pictures import _Shots, draw_trajectory, written_text

MASK, PAD, EOS = 7, 6, 5
BLUE, BOX = (0x1F, 0x6F, 0xB4), (0xE9, 0xE9, 0xE9)


class Letters:
    """Ids 0 to 3 are a to d, 4 is the line feed; special tokens are nothing."""

    mask_id = MASK

    def decode(self, ids):
        return "".join("abcd\n"[id] if id < 5 else "" for id in ids)


@pytest.fixture
def out():
    """Prompt "a" beside padding; then b and the end are written, then c, and what is after the end goes."""
    trajectory = torch.tensor(
        [[PAD, 0, MASK, MASK, MASK, MASK], [PAD, 0, MASK, 1, EOS, MASK], [PAD, 0, 2, 1, EOS, PAD]]
    )
    valid = torch.tensor([[False, True, True, True, True, False]])
    count = torch.ones(1, dtype=torch.int64)
    return df.Generation(
        tokens=trajectory[-1:], valid=valid, prompt_length=2, num_calls=2, row_calls=count, num_windows=count,
        num_coupled=count, tokens_per_call=1.5, trajectory=trajectory.unsqueeze(1),
    )  # fmt: skip


def test_every_token_is_given_masked_new_or_old(out):
    shots = _Shots(out, Letters(), 0, 64, MASK)
    assert shots.ids == [[0, MASK, MASK, MASK], [0, MASK, 1, EOS], [0, 2, 1, EOS]]
    states = [[shots.state(place, index, index - 1) for place in range(4)] for index in range(3)]
    assert states == [
        ["given", "masked", "masked", "masked"],
        ["given", "masked", "new", "new"],
        ["given", "new", "old", "old"],
    ]


def test_an_animation_has_a_frame_for_every_state_and_a_picture_all_of_them(out, tmp_path):
    draw_trajectory(out, Letters(), tmp_path / "a.gif")
    draw_trajectory(out, Letters(), tmp_path / "a.png", width=2)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
        assert image.info["loop"] == 0
        seen = []
        for index in range(3):
            image.seek(index)
            pixels = {pixel: count for count, pixel in image.convert("RGB").getcolors(1 << 20)}
            seen.append(tuple(pixels.get(colour, 0) > 100 for colour in (BLUE, BOX)))
        assert seen == [(False, True), (True, True), (True, False)]
        size = image.size
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.height == 3 * (size[1] + 28)  # two tokens a line: a line more
    assert {path.name for path in tmp_path.iterdir()} == {"a.gif", "a.png"}


def test_long_trajectories_show_twelve_states_and_lines_are_as_wide_as_asked(out, tmp_path):
    steps = 40
    denoiser = df.testing.worlds.hidden_markov(8, num_words=2).denoiser()

    class Words:
        mask_id = denoiser.spec.mask_id

        def decode(self, ids):
            return "".join(["one ", "two "][id] for id in ids if id < 2)

    long = df.generate(denoiser, [[]], gen_length=8, num_steps=8, record=True)
    assert len(_Shots(long, Words(), 0, 16, Words.mask_id).cells) == 8
    assert _Shots(long, Words(), 0, 16, Words.mask_id).cells[3:6] == [(0, 12), (1, 0), (1, 4)]
    frames = _Shots(out, Letters(), 0, 64, MASK)
    frames.ids = frames.ids[:1] + [frames.ids[1]] * (steps - 1) + frames.ids[2:]
    assert frames.picture().height == 12 * frames.frame(0, -1).height


def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(out, tmp_path):
    from dataclasses import replace

    class Nameless:
        decode = Letters.decode

    for made, tokenizer, name, options, message in [
        (out, Letters(), "a.jpg", {}, "path: expected a .png or .gif"),
        (replace(out, trajectory=None), Letters(), "a.png", {}, "record=True"),
        (out, Letters(), "a.png", {"row": 1}, "row: expected 0 to 0"),
        (out, Letters(), "a.png", {"width": 0}, "width"),
        (out, Nameless(), "a.png", {}, "mask_id: expected"),
    ]:
        with pytest.raises(df.errors.ArgumentError, match=message):
            draw_trajectory(made, tokenizer, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
    draw_trajectory(out, Nameless(), tmp_path / "a.png", mask_id=MASK)


def test_masks_are_placeholders_in_text():
    assert written_text([0, MASK, MASK, 1, 4, PAD], Letters(), MASK) == "a░░b\n"
    assert written_text([MASK], Letters(), MASK, placeholder="_") == "_"


def test_a_terminal_is_drawn_in_place_and_anything_else_gets_lines():
    tokens = torch.tensor([[0, MASK, 4], [1, 1, MASK]])
    step = Step(3, tokens, tokens == MASK, (0, 3))
    for is_terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=60, color_system=None)
        with streamed(Letters(), console) as on_step:
            on_step(step)
        shown = console.file.getvalue()
        assert shown.startswith("3: a░\n3: bb░\n") != is_terminal
        assert "bb░" in shown
        assert ("\x1b[2K" in shown) == is_terminal  # what was drawn is taken away again
