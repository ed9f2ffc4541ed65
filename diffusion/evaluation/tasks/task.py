"""A task: questions, how they are put to a model, and which of its answers are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusion.errors import ArgumentError

QUESTION = "{question}"
"""Where a template has the question."""


@dataclass(frozen=True)
class Example:
    """A question, and what is known of its answer.

    Attributes:
        question: as the data have it.
        answers: any of these is right, as the data have them.
        solution: what a model would ideally write: in a few-shot prompt it follows the question.
        tests: lines of code that a right answer passes; of programming tasks.
        setup: code that runs before the tests.
    """

    question: str
    answers: tuple[str, ...]
    solution: str
    tests: tuple[str, ...] = ()
    setup: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions, their form, and the judge of answers.

    Attributes:
        name: of the task.
        examples: what is asked.
        template: the text around a question, with ``{question}`` in it; what follows it is the answer.
        extract: from what a model wrote to its answer, None where there is none.
        is_right: whether an answer, which is not None, is right.
        shots: worked examples that stand before every question.
        stop: where an answer ends, beside the end of the text; of plain prompts, a chat model ends its turn itself.
        gen_length: tokens that an answer has at most, unless told otherwise.
        version: counts the changes of template, extraction and judgement.
    """

    name: str
    examples: tuple[Example, ...]
    template: str
    extract: Callable[[str], str | None]
    is_right: Callable[[str, Example], bool]
    shots: tuple[Example, ...] = ()
    stop: tuple[str, ...] = ()
    gen_length: int = 256
    version: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.template, str) or self.template.count(QUESTION) != 1:
            raise ArgumentError(f"template: expected a text with {QUESTION} in it once, got {self.template!r:.80}")

    def prompt(self, example: Example) -> str:
        """Return a question as plain text, after the worked examples."""
        worked = (f"{self._asked(shot)} {shot.solution.strip()}\n\n" for shot in self.shots)
        return "".join([*worked, self._asked(example)])

    def messages(self, example: Example) -> list[dict[str, str]]:
        """Return a question as a conversation, after the worked examples: roles and contents."""
        turns = []
        for shot in self.shots:
            turns.append({"role": "user", "content": self._asked(shot)})
            turns.append({"role": "assistant", "content": shot.solution.strip()})
        return [*turns, {"role": "user", "content": self._asked(example)}]

    def judged(self, text: str, example: Example) -> tuple[str | None, bool]:
        """Return the answer that a text gives, None if it gives none, and whether it is right."""
        answer = self.extract(text)
        return answer, answer is not None and self.is_right(answer, example)

    def limited(self, count: int | None) -> Task:
        """Return the same task with its first examples only."""
        return self if count is None else replace(self, examples=self.examples[:count])

    def _asked(self, example: Example) -> str:
        return self.template.replace(QUESTION, example.question)


def encoded(task: Task, example: Example, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """Return the tokens of a question: of plain text, or of a conversation in the form that a tokenizer has for them.

    Args:
        task: of the question.
        example: the question.
        tokenizer: with ``encode``, and for ``chat`` with ``apply_chat_template``, as
            :class:`~diffusion.text.hub_tokenizer.HubTokenizer` has it.
        chat: whether as a conversation.

    Raises:
        ArgumentError: the tokenizer has no form for conversations.
    """
    if not chat:
        return list(tokenizer.encode(task.prompt(example)))
    return chat_tokens(tokenizer, task.messages(example))


def chat_tokens(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the tokens of a conversation, up to where the model's turn begins; raises as :func:`chat_text`."""
    text = chat_text(tokenizer, messages)
    return list(tokenizer.encode(text, special=True))


def chat_text(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Return a conversation as the tokenizer writes it, with the names of special tokens in it.

    Raises ArgumentError if the tokenizer has no form for conversations, or refuses this one.
    """
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None:
        raise ArgumentError(
            f"chat: expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one; ask in "
            "plain text"
        )
    return str(apply(list(messages), add_generation_prompt=True))
