"""A constraint along a canvas: what can still be accepted, by brute force; decoded texts always are."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
import diffusion as df
from diffusion.prediction import Prediction

MASK, EOS, PAD = 4, 3, 3
SPEC = df.DenoiserSpec(vocab_size=5, mask_id=MASK, eos_ids=(EOS,), pad_id=PAD, forbidden_ids=(MASK,), max_length=64)
VOCABULARY = df.constraints.Vocabulary((b"a", b"b", b"ab", None, None), (EOS,), PAD)
RELATIVE = {"rtol": 1e-9, "atol": 1e-11}

constraints = st.sampled_from(
    [
        df.constraints.regex("(ab)*", VOCABULARY),
        df.constraints.regex("a?b{2,5}|b*a", VOCABULARY),
        df.constraints.keywords(["bb", "aa"], VOCABULARY),
        df.constraints.forbid(["ba", 2], VOCABULARY),
        df.constraints.force({1: 2, 3: "b"}, VOCABULARY),
        df.constraints.length(1, 3, VOCABULARY) & df.constraints.regex(".*a", VOCABULARY),
        df.constraints.any_tokens(VOCABULARY),
    ]
)


@st.composite
def canvases(draw, length=5):
    tokens = torch.tensor([draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)) for _ in range(2)])
    masked = torch.tensor([draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(2)])
    reads = torch.tensor([draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(2)])
    return tokens.masked_fill(masked, MASK), masked, reads | draw(st.booleans())


def completions(tokens, masked):
    """Return every way to fill the masks of one row with tokens that may be written."""
    options = [range(4) if hole else [int(token)] for token, hole in zip(tokens, masked, strict=True)]
    return torch.tensor(list(itertools.product(*options)))


def states_along(automaton, x, reads):
    """Return the states at every place of some sequences, reading some positions only: (n, T + 1)."""
    path = [torch.full((len(x),), automaton.start)]
    for t in range(x.shape[1]):
        path.append(automaton.step(path[-1], x[:, t]) if reads[t] else path[-1])
    return torch.stack(path, 1)


@given(constraints, canvases())
def test_where_the_automaton_can_be(automaton, canvas):
    tokens, masked, reads = canvas
    constraint = df.constraints.Constraint.of(automaton, SPEC)
    reach = constraint.reach(tokens, masked, reads)
    for row in range(2):
        x = completions(tokens[row], masked[row])
        path = states_along(automaton, x, reads[row])
        for t in range(6):
            reached = set(path[:, t].tolist()) - {-1}
            assert set(reach.forward[row, t].nonzero().flatten().tolist()) == reached
            for state in range(automaton.num_states):
                rest = states_along(
                    ct.queries.DeterministicAutomaton(
                        automaton.classes, automaton.transition, automaton.accepting, state
                    ),
                    x[:, t:],
                    reads[row, t:],
                )[:, -1]
                accepted = bool(((rest >= 0) & automaton.accepting[rest.clamp_min(0)]).any())
                assert bool(reach.backward[row, t, state]) == accepted
        ends = path[:, -1]
        assert bool(reach.is_feasible[row]) == bool(((ends >= 0) & automaton.accepting[ends.clamp_min(0)]).any())


@given(constraints, canvases())
def test_feasibility_is_the_same_at_every_place(automaton, canvas):
    reach = df.constraints.Constraint.of(automaton, SPEC).reach(*canvas)
    meets = (reach.forward & reach.backward).any(-1)
    assert torch.equal(meets, reach.is_feasible.unsqueeze(1).expand(-1, 6))


@given(constraints, canvases(), st.integers(0, 1000))
def test_committing_proposals_one_by_one_leaves_a_way(automaton, canvas, seed):
    tokens, masked, reads = canvas
    constraint = df.constraints.Constraint.of(automaton, SPEC)
    generator = torch.Generator().manual_seed(seed)
    proposed = torch.randint(0, 4, tokens.shape, generator=generator)
    ranked = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(2)])
    committed = constraint.commit(proposed, tokens, masked, ranked, reads=reads)
    assert not bool((committed & ~masked).any())
    feasible = constraint.reach(tokens, masked, reads).is_feasible
    after = constraint.reach(torch.where(committed, proposed, tokens), masked & ~committed, reads).is_feasible
    assert torch.equal(after, feasible)
    for row in range(2):  # what was refused would have left no way
        for position in ranked[row].tolist():
            if feasible[row] and masked[row, position] and not committed[row, position]:
                more = committed.clone()
                more[row, position] = True
                reach = constraint.reach(torch.where(more, proposed, tokens), masked & ~more, reads)
                assert not bool(reach.is_feasible[row])


def hmm(length, seed=0):
    return ct.compile(ct.structures.hmm(length, 3, 5), dtype=torch.float64, seed=seed)


def predicted(generator, *shape):
    logits = 2 * torch.randn(*shape, 5, dtype=torch.float64, generator=generator)
    return Prediction.from_logits(logits.index_fill(-1, torch.tensor([MASK]), -torch.inf))


def distribution(has_circuit, prediction, tokens, masked, automaton, **options):
    coupled = df.constraints.ConstrainedCoupledDistribution
    if not has_circuit:
        return coupled.independent(prediction, tokens, masked, automaton, **options)
    dist = df.CoupledDistribution.of(hmm(tokens.shape[1]), prediction, tokens, masked)
    return coupled.under(dist, automaton, **options)


TEXT = df.constraints.regex("(a|bb)+", VOCABULARY) & df.constraints.keywords(["aa"], VOCABULARY)


@pytest.mark.parametrize("has_circuit", [False, True])
@pytest.mark.parametrize("how", ["sample", "mode", "latent", "best", "marginal", "one_by_one"])
def test_every_decoded_text_is_accepted(has_circuit, how, generator):
    """Windows of any place and length, several steps, some positions a step: the state travels along the canvas."""
    num_rows, length = 30, 8
    constraint = df.constraints.Constraint.of(TEXT, SPEC)
    tokens = torch.full((num_rows, length), MASK)
    tokens[::3, 2] = 1  # the canvas is not empty
    reads = torch.ones_like(tokens, dtype=torch.bool)
    reads[1::2, 0] = False  # some rows begin later
    tokens[1::2, 0] = 2
    for _ in range(200):
        masked = tokens == MASK
        if not bool(masked.any()):
            break
        start = int(torch.randint(0, length - 3, (), generator=generator))
        window = slice(start, start + 4)
        reach = constraint.check(tokens, masked, reads)
        ends = dict(zip(("start", "accept"), (reach.forward[:, start], reach.backward[:, start + 4]), strict=True))
        here, open_here, read_here = tokens[:, window], masked[:, window], reads[:, window]
        prediction = constraint.listed(predicted(generator, num_rows, 4), 2)
        dist = distribution(has_circuit, prediction, here, open_here, TEXT, reads=read_here, **ends)
        chosen = open_here & (torch.rand(here.shape, generator=generator) < 0.5)
        if how in ("sample", "mode"):
            proposed = dist.sample(generator=generator) if how == "sample" else dist.mode
        elif how in ("latent", "best"):
            given = dist.given_latents(generator, temperature=float(how == "latent"))
            scores = prediction.log_q / 3 + given.log_q  # any temperature
            proposed = Prediction(log_q=scores, vocab_size=5, values=prediction.values).draw(generator)
        else:
            proposed = dist.posterior().draw(generator)
            ranked = torch.rand(here.shape, generator=generator).masked_fill(~open_here, -1).argsort(-1)[:, -3:].flip(1)
            ranked = ranked[:, :1] if how == "marginal" else ranked
            chosen = constraint.commit(proposed, here, open_here, ranked, reads=read_here, **ends)
            assert bool(chosen.any(1)[open_here.any(1)].all())  # the first is always committed
        tokens[:, window] = torch.where(chosen, proposed, here)
    assert not bool((tokens == MASK).any())
    for row, read in zip(tokens, reads, strict=True):
        assert bool(TEXT.accepts(row[read].unsqueeze(0)))


def enumerated(pc, prediction, tokens, masked, accepted):
    """Return every text of a window and its log-probability under circuit, prediction and constraint, (A, B)."""
    x = torch.cartesian_prod(*[torch.arange(5)] * tokens.shape[1])
    log_p = pc(x).unsqueeze(1) if pc is not None else torch.zeros(1, 1, dtype=torch.float64)
    log_q = prediction.dense()[:, torch.arange(x.shape[1]), x].permute(1, 0, 2)  # (A, B, L)
    fits = ((x.unsqueeze(1) == tokens) | masked).all(-1) & accepted(x).unsqueeze(-1)
    log_joint = (log_p + log_q.masked_fill(~masked, 0.0).sum(-1)).masked_fill(~fits, -torch.inf)
    return x, log_joint - torch.logsumexp(log_joint, 0), torch.logsumexp(log_joint, 0)


@pytest.mark.parametrize("has_circuit", [False, True])
@pytest.mark.parametrize("is_listed", [False, True])
def test_the_distribution_is_the_coupled_one_on_what_is_accepted(has_circuit, is_listed, generator):
    tokens = torch.tensor([[MASK, 1, MASK], [MASK, MASK, MASK]])
    masked = tokens == MASK
    automaton = df.constraints.regex("a*b+", VOCABULARY)
    prediction = predicted(generator, 2, 3)
    if is_listed:
        prediction = df.constraints.Constraint.of(automaton, SPEC).listed(prediction, 1)
    dist = distribution(has_circuit, prediction, tokens, masked, automaton)
    pc = hmm(3) if has_circuit else None
    x, log_p, log_z = enumerated(pc, prediction, tokens, masked, automaton.accepts)
    every = x.unsqueeze(1).expand(-1, 2, -1)
    torch.testing.assert_close(dist.log_prob(every), log_p, **RELATIVE)
    if has_circuit:
        torch.testing.assert_close(dist.log_partition, log_z, **RELATIVE)
    is_token = (every.unsqueeze(-1) == torch.arange(5)).double()
    marginals = torch.einsum("ab,ablv->blv", log_p.exp(), is_token)
    torch.testing.assert_close(dist.marginal_probs, marginals, **RELATIVE)
    torch.testing.assert_close(dist.posterior().dense().exp(), marginals, **RELATIVE)
    labels = torch.tensor([[0, -100, 1], [0, 0, 1]])
    torch.testing.assert_close(dist.log_prob(labels), dist.log_prob(torch.tensor([[0, 1, 1], [0, 0, 1]])))
    more = dist.given(torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.tensor([[False, False, True]] * 2))
    x, log_p, _ = enumerated(pc, prediction, more.tokens, more.masked, automaton.accepts)
    torch.testing.assert_close(more.log_prob(every), log_p, **RELATIVE)
    with pytest.raises(df.errors.UnfactorError, match="it knows nothing of the automaton"):
        dist.query(ct.queries.mutual_information)


def test_probability_of_the_constraint(generator):
    """Exact, and with the circuit another one than without."""
    tokens = torch.full((1, 3), MASK)
    automaton = df.constraints.keywords(["ab"], VOCABULARY)
    prediction = predicted(generator, 1, 3)
    dist = distribution(True, prediction, tokens, tokens == MASK, automaton)
    x = torch.cartesian_prod(*[torch.arange(5)] * 3)
    coupled = df.CoupledDistribution.of(hmm(3), prediction, tokens, tokens == MASK)
    accepted = automaton.accepts(x)
    expected = coupled.log_prob(x.unsqueeze(1))[accepted].exp().sum(0)
    torch.testing.assert_close(dist.log_acceptance.exp(), expected, **RELATIVE)
    joint = dist.log_prob(x[accepted].unsqueeze(1), log_partition=torch.zeros(1))  # nothing is divided by
    torch.testing.assert_close(joint.logsumexp(0), dist.log_partition, **RELATIVE)


def test_a_list_of_the_best_token_alone_rules_out_no_path(generator):
    """The keyword is improbable everywhere: top-1 alone cannot write it."""
    automaton = df.constraints.keywords(["bb"], VOCABULARY)
    logits = torch.zeros(1, 2, 5, dtype=torch.float64)
    logits[..., 0] = 50.0
    prediction = Prediction.from_logits(logits)
    tokens = torch.full((1, 2), MASK)
    with pytest.raises(df.errors.ImpossibleEvidenceError):
        distribution(True, prediction.listed(1), tokens, tokens == MASK, automaton).sample()
    constraint = df.constraints.Constraint.of(automaton, SPEC)
    listed = constraint.listed(prediction, 1)
    assert listed.num_listed <= 1 + automaton.num_classes
    dist = distribution(True, listed, tokens, tokens == MASK, automaton)
    assert bool(automaton.accepts(dist.sample((50,), generator=generator)[:, 0]).all())
    for position in range(2):
        values = listed.values[0, position][listed.log_q[0, position] > -torch.inf].tolist()
        assert len(values) == len(set(values))
        assert MASK not in values


@pytest.mark.parametrize(
    ("automaton", "row", "reason"),
    [
        (df.constraints.regex("ab", VOCABULARY) & df.constraints.regex("ba", VOCABULARY), [MASK] * 4, "of any length"),
        (df.constraints.regex("[ab]{9,}", VOCABULARY), [MASK] * 4, "exactly 4 tokens, .* one of 5 could"),
        (df.constraints.length(5, None, VOCABULARY), [MASK] * 4, "exactly 4 tokens"),
        (df.constraints.regex("a*", VOCABULARY), [MASK, 0, 1, MASK], "after token 1 at position 2 nothing"),
        (df.constraints.keywords(["bb"], VOCABULARY), [MASK, 0, MASK, 0], "after token 0 at position 3 nothing"),
        (
            df.constraints.automaton(
                ct.queries.DeterministicAutomaton.from_table(torch.tensor([[-1] * 4 + [1], [1] * 5]), [1])
            ),
            [MASK] * 4,
            "tokens that the denoiser may not write",
        ),
    ],
)
def test_what_cannot_be_satisfied_is_refused_with_the_reason(automaton, row, reason):
    tokens = torch.tensor([[0, 1, 0, 1], row])
    constraint = df.constraints.Constraint.of(automaton, SPEC)
    reads = torch.tensor([[False] * 4, [True] * 4])
    with pytest.raises(df.errors.ArgumentError, match=f"constraint: expected .* {reason}"):
        constraint.check(tokens[1:], (tokens == MASK)[1:])
    if automaton.accepting[automaton.start]:  # nothing of row 0 is read, and the empty text is accepted
        with pytest.raises(df.errors.ArgumentError, match=r"1 of 2 rows .* row 1"):
            constraint.check(tokens, tokens == MASK, reads)


@pytest.mark.parametrize("accepts_the_end", [False, True])
def test_texts_end_whatever_the_automaton_makes_of_the_end(accepts_the_end):
    """(01)*, with the end-of-text token as a part of the text that is asked for, or unknown."""
    end, padding = 2, 3
    spec = df.DenoiserSpec(
        vocab_size=5, mask_id=MASK, eos_ids=(end,), pad_id=padding, forbidden_ids=(MASK, padding), max_length=9
    )
    table = torch.full((3, 5), -1)
    table[0, 0], table[1, 1] = 1, 0
    if accepts_the_end:
        table[0, end] = 2
    automaton = ct.queries.DeterministicAutomaton.from_table(table, [2] if accepts_the_end else [0])
    x = torch.cartesian_prod(*[torch.arange(5)] * 4)
    ended = df.constraints.Constraint.of(automaton, spec, ends=True).automaton
    accepted = {tuple(row) for row in x[ended.accepts(x)].tolist()}
    texts = {(0, 1, 2), (2,)} | (set() if accepts_the_end else {(0, 1, 0, 1)})
    expected = {(*text, *rest) for text in texts for rest in itertools.product((end, padding), repeat=4 - len(text))}
    assert accepted == expected
    as_it_is = df.constraints.Constraint.of(automaton, spec).automaton
    assert torch.equal(as_it_is.accepts(x), automaton.accepts(x))


def test_what_is_no_constraint():
    automaton = df.constraints.any_tokens(df.constraints.Vocabulary((b"a",)))
    with pytest.raises(df.errors.ArgumentError, match="over the denoiser's 5 tokens, got 1"):
        df.constraints.Constraint.of(automaton, SPEC)
    with pytest.raises(df.errors.ArgumentError, match=r"expected what df\.constraints returns"):
        df.constraints.Constraint.of("ab*", SPEC)
    listed = Prediction(log_q=torch.zeros(1, 1, 1), vocab_size=5, values=torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(df.errors.ArgumentError, match="of all tokens, got a list"):
        df.constraints.Constraint.of(df.constraints.any_tokens(VOCABULARY), SPEC).listed(listed, 1)
