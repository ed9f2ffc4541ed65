"""A task is answered, judged and counted; what is answered is kept, and a run goes on from it."""

import json
import random

import pytest
import torch
from task_cases import ANSWERS, TOKENIZER, Scripted, task

import circuits as ct
from diffusion import CoupledHead
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.evaluation.tasks import Example, Grid, Options, evaluate_task, runner
from diffusion.evaluation.tasks.samples import SampleFile

LENGTHS = [len(answer) for answer in ANSWERS.values()]  # with the end of the text: 3, 5, 9


def head(seed=0):
    return CoupledHead(ct.compile(ct.structures.hmm(4, 2, TOKENIZER.vocab_size), seed=seed), 1.0)


def evaluated(denoiser=None, questions=None, grid=None, head=None, folder=None, seed=0, **options):
    grid = grid or Grid(num_steps=(12, 6), thresholds=(0.9,), block_length=4)
    return evaluate_task(
        denoiser or Scripted(),
        TOKENIZER,
        questions or task(),
        grid,
        head=head,
        folder=folder,
        seed=seed,
        options=Options(**options),
    )


def test_accuracy_calls_and_tokens_per_call():
    """3, 5 and 9 tokens, ends included, in blocks of four.

    One a step: 4, 5 and 9 calls, for the first text has a fourth token after its end, which is surer than its "b". Two
    a step: 2, 3 and 5. By the threshold all that is sure in one call, and else the best: (a..) b; (a..a) b b .; and
    (aaaa) b b b b ..
    """
    one, two, threshold = evaluated(Scripted(wrong=("three:",))).points
    for point in (one, two, threshold):
        assert point.accuracy.value == pytest.approx(2 / 3)
        assert point.accuracy.low < 2 / 3 < point.accuracy.high
        assert point.num_samples == 3
        assert point.tokens_per_second > 0
        assert point.share_coupled == 0
    assert one.num_calls * 3 == 4 + 5 + 9
    assert one.tokens_per_call == pytest.approx(sum(LENGTHS) / (4 + 5 + 9))
    assert two.tokens_per_call == pytest.approx(sum(LENGTHS) / (2 + 3 + 5))
    assert threshold.num_calls * 3 == 2 + 4 + 6


def test_a_text_does_not_depend_on_its_batch():
    ways = Grid(num_steps=(6,), strategies=("random", "entropy"), temperature=1.0, block_length=4)
    alone = evaluated(grid=ways, head=head(), batch_size=1)
    together = evaluated(grid=ways, head=head(), batch_size=3)
    for one, other in zip(alone.points, together.points, strict=True):
        assert one.accuracy == other.accuracy
        assert one.tokens_per_call == other.tokens_per_call
    assert [point.share_coupled for point in alone.points] == [0, 0, 1, 1]
    names = [point.setting.curve for point in alone.points]
    assert names == [
        "without circuit, random", "without circuit, entropy", "with circuit (joint), random",
        "with circuit (joint), entropy",
    ]  # fmt: skip


def test_worked_examples_and_stop_strings():
    shots = (Example("one:", ("ab",), "ab"),)
    questions = task(shots=shots, template=" {question}", stop=("bb",))
    assert questions.prompt(questions.examples[1]) == " one: ab\n\n three:"
    table = evaluated(questions=task(stop=("bb",)), grid=Grid(num_steps=(12,), block_length=4))
    (point,) = table.points
    assert point.accuracy.value == pytest.approx(1 / 3)  # "abba" became "a", and "aaaabbbb" "aaaa"
    assert point.tokens_per_call < 1  # calls were made for what the stop string has cut off


def test_the_default_grid_has_one_two_and_four_tokens_a_call():
    ways = Grid(block_length=4).settings(task(), None)
    assert [way.num_steps for way in ways] == [12, 6, 3]
    assert {way.config.chosen_strategy for way in ways} == {"low_confidence"}
    ways = Grid(tokens_per_step=(2, 5, 100), num_steps=(6,), block_length=4).settings(task(), None)
    assert [way.num_steps for way in ways] == [6, 3]  # no fewer than the blocks
    tuned = head()
    tuned.temperature = 0.7
    both = Grid(joint_entropy_bounds=(0.5,), thresholds=(0.8, 0.9)).settings(task(), tuned)
    assert [(way.with_circuit, way.amount) for way in both] == [
        (False, "0.8"), (False, "0.9"),
        (True, "0.8"), (True, "0.9"), (True, "0.5"),
    ]  # fmt: skip
    assert {way.config.temperature for way in both} == {0.7}
    assert {way.block_length for way in both} == {4}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Killed after every number of questions, and run again, it asks for no question twice and finds the same."""
    alone = Scripted()
    whole = evaluated(alone, batch_size=1)
    calls = alone.num_calls
    for last in range(1, 9):
        folder, denoiser, asked = tmp_path / str(last), Scripted(), []
        original = runner._Run._answered

        def answered(self, setting, batch, hashes, asked=asked, last=last, original=original):
            if len(asked) == last:
                raise KeyboardInterrupt
            asked.append((setting.curve, setting.amount, *batch))
            return original(self, setting, batch, hashes)

        monkeypatch.setattr(runner._Run, "_answered", answered)
        with pytest.raises(KeyboardInterrupt):
            evaluated(denoiser, folder=folder, batch_size=1)
        last_file = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)[-1]
        with last_file.open("ab") as file:
            file.write(b'{"index": 2, "exam')  # what a crash left of a line
        monkeypatch.setattr(runner._Run, "_answered", original)
        table = evaluated(denoiser, folder=folder, batch_size=1)
        assert denoiser.num_calls == calls
        assert [(one.accuracy, one.tokens_per_call) for one in table.points] == [
            (one.accuracy, one.tokens_per_call) for one in whole.points
        ]


def num_asked(folder, denoiser=None, **options):
    denoiser = denoiser or Scripted()
    before = denoiser.num_calls
    evaluated(denoiser, folder=folder, **{"grid": Grid(num_steps=(6,), block_length=4), **options})
    return denoiser.num_calls - before


def test_another_model_setting_or_question_is_asked_again(tmp_path):
    first = num_asked(tmp_path)
    assert first == 5  # the calls of the longest answer
    assert num_asked(tmp_path) == 0
    trained = Scripted()
    trained.weight.data += 1e-6
    for options in (
        {"denoiser": trained},
        {"grid": Grid(num_steps=(6,), block_length=4, temperature=0.5)},
        {"grid": Grid(num_steps=(12,), block_length=4)},
        {"seed": 1},
        {"identity": "mine"},
        {"questions": task(template=" {question}")},
        {"questions": task([Example(question, ("other",), "") for question in ANSWERS])},
        {"questions": task()},  # its answers replaced those before, and now the other way round
        {"head": head()},
        {"head": head(seed=1)},
    ):
        assert num_asked(tmp_path, **options) > 0, options
        assert num_asked(tmp_path, **options) == 0, options
    assert num_asked(tmp_path) == 0  # what was asked without a circuit


def test_more_questions_are_added_to_those_that_are_there(tmp_path):
    assert num_asked(tmp_path, questions=task().limited(2)) == 3
    assert num_asked(tmp_path) == 5
    assert num_asked(tmp_path, questions=task().limited(1)) == 0


def test_a_model_without_weights_needs_a_name(tmp_path):
    class Bare:
        spec = Scripted().spec

        def logits(self, tokens, **options):
            return Scripted().logits(tokens, **options)

    with pytest.raises(ArgumentError, match="identity: expected a text that tells the denoiser from others"):
        evaluated(Bare(), folder=tmp_path)
    assert evaluated(Bare(), folder=tmp_path, identity="bare").points


def test_damaged_and_foreign_files_are_refused(tmp_path):
    num_asked(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for number, change in ((0, b"{}\n"), (1, b"no json\n"), (2, b'{"index": 1}\n'), (1, b"[]\n"), (0, b"\xff\n")):
        lines = whole.splitlines(keepends=True)
        lines[number] = change
        path.write_bytes(b"".join(lines))
        with pytest.raises(CheckpointError, match=rf"line {number + 1}"):
            num_asked(tmp_path)
    header, *rest = whole.splitlines(keepends=True)
    path.write_bytes(header.replace(b'"seed": 0', b'"seed": 5') + b"".join(rest))
    with pytest.raises(CheckpointError, match="expected the settings that its name is of"):
        num_asked(tmp_path)
    path.write_bytes(whole)
    assert num_asked(tmp_path) == 0


@pytest.mark.parametrize("seed", range(30))
def test_a_file_cut_anywhere_is_taken_up(tmp_path, seed):
    first = num_asked(tmp_path, batch_size=1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
    assert 0 < num_asked(tmp_path, batch_size=1) <= first
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sorted(record["index"] for record in records[1:]) == [0, 1, 2]


def test_two_runs_do_not_write_one_file(tmp_path):
    with SampleFile.opened(tmp_path, {"a": 1}), pytest.raises(CheckpointError, match="got another run at work"):
        SampleFile.opened(tmp_path, {"a": 1}).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="out: expected a folder"):
        SampleFile.opened(tmp_path / "file" / "sub", {"a": 1}).__enter__()


def test_mistakes_are_found_before_anything_runs(tmp_path):
    denoiser = Scripted(max_length=16)
    for options, message in (
        ({}, "gen_length: question 2 has 10 tokens, and with 12 new ones"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"questions": task([])}, "task: expected at least one question"),
        ({"grid": Grid(num_steps=(0,))}, "num_steps: expected"),
        ({"grid": Grid(thresholds=(1.5,))}, "threshold: expected"),
        ({"grid": Grid(strategies=("magic",))}, "strategy: expected"),
        ({"chat": True}, "chat: expected a tokenizer with a chat template"),
    ):
        with pytest.raises(ArgumentError, match=message):
            evaluated(denoiser, folder=tmp_path, **options)
    assert denoiser.num_calls == 0
    assert not list(tmp_path.iterdir())


def test_the_table_in_words(tmp_path):
    table = evaluated(Scripted(wrong=("three:",)), head=head())
    table.save(tmp_path / "letters.json")
    stored = json.loads((tmp_path / "letters.json").read_text())
    assert stored["points"][0]["setting"]["config"]["strategy"] == "low_confidence"
    text = str(table)
    assert "letters: 3 questions, 0 worked examples before each." in text
    assert "| without circuit, low_confidence | 12 steps | 66.7 [20.8, 93.9] | 0.94 |" in text
    name = "without circuit, low_confidence"
    points = [(one.tokens_per_call, 200 / 3) for one in table.curves[name]]
    assert table.aup[name] == pytest.approx(points[-1][0] * 200 / 3) == stored["aup"][name]
    assert f"{table.aup[name]:.1f}" in text
    titles, *rows = table.comparison()
    assert titles[3:] == (name, "without circuit, threshold")
    assert len(rows) == 3
    assert rows[-1][0] == "with circuit (joint), threshold 0.9"
    assert evaluated().comparison() == []


def test_the_circuit_and_windows_are_used_as_asked():
    """Above a share of masks, below it, or in windows over the whole text."""
    ways = {"num_steps": (6,), "block_length": 4, "temperature": 1.0}
    shares = [
        evaluated(grid=Grid(activation_threshold=bound, reverse_activation=reverse, **ways), head=head()).points[1]
        for bound, reverse in ((0.0, False), (1.0, False), (0.75, False), (0.75, True))
    ]
    never, always, below, above = (point.share_coupled for point in shares)
    assert (never, always) == (0, 1)
    assert 0 < below < 1
    assert 0 < above < 1
    without, coupled = evaluated(grid=Grid(dynamic_windows=True, **ways), head=head()).points
    assert without.num_calls == coupled.num_calls == 6  # the whole text, whatever its end is
    assert coupled.share_coupled == 1


def test_the_picture_has_every_point_and_its_interval():
    from diffusion.evaluation.tasks.plots import task_figure

    table = evaluated(Scripted(wrong=("three:",)), head=head())
    (axes,) = task_figure(table).axes
    assert axes.get_xlabel() == "tokens per denoiser call"
    drawn = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        x, y = (part.tolist() for part in line.get_data())
        ends = [(float(low), float(high)) for (_, low), (_, high) in bars.get_segments()]
        drawn[container.get_label().split(" (AUP")[0]] = list(zip(x, y, ends, strict=True))
    assert drawn.keys() == table.curves.keys()
    for name, points in table.curves.items():
        for point, (x, y, (low, high)) in zip(points, drawn[name], strict=True):
            assert (x, y) == pytest.approx((point.tokens_per_call, 100 * point.accuracy.value))
            assert (low, high) == pytest.approx((100 * point.accuracy.low, 100 * point.accuracy.high))


def test_the_calls_are_those_of_the_denoiser():
    denoiser = Scripted()
    table = evaluated(denoiser, batch_size=1, grid=Grid(num_steps=(12, 3), block_length=4), head=head())
    assert sum(point.num_calls * point.num_samples for point in table.points) == denoiser.num_calls


def test_torch_is_not_reseeded():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluated()
    assert torch.equal(before, torch.get_rng_state())
