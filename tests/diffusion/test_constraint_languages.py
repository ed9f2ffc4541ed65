"""Constraints on text: automata over tokens accept what Python's own tools say, whatever the tokens are."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
import diffusion as df
from diffusion.decoding.constraints._characters import utf8_ranges
from diffusion.text.tokenizer import train_tokenizer

EOS, PAD, MASK = 0, 1, 2
TEXTS = [
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"aab",
    b"1",
    b" ",
    b" b",
    b"\n",
    "é".encode(),
    "€".encode()[:1],
    "€".encode()[1:],
    b"c1",
]
VOCABULARY = df.constraints.Vocabulary((None, None, None, *TEXTS), (EOS,), PAD)
"""Tokens of several characters, and such that hold part of one."""

CHARACTERS = ["a", "b", "ab", "1", " ", "é", "€", ".", "", "{", "a{", "}", r"\n", r"\x61", r"\u00e9", r"\."]
SETS = ["[ab]", "[^a]", "[a-c1]", "[^é-€]", "[]a]", "[b-]", r"[\d€]", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S"]
atoms = st.sampled_from([*CHARACTERS, *SETS])
quantifiers = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "{0}", "*?", "+?"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, quantifiers).map("({0[0]}){0[1]}".format),
    ),
    max_leaves=6,
)
sequences = st.lists(st.integers(3, len(VOCABULARY.texts) - 1), max_size=5)


def written(ids):
    """Return the text of tokens, None where their bytes are no text."""
    try:
        return b"".join(VOCABULARY.texts[id] for id in ids).decode()
    except UnicodeDecodeError:
        return None


def accepts(automaton, ids):
    return bool(automaton.accepts(torch.tensor([ids], dtype=torch.int64).reshape(1, -1)))


@given(patterns, st.lists(sequences, min_size=1, max_size=20))
def test_regular_expressions_match_what_python_matches(pattern, rows):
    automaton = df.constraints.regex(pattern, VOCABULARY)
    for ids in rows:
        text = written(ids)
        matches = text is not None and re.fullmatch(pattern, text, re.ASCII) is not None
        assert accepts(automaton, ids) == matches
        assert accepts(automaton, [*ids, EOS]) == matches
        assert accepts(automaton, [*ids, EOS, PAD, EOS]) == matches
        assert not accepts(automaton, [*ids, PAD])
        assert not accepts(automaton, [*ids, MASK])
        assert not accepts(automaton, [*ids, EOS, 3])


@pytest.mark.parametrize("pattern", [*SETS, ".", r"[^\W\d]", r"[\S\n]", r"[\t\r\f\v\a\b\0\\-]"])
def test_sets_of_characters(pattern):
    every = [chr(code) for code in (*range(0x180), 0x20AC, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF)]
    automaton = df.constraints.regex(pattern, df.constraints.Vocabulary(tuple(c.encode() for c in every)))
    accepted = automaton.accepts(torch.arange(len(every)).unsqueeze(1)).tolist()
    assert accepted == [re.fullmatch(pattern, c, re.ASCII) is not None for c in every]


@pytest.mark.parametrize("word", ["a", "aa", "ab", "aab", "aba", "aabaa", "ababb", "abaab"])
def test_a_word_with_itself_inside(word):
    """Every text over two letters up to length 9."""
    letters = df.constraints.Vocabulary((b"a", b"b"))
    found, not_found = df.constraints.keywords([word], letters), df.constraints.forbid([word], letters)
    for length in range(1, 10):
        x = torch.cartesian_prod(*[torch.arange(2)] * length).reshape(-1, length)
        expected = [word in "".join("ab"[i] for i in row) for row in x.tolist()]
        assert found.accepts(x).tolist() == expected
        assert not_found.accepts(x).tolist() == [not e for e in expected]


@given(st.text("ab1 é€\n", max_size=6), st.text("ab1 é€\n", max_size=6))
def test_a_text_as_its_own_pattern(one, other):
    characters = train_tokenizer(["ab1 é€\n"])
    automaton = df.constraints.regex(re.escape(one), characters)
    assert accepts(automaton, characters.encode(one))
    assert accepts(automaton, characters.encode(other)) == (one == other)


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_tokens_of_our_own_tokenizers(kind):
    text = "the cat sat on the mat, the café costs 3 €.\nthe hat"
    tokenizer = train_tokenizer([text] * 3, kind=kind, vocab_size=300 if kind == "bpe" else None)
    texts = tokenizer.token_bytes()
    assert [texts[id] for id in (tokenizer.pad_id, tokenizer.mask_id, tokenizer.eos_id)] == [None] * 3
    ids = tokenizer.encode(text)
    assert b"".join(texts[id] for id in ids).decode() == text == tokenizer.decode(ids)
    assert max(len(texts[id]) for id in ids) > 1 or kind == "characters"
    automaton = df.constraints.regex(r"the [^,]+, [\w é]+\d €\.\s.*", tokenizer)
    assert accepts(automaton, ids)
    assert accepts(automaton, [*ids, tokenizer.eos_id, tokenizer.pad_id])
    assert not accepts(automaton, ids[:-20])


@given(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF), st.lists(st.integers(0, 0x10FFFF), max_size=20))
def test_utf8_of_a_range_of_characters(low, high, others):
    low, high = sorted((low, high))
    ranges = list(utf8_ranges(low, high))
    for code in (low, high, low - 1, high + 1, (low + high) // 2, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, *others):
        if not 0 <= code <= 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            continue
        content = chr(code).encode()
        fits = [
            len(r) == len(content) and all(a <= byte <= b for byte, (a, b) in zip(content, r, strict=True))
            for r in ranges
        ]
        assert sum(fits) == (low <= code <= high)


@given(st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=3), st.lists(sequences, max_size=30))
def test_keywords_occur_and_forbidden_texts_do_not(words, rows):
    all_of_them = df.constraints.keywords(words, VOCABULARY)
    none_of_them = df.constraints.forbid([*words, 5], VOCABULARY)
    for ids in rows:
        text = b"".join(VOCABULARY.texts[id] for id in ids)
        assert accepts(all_of_them, ids) == all(word.encode() in text for word in words)
        assert accepts(none_of_them, ids) == (5 not in ids and not any(word.encode() in text for word in words))
        assert accepts(none_of_them, [*ids, EOS, PAD]) == accepts(none_of_them, ids)


@given(st.lists(sequences, max_size=30))
def test_templates(rows):
    automaton = df.constraints.template("a{first}{{{}b", VOCABULARY, first="1*")
    fixed = df.constraints.template("a{two}b", VOCABULARY, two=2)
    for ids in [*rows, VOCABULARY.ids_of("a") + VOCABULARY.ids_of("ba") + VOCABULARY.ids_of("b")]:
        text = written(ids)
        assert accepts(automaton, ids) == (text is not None and re.fullmatch(r"a1*\{.+b", text) is not None)
        assert accepts(fixed, ids) == (text is not None and re.fullmatch("a.{2}b", text) is not None)
    assert accepts(fixed, [3, 6, 4])


@given(st.lists(sequences, max_size=30), st.integers(0, 2), st.integers(0, 2))
def test_lengths_and_forced_tokens(rows, least, more):
    between = df.constraints.length(least, least + more, VOCABULARY)
    at_least = df.constraints.length(least, None, VOCABULARY)
    forced = df.constraints.force({0: 5, 2: "1"}, VOCABULARY)
    for ids in rows:
        assert accepts(between, ids) == (least <= len(ids) <= least + more)
        assert accepts(between, [*ids, EOS, PAD]) == (least <= len(ids) <= least + more)
        assert accepts(at_least, [*ids, EOS, PAD]) == (least <= len(ids))
        assert accepts(forced, ids) == (len(ids) >= 3 and ids[0] == 5 and ids[2] == VOCABULARY.ids_of("1")[0])
        assert accepts(df.constraints.any_tokens(VOCABULARY), ids)
    assert not accepts(forced, [5, EOS, VOCABULARY.ids_of("1")[0]])
    assert accepts(df.constraints.force({1: EOS}, VOCABULARY), [4, EOS, PAD])


@given(st.lists(sequences, max_size=30))
def test_constraints_are_combined(rows):
    automaton = df.constraints.regex("[ab1 ]*", VOCABULARY) & df.constraints.keywords(["ba"], VOCABULARY)
    for ids in rows:
        text = written(ids)
        assert accepts(automaton, ids) == (text is not None and re.fullmatch("[ab1 ]*ba[ab1 ]*", text) is not None)


@given(st.integers(0, 1000))
def test_an_automaton_of_your_own(seed):
    """A nondeterministic one is determinised; with a tokenizer it reads what stands before the end."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (3, 4, 3), (3,), (3,)
    weights = [torch.where(torch.rand(s, generator=generator) < 0.4, 0.0, -torch.inf) for s in shapes]
    given = ct.queries.Automaton(*weights)
    automaton = df.constraints.automaton(given)
    small = df.constraints.Vocabulary((None, b"a", b"b", b"c"), (0,))
    ended = df.constraints.automaton(given, small)
    for length in range(4):
        x = (
            torch.cartesian_prod(*[torch.arange(4)] * length).reshape(-1, length)
            if length
            else torch.zeros(1, 0).long()
        )
        for row, accepted in zip(x.tolist(), automaton.accepts(x).tolist(), strict=True):
            states = weights[1].exp()
            for value in row:
                states = states @ weights[0][:, value].exp()
            assert accepted == bool((states @ weights[2].exp()) > 0)
            if 0 not in row:
                assert accepts(ended, row) == accepts(ended, [*row, 0, 0]) == accepted
                assert not accepts(ended, [0, *row, 1])


class Pieces:
    """What is asked of Hugging Face's tokenizers."""

    def __init__(self, pieces, special, added=None):
        self.pieces, self.all_special_ids = pieces, special
        self.added_tokens_decoder = added or {}
        self.eos_token_id, self.pad_token_id = special[0], None

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[id] for id in ids]


def test_byte_level_and_sentence_piece_tokens():
    from diffusion.text.tokenizer import byte_alphabet

    letters = {byte: c for c, byte in byte_alphabet().items()}
    space, accent = letters[ord(" ")], "".join(letters[byte] for byte in "é".encode())
    byte_level = Pieces(["<|end|>", *byte_alphabet(), f"{space}the", accent, "<x>"], [0], {259: "<x>"})
    texts = df.constraints.token_texts(byte_level)
    assert texts[0] is None
    assert sorted(texts[1:257]) == [bytes([byte]) for byte in range(256)]
    assert texts[257:] == [b" the", "é".encode(), b"<x>"]
    sentences = Pieces(["</s>", "<0x0A>", "▁the", "▁", "é"], [0])
    assert df.constraints.token_texts(sentences) == [None, b"\n", b" the", b" ", "é".encode()]
    known = df.constraints.vocabulary(sentences, vocab_size=8, pad_id=7)
    assert known.texts[5:] == (None, None, None)
    assert (known.eos_ids, known.pad_id) == ((0,), 7)
    assert accepts(df.constraints.regex(" thé?\n", known), []) is False
    assert accepts(df.constraints.regex(" theé?\n", known), [2, 4, 1, 0, 7])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(b", r"expected '\)'"),
        ("a)", r"expected no '\)'"),
        ("[ab", "not closed"),
        ("a\\", "not closed"),
        ("*a", "something to repeat"),
        ("a|{2}", "something to repeat"),
        ("a**", "one quantifier"),
        ("a*+", "one quantifier"),
        ("a{3,2}", "m <= n"),
        ("[b-a]", "two characters in order"),
        ("[a-\\d]", "two characters in order"),
        ("^a", "no anchors"),
        ("a$", "no anchors"),
        (r"(a)\1", "back references"),
        (r"\bword", "boundaries"),
        ("(?=a)", "lookaround"),
        ("(?i)a", "lookaround and flags"),
        (r"\xg1", "hexadecimal"),
        ("(?:a{999}){999}", "smaller repetitions"),
        (3, "expected a string"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(df.errors.ArgumentError, match=message):
        df.constraints.regex(pattern, VOCABULARY)


def test_arguments_that_are_refused():
    c = df.constraints
    cases = [
        (lambda: c.keywords([], VOCABULARY), "words"),
        (lambda: c.keywords("word", VOCABULARY), "words"),
        (lambda: c.keywords([""], VOCABULARY), "words"),
        (lambda: c.forbid([], VOCABULARY), "what"),
        (lambda: c.forbid([99], VOCABULARY), "what: expected ids"),
        (lambda: c.force({}, VOCABULARY), "tokens"),
        (lambda: c.force({-1: 3}, VOCABULARY), "tokens: expected positions"),
        (lambda: c.force({0: "zz"}, VOCABULARY), "one token"),
        (lambda: c.length(3, 2, VOCABULARY), "least, most"),
        (lambda: c.template("a {name}", VOCABULARY), "holes"),
        (lambda: c.template("a {", VOCABULARY), "text"),
        (lambda: c.template("{x:>3}", VOCABULARY, x="a"), "format"),
        (lambda: c.template("{x}", VOCABULARY, x=None), "x: expected"),
        (lambda: c.automaton("a"), "given"),
        (lambda: c.automaton(ct.queries.Automaton(torch.ones(1, 2, 1), torch.zeros(1), torch.zeros(1))), "weights 0"),
        (lambda: c.regex("a", object()), "tokenizer: expected one with token_bytes"),
        (lambda: c.regex("a", Pieces(["word", "##piece"], [0])), "byte-level or SentencePiece"),
        (lambda: c.vocabulary(VOCABULARY, vocab_size=3), "vocab_size"),
        (lambda: c.Vocabulary((None, None)), "texts"),
        (lambda: c.Vocabulary((b"a",), (1,)), "eos_ids"),
    ]
    for call, message in cases:
        with pytest.raises(df.errors.ArgumentError, match=message):
            call()
