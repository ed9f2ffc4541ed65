"""The model of lm-evaluation-harness: by itself, and in the harness's own program on local tasks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from task_cases import ANSWERS, TOKENIZER, Scripted
from tiny_folders import commands, make_folder

import circuits as ct
from diffusion import CoupledHead, log_likelihood
from diffusion.errors import ArgumentError

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra [eval])")

import lm_eval
import lm_eval.tasks
from lm_eval.api.instance import Instance

from diffusion.app import harness
from diffusion.evaluation.lm_eval import DiffusionLM, HarnessOptions, _windows

QUESTIONS = list(ANSWERS)


def head(seed=0):
    return CoupledHead(ct.compile(ct.structures.hmm(4, 2, TOKENIZER.vocab_size), seed=seed), 1.0)


def requests(kind, *arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def model(**options):
    used = options.pop("head", None)
    return DiffusionLM(Scripted(), TOKENIZER, head=used, options=HarnessOptions(block_length=4, **options))


def tokens(*texts):
    return [torch.tensor(TOKENIZER.encode(text), dtype=torch.int64) for text in texts]


def test_texts_are_written_up_to_a_stop_string():
    asked = requests("generate_until", *((question, {"until": [], "max_gen_toks": 12}) for question in QUESTIONS))
    assert model().generate_until(asked) == ["ab", "abba", "aaaabbbb"]
    asked = requests("generate_until", *((question, {"until": ["bb", ""]}) for question in QUESTIONS))
    assert model(gen_length=12, batch_size=3).generate_until(asked) == ["ab", "a", "aaaa"]
    asked = requests("generate_until", ("seventeen:", {"until": "b", "max_new_tokens": 3, "do_sample": False}))
    assert model(num_steps=1).generate_until(asked) == ["aaa"]


def test_what_is_asked_is_answered_or_refused():
    asked = requests("generate_until", ("one:", {"until": [], "max_gen_toks": 12, "beams": 4}))
    with pytest.raises(ArgumentError, match="got 'beams'"):
        model().generate_until(asked)
    asked = requests("generate_until", ("one:", {"max_gen_toks": 65}))
    with pytest.raises(ArgumentError, match="gen_length: expected at most the denoiser's 64 positions, got 65"):
        model().generate_until(asked)
    for options, message in (
        ({"likelihood": "magic"}, "likelihood: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"config": {"strategy": "magic"}}, "strategy: expected"),
    ):
        with pytest.raises(ArgumentError, match=message):
            HarnessOptions(**options)


@pytest.mark.parametrize("used", [None, head()], ids=["without", "with"])
@pytest.mark.parametrize("likelihood", ["elbo", "decoder", "sequential"])
def test_batches_and_padding_change_nothing(used, likelihood):
    pairs = [(question, text) for question in QUESTIONS for text in ("ab", "abba", "b", "xx")]
    texts = [(question, {"until": ["bb"], "max_gen_toks": 8, "temperature": 1.0}) for question in QUESTIONS * 2]
    found = []
    for batch_size, backwards in ((1, False), (3, False), (100, True)):
        one = model(head=used, likelihood=likelihood, batch_size=batch_size, num_samples=4, num_steps=64)
        turn = -1 if backwards else 1
        scores = one.loglikelihood(requests("loglikelihood", *pairs[::turn]))[::turn]
        rolling = one.loglikelihood_rolling(requests("loglikelihood_rolling", *((q,) for q, _ in pairs[::turn])))
        written = one.generate_until(requests("generate_until", *texts))
        found.append(([score for score, _ in scores], [same for _, same in scores], rolling[::turn], written))
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], abs=1e-4)
        assert other[1] == found[0][1]
        assert other[2] == pytest.approx(found[0][2], abs=1e-4)
        assert other[3] == found[0][3]
    assert any(found[0][1])
    assert not all(found[0][1])


def test_the_log_probability_of_a_continuation():
    """What the denoiser says of each letter by itself: "a" 0.95, "b" 0.6; of another letter than its own 0.05."""
    score = model(likelihood="sequential").loglikelihood
    (ab, is_ab), (ax, is_ax), (empty, is_empty) = score(requests("l", ("one:", "ab"), ("one:", "xb"), ("one:", "")))
    assert ab == pytest.approx(math.log(0.95 * 0.6), abs=1e-5)
    assert ax == pytest.approx(math.log(0.05 * 0.6), abs=1e-5)
    assert (is_ab, is_ax, empty, is_empty) == (True, False, 0.0, True)
    (decoder, _), *_ = model(likelihood="decoder", num_steps=2, gen_length=4).loglikelihood(
        requests("l", ("one:", "ab"))
    )
    assert decoder == pytest.approx(ab, abs=1e-5)  # its letters are independent, so all ways say the same
    (elbo, _), *_ = model(num_samples=512).loglikelihood(requests("l", ("one:", "ab")))
    assert elbo == pytest.approx(ab, abs=0.1)


def test_the_log_probability_is_that_of_the_library():
    used = head()
    for method, options in (("decoder", {"num_steps": 1, "strategy": "entropy"}), ("sequential", {})):
        want = log_likelihood(
            Scripted(), tokens("three:"), tokens("abba"), head=used, method=method, block_length=4, **options
        )
        one = model(head=used, likelihood=method, num_steps=3, gen_length=12)  # 4 of 12 tokens: one call of three
        (got, _), *_ = one.loglikelihood(requests("l", ("three:", "abba")))
        assert got == pytest.approx(float(want[0]), abs=1e-5)


def test_greedy_is_what_greedy_decoding_writes():
    one = model(num_steps=64)
    pairs = [(question, text) for question in QUESTIONS for text in ("ab", "abba", "aaaabbbb", "a", "x")]
    for (question, text), (_, said) in zip(pairs, one.loglikelihood(requests("l", *pairs)), strict=True):
        assert said == ANSWERS[question].startswith(text)
    quiet = model(is_greedy=False)
    before = quiet.denoiser.num_calls
    assert quiet.loglikelihood(requests("l", ("one:", "ab")))[0][1] is False
    assert quiet.denoiser.num_calls - before == 32


def test_spaces_before_a_continuation_belong_to_it():
    class Words:
        """A word is a token, with the space before it."""

        words = ("one:", " a", "b", "a", " ", "b", "ab")

        def encode(self, text):
            ids = []
            while text:
                best = max((word for word in self.words if text.startswith(word)), key=len)
                ids.append(self.words.index(best))
                text = text[len(best) :]
            return ids

    one = DiffusionLM(Scripted(), Words())
    assert one._parted("one: ", "a") == ((0,), (1,))
    assert one._parted("one:", " a") == ((0,), (1,))
    assert one._parted("a", "b") == ((3,), (2,))  # "ab" is one token: its parts are encoded each by itself


def test_a_conversation_has_the_tokenizers_form():
    class Chatty:
        def apply_chat_template(self, messages, *, add_generation_prompt):
            return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"

        def encode(self, text, *, special=False):
            return [*TOKENIZER.encode(text.removeprefix("<user>").removesuffix("<assistant>")), int(special)]

        decode = staticmethod(TOKENIZER.decode)

    one = DiffusionLM(Scripted(), Chatty(), name="some/model")
    assert one.chat_template() is None
    assert one._encode("a")[-1] == 0
    assert one.apply_chat_template([{"role": "user", "content": "one:"}]) == "<user>one:<assistant>"
    assert one._encode("<user>one:<assistant>")[-1] == 1
    assert one.chat_template(True) == "some__model: chat template"
    with pytest.raises(ArgumentError, match="apply_chat_template: expected tasks"):
        one.apply_chat_template([], add_generation_prompt=False)
    with pytest.raises(ArgumentError, match="chat: expected a tokenizer with a chat template"):
        model().apply_chat_template([{"role": "user", "content": "one:"}])


def test_a_long_text_comes_in_windows():
    for length in (1, 7, 8, 9, 12, 13, 30):
        windows = list(_windows(list(range(length)), 8))
        assert [token for _, answer in windows for token in answer] == list(range(length))
        for before, answer in windows:
            assert len(before) + len(answer) <= 8
            assert list(before) == list(range(answer[0] - len(before), answer[0]))
        assert all(len(before) >= 4 for before, _ in windows[1:])
    assert list(_windows([], 8)) == []


def test_a_long_context_loses_its_beginning():
    one = model()
    assert one._prompt("x" * 60 + "one:", 12) == tuple(TOKENIZER.encode("x" * 48 + "one:"))
    (score, _), *_ = model(likelihood="sequential").loglikelihood(requests("l", (" " + "x" * 80 + " one:", "ab")))
    assert score == pytest.approx(math.log(0.95 * 0.6), abs=1e-5)


def test_repeats_are_drawn_anew():
    asked = requests("g", *[("one:", {"max_gen_toks": 12, "temperature": 3.0, "do_sample": True})] * 8)
    written = model().generate_until(asked)
    assert len(set(written)) > 1
    assert model(batch_size=5).generate_until(asked) == written
    assert model(seed=1).generate_until(asked) != written


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


TASKS = {
    "written": """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
""",
    "chosen": """
task: chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: 0
doc_to_choice: [" and", " qq"]
metric_list: [{{metric: acc}}]
""",
    "read": """
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
metric_list: [{{metric: word_perplexity}}]
""",
}


@pytest.mark.filterwarnings("ignore")  # of the harness's own
def test_the_harness_runs_local_tasks(folder, tmp_path):
    """Its own program in a process of its own, without a network, and its function, with another batch size."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"The {i}th text says", "answer": "x"}) + "\n" for i in range(4)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text.format(data=data))
    (arguments,) = commands("harness")  # that of the documentation
    assert arguments[arguments.index("--tasks") + 1] == ",".join(TASKS)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "diffusion.app.cli", *arguments]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment | {"PYTHONPATH": root}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unfactor" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    four = json.loads(written.read_text())["results"]
    model = harness.UnfactorLM(str(folder), num_steps=8, likelihood="decoder", progress=False, device="cpu")
    one = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]
    assert one["written"]["exact_match,none"] == four["written"]["exact_match,none"]
    assert one["chosen"]["acc,none"] == four["chosen"]["acc,none"]
    perplexity = one["read"]["word_perplexity,none"]
    assert perplexity == pytest.approx(four["read"]["word_perplexity,none"], rel=1e-4)
    texts = [f"The {i}th text says" for i in range(4)]
    total = sum(model.loglikelihood_rolling(requests("r", *((text,) for text in texts))))
    assert perplexity == pytest.approx(math.exp(-total / (4 * 4)), rel=1e-4)  # four texts of four words
    check_the_arguments(folder)


def check_the_arguments(folder):
    plain = harness.UnfactorLM(str(folder), circuit=False, device="cpu", progress=False)
    assert plain.head is None
    assert harness.UnfactorLM(str(folder), head=str(folder / "head"), device="cpu").head is not None
    assert harness.UnfactorLM(str(folder), device="cpu", strategy="entropy").options.config == {"strategy": "entropy"}
    for arguments, message in (
        ({"nonsense": 1}, "model_args: expected pretrained, head"),
        ({"batch_size": "auto"}, "batch_size: expected a whole number"),
        ({"num_steps": "many"}, "num_steps: expected"),
    ):
        with pytest.raises(ArgumentError, match=message):
            harness.UnfactorLM(str(folder), device="cpu", **arguments)


def test_the_model_has_a_name_in_the_harness():
    from lm_eval.api.registry import get_model

    harness.register()
    harness.register()
    assert get_model("unfactor") is harness.UnfactorLM
    assert get_model("dummy").__name__ == "DummyLM"  # the harness's own models are there beside it
