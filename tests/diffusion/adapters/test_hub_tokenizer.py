"""Tokenizers of pretrained models: ids, bytes, special tokens and chat templates."""

import json

import pytest
import tiny_models as tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import diffusion as df
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.text.tokenizer import train_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|mask|>"]
TEXT = "Zürich, 12 € größer than <|mask|>?\n"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_pairs(folder, **settings):
    """A byte-level tokenizer as Qwen2 and GPT-2 have, in ``tokenizer.json``, and the config of its model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT * 5, "greater than smaller than"], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": None, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def test_texts_come_back_and_names_of_special_tokens_are_text(tmp_path):
    byte_pairs(tmp_path)
    tokenizer = df.load_tokenizer(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.mask_id not in ids
    assert tokenizer.encode_documents([TEXT, "than"]) == [ids, tokenizer.encode("than")]
    special = tokenizer.encode("than<|mask|>", special=True)
    assert special == [*tokenizer.encode("than"), tokenizer.mask_id]
    assert tokenizer.encode("than<|mask|>") != special  # the choice is not remembered
    assert (tokenizer.decode(special), tokenizer.decode(special, keep_special=True)) == ("than", "than<|mask|>")


def test_bytes_of_tokens_are_those_of_the_text(tmp_path):
    byte_pairs(tmp_path)
    tokenizer = df.load_tokenizer(tmp_path)
    written = tokenizer.token_bytes()
    assert b"".join(written[id] for id in tokenizer.encode(TEXT)) == TEXT.encode()
    assert [id for id, text in enumerate(written) if text is None] == [270, 271, 272]
    assert len(written) == tokenizer.vocab_size == 273


def test_special_ids_are_those_of_config_and_settings(tmp_path):
    byte_pairs(tmp_path)
    tokenizer = df.load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.unk_id) == (270, 270, 272, None)
    assert tokenizer.forbidden_ids == (272,)
    config = {"model_type": "Dream", "eos_token_id": [271, 270], "pad_token_id": 5, "mask_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = df.load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (271, 5, 7)
    assert tokenizer.forbidden_ids == (5, 7)


def test_ids_agree_with_what_a_denoiser_of_the_folder_knows(tmp_path):
    from diffusion.denoisers.adapters.vocabulary import fingerprint_of, token_ids

    expected = byte_pairs(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    expected.model.save(str(old))
    (old / "added_tokens.json").write_text(json.dumps(dict(zip(SPECIAL, range(270, 273), strict=True))))
    (old / "tokenizer_config.json").write_text("{}")
    for folder in (tmp_path / "new", old):
        tokenizer = df.load_tokenizer(folder)
        assert tokenizer.get_vocab() == token_ids(folder) == expected.get_vocab()
        assert tokenizer.fingerprint == fingerprint_of(folder)


def test_the_older_files_give_the_same_ids(tmp_path):
    expected = byte_pairs(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    expected.model.save(str(old))
    added = {str(id): {"content": token, "special": True} for id, token in enumerate(SPECIAL, 270)}
    (old / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = df.load_tokenizer(old)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.encode(TEXT) == df.load_tokenizer(tmp_path / "new").encode(TEXT)
    added["275"] = {"content": "<|gap|>", "special": True}
    (old / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(CheckpointError, match="275"):
        df.load_tokenizer(old)


def test_dream_splits_numbers_into_digits(tmp_path):
    expected = byte_pairs(tmp_path)
    expected.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Dream"}))
    tokenizer = df.load_tokenizer(tmp_path)
    pieces = [text for text, _ in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("It's 120\n\nNo!")]
    assert pieces == ["It", "'s", "Ġ", "1", "2", "0", "ĊĊ", "No", "!"]


def test_mdlm_has_the_vocabulary_of_gpt2_and_a_mask(tmp_path):
    byte_pairs(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.dit_config(model_type="mdlm", vocab_size=274)))
    tokenizer = df.load_tokenizer(tmp_path)
    assert (tokenizer.get_vocab()["[MASK]"], tokenizer.vocab_size) == (273, 274)


def test_tokenizers_of_ours_are_what_they_were(tmp_path):
    own = train_tokenizer([TEXT])
    own.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "unfactor-transformer"}))
    loaded = df.load_tokenizer(tmp_path)
    assert type(loaded) is type(own)
    assert loaded.encode(TEXT) == own.encode(TEXT)


def test_a_tokenizer_is_saved_and_loaded(tmp_path):
    byte_pairs(tmp_path / "model")
    tokenizer = df.load_tokenizer(tmp_path / "model")
    tokenizer.save(tmp_path / "copy")
    assert df.load_tokenizer(tmp_path / "copy").get_vocab() == tokenizer.get_vocab()


def test_conversations_are_written_as_the_template_says(tmp_path):
    messages = [{"role": "user", "content": "than?"}]
    byte_pairs(tmp_path, chat_template=TEMPLATE)
    tokenizer = df.load_tokenizer(tmp_path)
    text = tokenizer.apply_chat_template(messages)
    assert text == "[user]than?<|endoftext|>[assistant]"
    assert tokenizer.encode(text, special=True).count(tokenizer.eos_id) == 1
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == "[user]than?<|endoftext|>"
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages %}{{ raise_exception('no ' ~ messages[0].role) }}{% endif %}"
    )
    with pytest.raises(ArgumentError, match="no user"):
        df.load_tokenizer(tmp_path).apply_chat_template(messages)


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"]
)
def test_a_template_stays_in_its_sandbox(tmp_path, template):
    byte_pairs(tmp_path, chat_template=template)
    with pytest.raises(ArgumentError, match="unsafe"):
        df.load_tokenizer(tmp_path).apply_chat_template([])


def test_without_a_template_a_conversation_is_refused(tmp_path):
    byte_pairs(tmp_path)
    with pytest.raises(ArgumentError, match="chat template"):
        df.load_tokenizer(tmp_path).apply_chat_template([])


def test_word_pieces_have_no_bytes_of_their_own(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "##c": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = df.load_tokenizer(tmp_path)
    assert loaded.unk_id == 0
    with pytest.raises(ArgumentError, match="word pieces"):
        loaded.token_bytes()


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_residues_are_letters_with_or_without_spaces(tmp_path, form):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    if form == "vocab.txt":
        (tmp_path / form).write_text("\n".join(tokens) + "\n")
    else:
        pieces = Tokenizer(models.WordPiece({token: id for id, token in enumerate(tokens)}, unk_token="[UNK]"))
        pieces.save(str(tmp_path / form))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "pad_token_id": 0}))
    tokenizer = df.load_tokenizer(tmp_path)
    assert tokenizer.encode("ACWB") == tokenizer.encode("A C W B") == [5, 6, 23, 1]
    assert tokenizer.decode([5, 6, 23]) == "ACW"
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id) == (4, 0, 1, None)
    assert tokenizer.token_bytes()[3:7] == [None, None, b"A", b"C"]


def test_words_of_a_masked_language_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="vocab.txt of words is read with transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "words", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertConfig(vocab_size=8).save_pretrained(tmp_path)
    tokenizer = df.load_tokenizer(tmp_path)
    assert tokenizer.encode("Two words") == [5, 6]
    assert (tokenizer.mask_id, tokenizer.unk_id, tokenizer.pad_id) == (4, 1, 0)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    byte_pairs(tmp_path)
    with pytest.raises(ArgumentError, match="273"):
        df.load_tokenizer(tmp_path).decode([0, 273])


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', None])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer"):
        df.load_tokenizer(tmp_path)
