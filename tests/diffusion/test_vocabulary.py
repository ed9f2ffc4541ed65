"""A circuit over some of the denoiser's tokens: the law by enumeration, and the same in training, scoring, decoding."""

import itertools

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.fingerprint import tokenizer_fingerprint
from diffusion.text.tokenizer import train_tokenizer
from diffusion.vocabulary import Vocabulary

C, V, LENGTH = 3, 7, 4
IDS = (4, 1, 5)
"""Tokens of the categories 0, 1, 2; the mask is 0, and 2, 3, 6 are tokens that the circuit does not know."""


class Table:
    """A denoiser that says for V tokens what depends on position and on how often each token is seen."""

    def __init__(self, vocab_size=V, mask_id=0, forbidden=(), ids=range(V), tokenizer=None):
        self.spec = df.DenoiserSpec(
            vocab_size=vocab_size,
            mask_id=mask_id,
            eos_ids=(),
            pad_id=mask_id,
            forbidden_ids=(mask_id, *forbidden),
            max_length=16,
        )
        self.ids = torch.tensor(list(ids))
        self.tokenizer_fingerprint = tokenizer

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        seen = torch.nn.functional.one_hot(tokens, self.spec.vocab_size)[..., self.ids].float()
        seen = torch.nn.functional.pad(seen, (0, V - len(self.ids)))
        place = torch.linspace(-1, 1, V).outer(torch.arange(1.0, tokens.shape[1] + 1)).sin().T
        own = 2 * place + seen.sum(1, keepdim=True) @ torch.sin(torch.arange(float(V * V))).reshape(V, V)
        own[..., 0] = 0  # nothing depends on how many masks there are but this
        out = torch.zeros(*tokens.shape, self.spec.vocab_size)
        out[..., self.ids] = own[..., : len(self.ids)]
        return out[:, start:stop]


def circuit(seed=0, categories=C):
    return ct.compile(ct.structures.hmm(LENGTH, 2, categories), dtype=torch.float64, seed=seed)


def blocks():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.tensor(IDS)[torch.randint(C, (5, LENGTH), generator=generator)]
    masked = torch.rand(5, LENGTH, generator=generator) < 0.6
    masked[0], masked[1] = True, False
    return tokens, masked, torch.randn(5, LENGTH, V, dtype=torch.float64, generator=generator)


def law(pc, logits, tokens, masked):
    """Return ``p(x) prod q / Z`` of one block by enumeration, (V,) * L."""
    p = ct.testing.enumerate_joint(pc).exp()
    q = logits.softmax(-1)
    table = torch.zeros((V,) * LENGTH, dtype=torch.float64)
    for categories in itertools.product(range(C), repeat=LENGTH):
        text = tuple(IDS[c] for c in categories)
        if all(masked[i] or text[i] == tokens[i] for i in range(LENGTH)):
            table[text] = (
                p[categories] * torch.stack([q[i, text[i]] for i in range(LENGTH) if masked[i]] or [p.sum()]).prod()
            )
    return table / table.sum()


@pytest.mark.parametrize("normalization", ["global", "local"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_law_is_the_enumerated_one_and_sums_over_nothing_else(normalization, top_k):
    pc = circuit()
    head = df.CoupledHead(pc, normalization=normalization, top_k=top_k, vocabulary=IDS)
    tokens, masked, logits = blocks()
    dist = head.distribution(logits, tokens, masked)
    every = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    found = dist.log_prob(every.unsqueeze(1).expand(-1, 5, -1)).exp()
    if normalization == "global":
        expected = torch.stack([law(pc, *row) for row in zip(logits, tokens, masked, strict=True)])
        torch.testing.assert_close(found, expected.reshape(5, -1).T)
        for position in range(LENGTH):
            others = [1 + axis for axis in range(LENGTH) if axis != position]
            torch.testing.assert_close(dist.marginal_probs[:, position], expected.sum(others))
    torch.testing.assert_close(found.sum(0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(dist.posterior().dense().exp(), dist.marginal_probs)
    texts = torch.cat([dist.sample([20]).flatten(0, 1), dist.mode, dist.draw(0.5)])
    assert set(texts.unique().tolist()) <= set(IDS)
    known = torch.tensor([True, False, True, False]).expand(5, 4)
    given = dist.given(dist.mode, known)
    chain = dist.log_prob_at(dist.mode, known) + given.log_prob(dist.mode)
    torch.testing.assert_close(chain, dist.log_prob(dist.mode))


def test_padding_ids_that_are_forbidden_need_no_vocabulary():
    tokens, masked, logits = blocks()
    narrow, wide = logits[..., :C], logits.clone()
    tokens, wide[..., C:] = tokens % C, -torch.inf
    head = df.CoupledHead(circuit())
    expected = head.conditional_log_likelihood(narrow, tokens, masked)
    torch.testing.assert_close(head.conditional_log_likelihood(wide, tokens, masked), expected)
    with pytest.raises(ArgumentError, match=r"vocabulary=\.\.\."):
        head.distribution(logits, tokens, masked)
    with pytest.raises(ArgumentError, match="of the circuit's 3 tokens"):
        head.distribution(narrow[..., :2], tokens % 2, masked)


def renamed(tokens):
    """Return tokens 1 .. C in a vocabulary of their own as those of ``IDS``; 0, the mask, stays."""
    return torch.tensor((0, *IDS))[tokens]


def both():
    """Return a denoiser and head over V tokens of which three matter, and the same in a vocabulary of four."""
    wide = Table(forbidden=(2, 3, 6), ids=(0, *IDS))
    narrow = Table(vocab_size=4, ids=range(4))
    return (wide, df.CoupledHead(circuit(), vocabulary=IDS)), (narrow, df.CoupledHead(circuit(), vocabulary=(1, 2, 3)))


def test_training_scoring_and_the_gap_are_those_of_the_renamed_tokens(tmp_path):
    texts = torch.randint(1, 4, (24, LENGTH), generator=torch.Generator().manual_seed(5))
    results = []
    for (denoiser, head), data in zip(both(), (renamed(texts), texts), strict=True):
        folder = tmp_path / str(denoiser.spec.vocab_size)
        cache = df.cache_logits(denoiser, data, folder, block_length=LENGTH, progress=False)
        settings = df.CircuitTraining(steps=4, batch_size=8, learning_rate=0.1)
        df.fit_coupled(head, cache, config=settings, progress=False)
        weights = torch.cat([parameter.flatten() for parameter in head.parameters()])
        (row,) = df.evaluation.misspecification_gap(denoiser, head, data, mask_ratios=(0.75,), num_bootstrap=2).rows
        score = df.log_likelihood(denoiser, [[]] * 24, data, head=head, strategy="entropy", num_steps=2)
        numbers = [getattr(row, name).value for name in df.evaluation.gap.MODELS]
        results.append((weights, torch.tensor(numbers), score))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decode", ["latent", "marginal", "any_order", "joint"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_writes_what_it_writes_in_the_renamed_tokens(decode, temperature):
    written = []
    for denoiser, head in both():
        options = {"num_steps": 2, "head": head, "decode": decode, "temperature": temperature}
        written.append(df.generate(denoiser, [[]] * 6, gen_length=8, seeds=list(range(6)), **options).generated)
    assert torch.equal(written[0], renamed(written[1]))


def test_tokens_that_the_circuit_does_not_know_are_not_written_where_it_rests():
    head = df.CoupledHead(circuit(), 0.6, vocabulary=IDS)  # the first step is without it
    denoiser = Table()
    free = df.generate(denoiser, [[]] * 20, gen_length=4, temperature=1.0, seeds=list(range(20))).generated
    assert not set(free.unique().tolist()) <= set(IDS)
    out = df.generate(denoiser, [[]] * 20, gen_length=4, num_steps=4, head=head, temperature=1.0, seeds=list(range(20)))
    assert set(out.generated.unique().tolist()) <= set(IDS)
    scores = df.log_likelihood(denoiser, [[]], [[4, 2, 1, 5]], head=head, strategy="entropy", num_steps=2)
    assert scores.tolist() == [-torch.inf]


def test_the_likelihood_of_a_decoder_sums_to_one_over_the_tokens_of_the_circuit():
    every = torch.tensor(list(itertools.product(IDS, repeat=LENGTH)))
    head = df.CoupledHead(circuit(), vocabulary=IDS)
    scores = df.log_likelihood(Table(), [[]] * len(every), every, head=head, strategy="entropy", num_steps=2)
    assert scores.exp().sum().item() == pytest.approx(1)


def test_a_constraint_holds_over_the_tokens_of_the_circuit():
    odd = torch.tensor([[0, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 0, 0, 1]])  # an even number of 1, 4, 5: all of them
    automaton = df.constraints.automaton(ct.queries.DeterministicAutomaton.from_table(odd, accepting=[0]))
    head = df.CoupledHead(circuit(), vocabulary=(4, 1, 6))
    for decode in ("joint", "latent", "marginal", "any_order"):
        out = df.generate(
            Table(),
            [[]] * 10,
            gen_length=4,
            num_steps=2,
            head=head,
            decode=decode,
            constraint=automaton,
            temperature=1.0,
        ).generated
        assert set(out.unique().tolist()) <= {1, 4, 6}
        assert ((out != 6).sum(1) % 2 == 0).all()


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path):
    class Silent(Table):
        def logits(self, *arguments, **options):
            raise AssertionError("asked")

    narrow, wide = df.CoupledHead(circuit()), df.CoupledHead(circuit(categories=V + 1))
    for head in (narrow, wide, df.CoupledHead(circuit(), vocabulary=(1, 2, V))):
        with pytest.raises(ArgumentError, match="vocabulary"):
            df.generate(Silent(), [[]], gen_length=4, head=head)
        with pytest.raises(ArgumentError, match="vocabulary"):
            df.evaluation.misspecification_gap(Silent(), head, torch.ones(2, LENGTH, dtype=torch.int64))
    known = df.CoupledHead(circuit(), vocabulary=IDS)
    with pytest.raises(ArgumentError, match="got 2 at"):
        df.evaluation.misspecification_gap(Silent(), known, torch.full((2, LENGTH), 2))
    cache = df.cache_logits(Table(), torch.full((2, LENGTH), 2), tmp_path, block_length=LENGTH, progress=False)
    with pytest.raises(ArgumentError, match="cache: expected tokens of the circuit's vocabulary, got 2"):
        df.fit_coupled(known, cache, progress=False)
    tokens, masked, logits = blocks()
    with pytest.raises(ArgumentError, match=r"tokens: .* got 2 at \(1, 0\)"):
        known.distribution(logits, torch.full_like(tokens, 2), masked)


@pytest.mark.parametrize("vocabulary", [(1, 2), (1, 2, 2), (1, 2, -1), (1.0, 2.0, 3.0), "abc", [[1, 2, 3]]])
def test_a_vocabulary_is_an_id_for_every_category(vocabulary):
    with pytest.raises(ArgumentError, match="vocabulary"):
        df.CoupledHead(circuit(), vocabulary=vocabulary)


def test_a_head_remembers_its_vocabulary_and_its_tokenizer(tmp_path):
    head = df.CoupledHead(circuit(), vocabulary=IDS, tokenizer_fingerprint="abc")
    head.save(tmp_path / "head")
    loaded = df.CoupledHead.load(tmp_path / "head")
    assert loaded.vocabulary.tolist() == list(IDS)
    assert loaded.tokenizer_fingerprint == "abc"
    tokens, masked, logits = blocks()
    expected = head.conditional_log_likelihood(logits, tokens, masked)
    torch.testing.assert_close(loaded.conditional_log_likelihood(logits, tokens, masked), expected)
    df.CoupledHead(circuit()).save(tmp_path / "plain")
    assert df.CoupledHead.load(tmp_path / "plain").vocabulary is None


def test_another_tokenizer_is_refused_with_the_way_out(tmp_path):
    texts = torch.tensor(IDS)[torch.randint(C, (8, LENGTH))]
    caches = {
        name: df.cache_logits(Table(tokenizer=name), texts, tmp_path / name, block_length=LENGTH, progress=False)
        for name in ("one", "two")
    }
    head = df.CoupledHead(circuit(), vocabulary=IDS)
    config = df.CircuitTraining(steps=1, batch_size=4)
    df.fit_coupled(head, caches["one"], config=config, progress=False)
    assert head.tokenizer_fingerprint == "one"
    df.generate(Table(tokenizer="one"), [[]], gen_length=4, head=head)
    df.generate(Table(), [[]], gen_length=4, head=head)  # it does not know its own
    for refused in (
        lambda: df.fit_coupled(head, caches["two"], config=config, progress=False),
        lambda: df.generate(Table(tokenizer="two"), [[]], gen_length=4, head=head),
        lambda: df.log_likelihood(Table(tokenizer="two"), [[]], texts[:1], head=head, strategy="entropy"),
        lambda: df.evaluation.misspecification_gap(Table(tokenizer="two"), head, texts),
    ):
        with pytest.raises(ArgumentError, match=r"expected one for the tokenizer two, got one for one.* fit a head"):
            refused()


def test_fingerprints_are_of_tokens_and_their_ids():
    table = {"a": 0, "b": 1, "[MASK]": 2}
    assert tokenizer_fingerprint(table) == tokenizer_fingerprint(dict(reversed(table.items())))
    others = [{"a": 1, "b": 0, "[MASK]": 2}, {"a": 0, "b": 1}, {"a": 0, "b": 1, "[M]": 2}]
    assert len({tokenizer_fingerprint(one) for one in [table, *others]}) == 4
    own = train_tokenizer(["some text"])
    assert tokenizer_fingerprint(own) == tokenizer_fingerprint(own.get_vocab())
    with pytest.raises(ArgumentError, match="get_vocab"):
        tokenizer_fingerprint("bert")


def test_a_vocabulary_that_was_damaged_is_refused(tmp_path):
    head = df.CoupledHead(circuit(), vocabulary=IDS)
    head.vocabulary[0] = head.vocabulary[1]
    head.save(tmp_path / "head")
    with pytest.raises(CheckpointError, match="no two of them equal"):
        df.CoupledHead.load(tmp_path / "head")


def test_translation_goes_there_and_back():
    vocabulary = Vocabulary(torch.tensor(IDS), V)
    assert vocabulary.categories(torch.tensor([[4, 1], [5, 2]])).tolist() == [[0, 1], [2, -1]]
    assert vocabulary.tokens(vocabulary.categories(torch.tensor(IDS))).tolist() == list(IDS)
