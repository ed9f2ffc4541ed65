"""A causal model that is not ours judges texts: its numbers are those of a loop over the tokens."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from task_cases import ANSWERS, TOKENIZER, Scripted
from torch import nn

from diffusion.errors import ArgumentError, CheckpointError
from diffusion.evaluation.scorer import CausalScorer
from diffusion.evaluation.tasks import Grid, answer_task
from diffusion.evaluation.tasks.quality import judge_texts, text_task

TEXTS = ["abba", "b", "aaaabbbb", "one:", "xx"]


class Bigrams(nn.Module):
    """The next token depends on the last one; what stands at padding would show."""

    def __init__(self, size, longest=32):
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
        self.config = SimpleNamespace(max_position_embeddings=longest)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids * attention_mask])


class Tokens:
    """A tokenizer as transformers have it, which may put a token before every text."""

    def __init__(self, before=()):
        self.before = list(before)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": (self.before if add_special_tokens else []) + TOKENIZER.encode(text)}


def scorer(before=(), **options):
    return CausalScorer(Bigrams(TOKENIZER.vocab_size, **options), Tokens(before), name="bigrams")


def by_hand(model, ids, start):
    log_p = torch.log_softmax(model.table.detach(), -1)
    return sum(float(log_p[ids[i - 1], ids[i]]) for i in range(max(1, start), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("before", [(), (2,)], ids=["no first token", "a first token"])
def test_log_likelihoods_are_those_of_a_loop(before, batch_size):
    judge = scorer(before)
    prompts = ["", "one:", "a", "", "b:"]
    for given in (None, prompts):
        scores, counts = judge.log_likelihoods(TEXTS, given, batch_size=batch_size)
        for index, text in enumerate(TEXTS):
            head = [*before, *TOKENIZER.encode("" if given is None else given[index])]
            ids = head + TOKENIZER.encode(text)
            assert float(scores[index]) == pytest.approx(by_hand(judge.model, ids, len(head)), abs=1e-5)
            assert counts[index] == len(ids) - max(1, len(head))


def test_perplexity_and_different_n_grams_of_texts():
    judge = scorer((2,))
    quality = judge.quality(TEXTS)
    scores, counts = judge.log_likelihoods(TEXTS)
    assert quality.perplexity.value == pytest.approx(math.exp(-float(scores.sum()) / int(counts.sum())))
    assert quality.perplexity.low < quality.perplexity.value < quality.perplexity.high
    assert quality.num_tokens == sum(map(len, TEXTS)) == int(counts.sum())
    shares = [
        [len({t[i : i + n] for i in range(len(t) - n + 1)}) / (len(t) - n + 1) for t in TEXTS if len(t) >= n]
        for n in (1, 2, 3)
    ]
    for share, want in zip(quality.distinct, shares, strict=True):
        assert share.value == pytest.approx(sum(want) / len(want))
    assert "distinct-2" in str(quality)
    assert judge.quality([*TEXTS, ""]).perplexity == quality.perplexity


def test_what_cannot_be_judged_is_refused():
    judge = scorer(longest=8)
    for texts, prompts, message in (
        ([], None, "texts: expected at least one"),
        (["a", ""], None, "none of them empty"),
        (["ab"], ["abababa"], "expected at most the scorer's 8 tokens with their prompts, got 9"),
    ):
        with pytest.raises(ArgumentError, match=message):
            judge.log_likelihoods(texts, prompts)
    with pytest.raises(ArgumentError, match="more than one token"):
        judge.quality(["a", "b"])


def test_what_a_denoiser_wrote_is_judged(tmp_path):
    judge = scorer()
    task = text_task(list(ANSWERS), [answer[:-1] for answer in ANSWERS.values()], gen_length=12)
    answers = answer_task(Scripted(), TOKENIZER, task, Grid(num_steps=(12, 6), block_length=4))
    table = judge_texts(task, answers, judge)
    one, two, truth = table.rows
    assert one.quality == two.quality == truth.quality == judge.quality(["ab", "abba", "aaaabbbb"], list(ANSWERS))
    assert (one.num_calls, two.num_calls, truth.num_calls) == (6, 10 / 3, None)
    assert (
        str(table).splitlines()[0]
        == "| decoding | calls | perplexity (bigrams) | distinct-1 | distinct-2 | distinct-3 |"
    )
    table.save(tmp_path / "quality.json")
    assert json.loads((tmp_path / "quality.json").read_text())["rows"][2]["decoding"] == "true text"


@pytest.fixture
def causal(tmp_path):
    """A tiny causal model, as transformers save it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: id for id, word in enumerate(["<unk>", "a", "b", "c", "<s>"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>").save_pretrained(tmp_path / "model")
    shape = {"vocab_size": 5, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore")
def test_a_causal_model_of_transformers(causal):
    judge = CausalScorer.load(causal)
    assert judge.name == "model"
    texts = ["a b c a", "c c", "b a c b a c"]
    scores, counts = judge.log_likelihoods(texts, batch_size=2)
    for text, score, count in zip(texts, scores, counts, strict=True):
        ids = torch.tensor([judge._plain_ids(text)])
        loss = judge.model(input_ids=ids, labels=ids).loss  # its own mean over all tokens but the first
        assert float(score) == pytest.approx(-float(loss) * int(count), abs=1e-5)
    assert judge.log_likelihoods(texts, batch_size=1)[0].tolist() == pytest.approx(scores.tolist(), abs=1e-5)
    with pytest.raises(CheckpointError, match="scorer: expected a causal model"):
        CausalScorer.load(causal.parent / "missing.gguf")
