from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.errors import ArgumentError, CheckpointError
from diffusion.text.tokenizer import TextTokenizer, train_tokenizer

DOCUMENTS = ["To be, or not to be:\n\tthat is the question.", "Ein Ärgernis — 日本語 🎈", "a  b <mask> c\r\n\n"]
CHARACTERS = train_tokenizer(DOCUMENTS)
BYTE_PAIRS = train_tokenizer(DOCUMENTS * 3, kind="bpe", vocab_size=300)


@given(st.text(alphabet=sorted(set("".join(DOCUMENTS)))))
def test_known_characters_survive_the_round_trip(text: str) -> None:
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_byte_pairs_know_every_text(text: str) -> None:
    assert BYTE_PAIRS.decode(BYTE_PAIRS.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BYTE_PAIRS], ids=["characters", "bpe"])
class TestEveryKind:
    def test_documents_survive_the_round_trip(self, tokenizer: TextTokenizer) -> None:
        encoded = tokenizer.encode_documents(DOCUMENTS)
        assert encoded == [tokenizer.encode(document) for document in DOCUMENTS]
        assert [tokenizer.decode(ids) for ids in encoded] == DOCUMENTS

    def test_ids_are_distinct_and_below_the_vocabulary_size(self, tokenizer: TextTokenizer) -> None:
        special = {tokenizer.pad_id, tokenizer.mask_id, tokenizer.eos_id}
        assert len(special) == 3
        assert max(max(ids) for ids in tokenizer.encode_documents(DOCUMENTS)) < tokenizer.vocab_size
        assert set(tokenizer.forbidden_ids) >= {tokenizer.pad_id, tokenizer.mask_id}
        assert tokenizer.eos_id not in tokenizer.forbidden_ids

    def test_text_never_becomes_a_special_token(self, tokenizer: TextTokenizer) -> None:
        ids = tokenizer.encode("<mask> a")
        assert not set(ids) & {tokenizer.pad_id, tokenizer.mask_id, tokenizer.eos_id}
        assert tokenizer.decode(ids) == "<mask> a"

    def test_special_tokens_are_dropped_or_written_out(self, tokenizer: TextTokenizer) -> None:
        ids = [tokenizer.pad_id, *tokenizer.encode("to be"), tokenizer.mask_id, tokenizer.eos_id]
        assert tokenizer.decode(ids) == "to be"
        assert tokenizer.decode(ids, keep_special=True) == "<pad>to be<mask><eos>"

    @pytest.mark.parametrize("name", ["folder", "mine.json"])
    def test_saved_is_loaded(self, tokenizer: TextTokenizer, tmp_path: Path, name: str) -> None:
        tokenizer.save(tmp_path / name)
        loaded = TextTokenizer.load(tmp_path / name)
        assert vars(loaded).keys() == vars(tokenizer).keys()
        assert loaded.encode("<mask> not") == tokenizer.encode("<mask> not")
        assert (loaded.vocab_size, loaded.mask_id, loaded.unk_id) == (
            tokenizer.vocab_size,
            tokenizer.mask_id,
            tokenizer.unk_id,
        )

    def test_ids_outside_the_vocabulary_are_refused(self, tokenizer: TextTokenizer) -> None:
        with pytest.raises(ArgumentError, match="ids: expected 0 to"):
            tokenizer.decode([0, tokenizer.vocab_size])


def test_unknown_characters_become_one_unknown_token_each() -> None:
    assert CHARACTERS.unk_id is not None
    assert CHARACTERS.encode("ZZ") == [CHARACTERS.unk_id] * 2
    assert CHARACTERS.unk_id in CHARACTERS.forbidden_ids
    assert BYTE_PAIRS.unk_id is None


def test_vocabulary_size_keeps_the_most_frequent_characters() -> None:
    tokenizer = train_tokenizer(["aaabbc"], vocab_size=6)
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("abc") == [4, 5, tokenizer.unk_id]
    assert BYTE_PAIRS.vocab_size == 300


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "\0"])
def test_corrupt_file_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError):
        TextTokenizer.load(tmp_path)


def test_an_unknown_token_that_the_model_lacks_is_a_checkpoint_error(tmp_path: Path) -> None:
    train_tokenizer(["some text"]).save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["<unl>"] = vocabulary.pop(content["model"]["unk_token"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: unk_token: expected a token of the model, got '<unk>'"):
        TextTokenizer.load(tmp_path)


def test_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a file that can be read"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": []}, "documents: expected some text"),
        ({"documents": [""]}, "documents: expected some text"),
        ({"documents": ["a"], "kind": "words"}, "kind: expected one of characters, bpe"),
        ({"documents": ["a"], "vocab_size": 4}, "vocab_size: expected more than"),
        ({"documents": ["a"], "kind": "bpe", "vocab_size": 100}, "vocab_size: expected at least 259"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        train_tokenizer(**arguments)


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    for kind in ("characters", "bpe"):
        with pytest.raises(ArgumentError, match="surrogate"):
            train_tokenizer(["ab", "\ud800"], kind=kind)
        tokenizer = train_tokenizer(["ab"], kind=kind)
        for encode in (tokenizer.encode, lambda text: tokenizer.encode_documents(["ab", text])):  # noqa: B023
            with pytest.raises(ArgumentError, match="text: expected Unicode text"):
                encode("a\udc80")
