"""A denoiser that knows what to answer, with confidences of its own; and the questions that it knows."""

import torch
from torch import nn

from diffusion import DenoiserSpec
from diffusion.evaluation.tasks import Example, Task
from diffusion.text.tokenizer import train_tokenizer

ANSWERS = {"one:": "ab.", "three:": "abba.", "seventeen:": "aaaabbbb."}
TOKENIZER = train_tokenizer([*ANSWERS, *ANSWERS.values(), "xyz "])
SURE, UNSURE = 0.95, 0.6


class Scripted(nn.Module):
    """Writes the answer to what ends in a colon, and an end-of-text token in place of its full stop.

    It is sure of an "a" and of the end, and less of a "b"; ``wrong`` are questions that it gets wrong.
    """

    def __init__(self, wrong=(), max_length=64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.wrong, self.num_calls = wrong, 0
        self.spec = DenoiserSpec(
            vocab_size=TOKENIZER.vocab_size,
            mask_id=TOKENIZER.mask_id,
            eos_ids=(TOKENIZER.eos_id,),
            pad_id=TOKENIZER.pad_id,
            forbidden_ids=TOKENIZER.forbidden_ids,
            max_length=max_length,
        )

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        self.num_calls += 1
        (colon,) = TOKENIZER.encode(":")
        (x,) = TOKENIZER.encode("x")
        out = torch.full((*tokens.shape, self.spec.vocab_size), -20.0)
        for row, ids in enumerate(tokens.tolist()):
            start = max((i for i, id in enumerate(ids) if id == colon), default=-1) + 1
            before = TOKENIZER.decode([id for id in ids[:start] if id not in (self.spec.pad_id, self.spec.mask_id)])
            question = max((name for name in ANSWERS if before.endswith(name)), key=len, default="")
            answer = ANSWERS.get(question, ".")
            if question in self.wrong:
                answer = "z" + answer[1:]
            script = [TOKENIZER.eos_id if c == "." else TOKENIZER.encode(c)[0] for c in answer]
            for place in range(start, tokens.shape[1]):
                token = script[place - start] if place - start < len(script) else TOKENIZER.eos_id
                p = UNSURE if place - start < len(script) and answer[place - start] == "b" else SURE
                out[row, place, [token, x]] = torch.tensor([p, 1 - p]).log()
        return out if window is None else out[:, slice(*window)]


def task(examples=None, **changes):
    """The questions; the right answers end where the text ends."""
    made = [Example(question, (answer[:-1],), answer) for question, answer in ANSWERS.items()]
    options = {"template": "{question}", "extract": lambda text: text or None, "gen_length": 12, **changes}
    judge = lambda answer, example: answer in example.answers  # noqa: E731
    return Task(name="letters", examples=tuple(made if examples is None else examples), is_right=judge, **options)
