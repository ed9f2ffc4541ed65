"""The page for users of LLaDA, Dream, CoDD and dllm: its code and commands run, on tiny models under the real names."""

import json
import pickle
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from diffusion.app import cli
from diffusion.decoding import names

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts
sys.path.append(str(Path(__file__).parent / "adapters"))  # cases of other tests

import jpc as benchmark
import tiny_models as tiny

pytest.importorskip("transformers", reason="LLaDA and Dream run on classes of transformers")

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from-diffusion.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
VOCABULARY, LENGTH = 264, 8
END, TURN, MASK = 256, 257, 258
SMALLER = ("--gen_length", "8", "--block_length", "8", "--limit", "1", "--results", "results", "--quiet")
CODD = {
    "base_model_id": "GSAI-ML/LLaDA-8B-Instruct", "base_model_type": "llada", "mask_id": MASK, "vocab_size": VOCABULARY,
    "num_steps": 4, "gen_length": 8, "block_length": 8, "remasking": "low_confidence", "pc_temperature": 0.2,
    "pc_frac": 0.5,
}  # fmt: skip


def bytes_tokenizer(folder):
    """One token a byte, and special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: id for id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder in which the names of the page are folders of tiny models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "VOCABULARY", VOCABULARY)
    ids = {"mask_token_id": MASK, "pad_token_id": END, "eos_token_id": END}
    llada = Path("GSAI-ML/LLaDA-8B-Instruct")
    weights = tiny.in_the_layout_of_llada(tiny.llama_weights(num_key_value_heads=tiny.NUM_HEADS))
    sizes = {"vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "max_sequence_length": 512}
    tiny.publish(llada, tiny.llada_config(**sizes, **ids), weights)
    dream = Path("Dream-org/Dream-v0-Instruct-7B")
    config = {"model_type": "Dream", "architectures": ["DreamModel"], "use_sliding_window": False, "rope_scaling": None}
    config |= {"tie_word_embeddings": False, "max_position_embeddings": 512, "vocab_size": VOCABULARY, **ids}
    tiny.publish(dream, tiny.llama_config(**config), tiny.llama_weights(bias=True))
    for folder in (llada, dream):
        bytes_tokenizer(folder)
    for name in ("il18/llada-math-pc/model.jpc", "il18/dream-math-pc/model.jpc", "user/codd-llada-math/pc_model.jpc"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_bytes(pickle.dumps(benchmark.hmm_records(LENGTH, 4, VOCABULARY, block=2, seed=0)))
    Path("user/codd-llada-math/codd_config.json").write_text(json.dumps(CODD))
    return tmp_path


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", list(arguments))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    assert not stopped.value.code, captured.err
    return captured.out


def test_the_code_of_the_page_runs(folders):
    assert len(CODE) == 5
    namespace = {}
    for code in CODE:
        exec(compile(code, "coming-from-diffusion.md", "exec"), namespace)
        out = namespace["out"]
        tokens = out if isinstance(out, torch.Tensor) else out.generated
        assert not bool((tokens == MASK).any())


def test_the_commands_of_the_page_run(folders, monkeypatch, capsys):
    """As they stand there, evaluations with less to do."""
    pytest.importorskip("pyjuice", reason="needs PyJuice")
    question = {"problem": "1 + 1?", "question": "1 + 1?", "solution": r"\boxed{2}", "answer": "It is 2. #### 2"}
    Path("data.jsonl").write_text(json.dumps(question) + "\n")
    ran = set()
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "unfactor"
        if arguments[0] == "evaluate":
            arguments += [*SMALLER, "--data", "data.jsonl"]
            if "--num_steps" in arguments:
                arguments += ["--num_steps", "4"]
        said = run([program, *arguments], monkeypatch, capsys)
        assert said
        ran.add(arguments[0])
    assert ran == {"generate", "evaluate", "convert"}
    assert b"ExternProductCategorical" in Path("model.jpc").read_bytes()


def test_the_names_of_other_projects_mean_what_ours_mean(folders, monkeypatch, capsys):
    model = ["unfactor", "generate", "--prompt", "2 + 3 =", "--gen-length", "16"]
    ours = ["--model", "GSAI-ML/LLaDA-8B-Instruct", "--head", "il18/llada-math-pc/model.jpc", "--num-steps", "4"]
    ours += ["--strategy", "top_prob", "--temperature", "0.5", "--activation-threshold", "0.6", "--block", "8"]
    theirs = ["--model_alias", "llada", "--llada_ckpt", "GSAI-ML/LLaDA-8B-Instruct", "--pc_ckpt", "il18/llada-math-pc"]
    theirs += ["--tokens_per_step", "4", "--alg", "topprob", "--pc_temperature", "0.5", "--pc_frac", "0.6"]
    theirs += ["--block_length", "8"]
    for more in ([], ["--decode", "latent"]):
        expected = run([*model, *ours, *more], monkeypatch, capsys)
        assert run([*model, *theirs, *more], monkeypatch, capsys) == expected
        swapped = run([*model, *theirs, *more, "--reverse_frac"], monkeypatch, capsys)
        assert swapped == run([*model, *ours, *more, "--reverse-activation"], monkeypatch, capsys) != expected
    windows = run([*model, *theirs, "--dream_window"], monkeypatch, capsys)
    assert windows == run([*model, *ours, "--dynamic-windows"], monkeypatch, capsys)
    assert run([*model, *theirs, "--dream_block"], monkeypatch, capsys) == run([*model, *ours], monkeypatch, capsys)


def test_an_alias_that_is_none_and_options_that_are_not_here_are_one_line(folders, monkeypatch, capsys):
    for arguments, message in (
        (["--model_alias", "gemma"], "model_alias: expected llada or dream"),
        (["--model_alias", "llada", "--factor", "1"], "factor: expected an option of this program"),
    ):
        monkeypatch.setattr(sys, "argv", ["unfactor", "generate", "--prompt", "2", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_the_page_has_every_name_of_the_table():
    for one in names.OPTIONS:
        for name in one.theirs.values():
            assert re.search(rf"`-?-?{name}`|--{name}\b", PAGE), name
    for theirs, ours in names.STRATEGIES.items():
        assert f"`{theirs}` (`{ours}`)" in " ".join(PAGE.split()), theirs
