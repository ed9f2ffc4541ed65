"""Controls: what each does to a prediction, by hand; and that a row's text stays its own."""

import math

import pytest
import torch

import circuits as ct
import diffusion as df

V, MASK, PAD, EOS = 8, 7, 6, 5
SPEC = df.DenoiserSpec(vocab_size=V, mask_id=MASK, eos_ids=(EOS,), pad_id=PAD, forbidden_ids=(MASK, PAD), max_length=40)
controls = df.controls

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed:
    """The same distribution everywhere, whatever is visible; notes what it is asked."""

    spec = SPEC

    def __init__(self, probs):
        rest = [1e-9] * (V - len(probs))
        self.log_q = torch.tensor([*probs, *rest]).log()
        self.times, self.canvases = [], []

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        self.times.append(t.tolist())
        self.canvases.append(tokens.clone())
        return (self.log_q + 3.0).expand(len(tokens), stop - start, V).clone()  # a constant that must not matter


class Reader:
    """A prediction that depends on all visible tokens by their distance, and ignores padding."""

    spec = SPEC

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.effect = torch.randn(81, V, V, generator=generator, dtype=torch.float64)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        places = torch.arange(tokens.shape[1])
        distance = places[start:stop].unsqueeze(1) - places + 40
        effects = self.effect[distance][:, places, tokens]  # (n, B, T, V)
        return (effects * valid.unsqueeze(-1)).sum(2).transpose(0, 1).float()


class Letters:
    """Ids 0 to 4 are a, b, c, d and the line feed."""

    def decode(self, ids):
        return "".join("abcd\n<_?"[id] for id in ids)


def steered(control, denoiser, prompt=((),), gen_length=2, block_length=None):
    """The distribution q that a step sees, (B, n, V), after a control."""
    seen = []

    def look(logits, view):
        seen.append(torch.softmax(logits, -1))
        return logits

    df.generate(
        denoiser, [list(row) for row in prompt], gen_length=gen_length, block_length=block_length, num_steps=None,
        controls=[control], logits_hook=look, seeds=range(len(prompt)),
    )  # fmt: skip
    return seen


def test_top_k_and_top_p_keep_the_best_tokens_and_their_ratios():
    denoiser = Fixed([0.4, 0.3, 0.2, 0.1])
    for control, kept in [
        (controls.TopK(2), [4 / 7, 3 / 7]),
        (controls.TopK(100), [0.4, 0.3, 0.2, 0.1]),
        (controls.TopP(0.69), [4 / 7, 3 / 7]),
        (controls.TopP(0.71), [4 / 9, 3 / 9, 2 / 9]),
        (controls.TopP(1e-9), [1.0]),
        (controls.TopP(1.0), [0.4, 0.3, 0.2, 0.1]),
    ]:
        q = steered(control, denoiser)[0][0, 0, :5]
        assert q.tolist() == pytest.approx([*kept, *[0.0] * (5 - len(kept))], abs=1e-6), control


def test_an_end_penalty_divides_the_odds_of_the_end():
    denoiser = Fixed([0.2, 0.3, 1e-9, 1e-9, 1e-9, 0.5])
    q = steered(controls.EndPenalty(math.log(5)), denoiser)[0][0, 0]
    assert q[[0, 1, 5]].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 6], abs=1e-6)
    assert steered(controls.EndPenalty(), denoiser)[0][0, 0, EOS] == 0


def test_a_repetition_penalty_is_a_power_of_what_was_seen():
    """q = (0.5, 0.25, 0.25), token 0 in the prompt of one row, penalty 2: (0.25, 0.25, 0.25) there."""
    denoiser = Fixed([0.5, 0.25, 0.25])
    first = steered(controls.RepetitionPenalty(2.0), denoiser, prompt=([0], [3]))[0]
    assert first[0, 0, :3].tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert first[1, 0, :3].tolist() == pytest.approx([0.5, 0.25, 0.25], abs=1e-6)


def test_a_repetition_penalty_sees_what_was_generated_but_neither_padding_nor_the_end():
    denoiser = Fixed([0.5, 0.25, 0.25])
    steps = steered(controls.RepetitionPenalty(2.0), denoiser, prompt=([], [3, 3]))
    assert steps[0][0, 0, :3].tolist() == pytest.approx([0.5, 0.25, 0.25], abs=1e-6)  # nothing but padding so far
    assert steps[1][0, 1, :3].tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)  # token 0 was written
    ending = Fixed([0.25, 1e-9, 1e-9, 1e-9, 1e-9, 0.75])
    assert steered(controls.RepetitionPenalty(2.0), ending, prompt=([EOS],))[0][0, 0, EOS] == pytest.approx(0.75)


def test_no_text_ends_before_its_minimal_length():
    denoiser = Fixed([0.1, 1e-9, 1e-9, 1e-9, 1e-9, 0.9])
    out = df.generate(denoiser, [[], [1, 2, 3]], gen_length=6, seeds=[0, 1], controls=[controls.MinLength(3)])
    assert out.generated.tolist() == [[0, 0, 0, EOS, PAD, PAD]] * 2
    canvas = torch.tensor([[MASK] * 5, [PAD, PAD, *[MASK] * 3]])
    valid = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    out = df.infill(denoiser, canvas, valid=valid, seeds=[0, 1], controls=[controls.MinLength(2)])
    assert out.tokens.tolist() == [[0, 0, EOS, EOS, EOS], [PAD, PAD, 0, 0, EOS]]


def test_ends_go_last_where_they_are_most_certain():
    """Position 0 is surely the end, position 1 is not sure: without the control the first step ends the text."""

    class EndsFirst(Fixed):
        def logits(self, tokens, **options):
            logits = super().logits(tokens, **options)
            logits[:, 0, EOS] += 30
            return logits

    denoiser = EndsFirst([0.6, 0.4])
    options = {"gen_length": 2, "num_steps": 2, "strategy": "low_confidence", "stop_at_eos": False, "record": True}
    firsts = []
    for used in ([], [controls.EndLast()]):
        out = df.generate(denoiser, [[]], controls=used, **options)
        assert out.generated.tolist() == [[EOS, 0]]
        firsts.append(out.trajectory[1, 0].tolist())
    assert firsts == [[EOS, MASK], [MASK, 0]]
    all_ends = df.generate(Fixed([0.0] * 5 + [1.0]), [[]], controls=[controls.EndLast()], **options)
    assert all_ends.generated.tolist() == [[EOS, EOS]]
    three = options | {"gen_length": 3, "num_steps": 3}
    all_ends = df.generate(Fixed([0.0] * 5 + [1.0]), [[]], controls=[controls.EndLast()], **three)
    assert (all_ends.trajectory[:, 0] == MASK).sum(1).tolist() == [3, 2, 1, 0]
    with pytest.raises(df.errors.ArgumentError, match="joint_entropy"):
        df.generate(denoiser, [[]], controls=[controls.EndLast()], **options | {"strategy": "joint_entropy"})


def test_guidance_extrapolates_from_the_prediction_without_the_prompt():
    """The law p(v | prompt)^(1 + s) / p(v)^s of a Bayes-optimal denoiser, computed from the world's table."""
    world = df.testing.worlds.hidden_markov(3, num_words=3, seed=1)
    prompt, scale = torch.tensor([[2]]), 1.5
    with_it = world.probs * (world.support[:, 0] == 2)
    guided = []
    for place in (1, 2):
        c, u = (
            torch.zeros(3, dtype=torch.float64).index_add_(0, world.support[:, place], weights)
            for weights in (with_it / with_it.sum(), world.probs)
        )
        guided.append(c ** (1 + scale) / u**scale)
    expected = torch.stack([row / row.sum() for row in guided])
    q = []
    out = df.generate(
        world.denoiser(), prompt, gen_length=2, num_steps=1, controls=[controls.Guidance(scale)],
        logits_hook=lambda logits, view: q.append(torch.softmax(logits, -1)) or logits,
    )  # fmt: skip
    torch.testing.assert_close(q[0][0, :, :3].double(), expected, rtol=1e-4, atol=1e-6)
    assert out.num_calls == 2
    assert out.row_calls.tolist() == [2]
    assert out.tokens_per_call == 1.0


def test_guidance_masks_what_is_around_holes_too():
    denoiser = Fixed([0.5, 0.5])
    df.infill(denoiser, [[0, MASK, 1, MASK]], num_steps=2, controls=[controls.Guidance(1.0)])
    first, without, second, without_again = denoiser.canvases
    assert without.tolist() == [[MASK] * 4]
    assert first.tolist() == [[0, MASK, 1, MASK]]
    written = second[0] != MASK
    assert written.sum() == 3
    assert (without_again[0] != MASK).sum() == 1  # what was generated stays visible


def test_a_text_ends_before_its_first_stop_string():
    class Spells(Fixed):
        """Writes a b LF a b LF ... after any prompt that ends at position 2."""

        def logits(self, tokens, *, valid=None, window=None, **options):
            logits = super().logits(tokens, window=window, **options)
            places = torch.arange(*(window or (0, tokens.shape[1])))
            return logits.scatter_add(2, torch.tensor([0, 1, 4])[places % 3].expand(len(tokens), -1)[..., None],
                                      torch.full((*logits.shape[:2], 1), 50.0))  # fmt: skip

    denoiser, letters = Spells([0.5, 0.5]), Letters()
    for strings, text in [
        ("\n", [0, 1]),
        (["ba", "b\na"], [0]),
        (["\n", "b"], [0]),
        ("\na", [0, 1]),
        ("c", [0, 1, 4, 0, 1, 4]),
    ]:
        for block_length in (1, 3, 6):
            out = df.generate(
                denoiser, [[3, 3, 4], [4]], gen_length=6, block_length=block_length,
                controls=[controls.StopStrings(strings, letters)],
            )  # fmt: skip
            for row, valid in zip(out.generated, out.valid[:, 3:], strict=True):
                assert row[valid].tolist() == text, (strings, block_length)
                assert bool((row[~valid] == PAD).all())
    stopped = df.generate(denoiser, [[]], gen_length=6, block_length=1, controls=[controls.StopStrings("\n", letters)])
    assert stopped.num_calls == 3  # the rest is not generated
    automaton = df.constraints.automaton(ct.queries.Automaton.deterministic(torch.zeros(1, V, dtype=torch.int64), [0]))
    with pytest.raises(df.errors.ArgumentError, match="beside a constraint"):
        df.generate(denoiser, [[]], gen_length=6, constraint=automaton, controls=[controls.StopStrings("\n", letters)])


def test_a_stop_string_waits_until_nothing_before_its_end_is_masked():
    """a ? LF b: what stands in the hole may be a stop string, and earlier."""
    seen = []

    class Late(Fixed):
        def logits(self, tokens, **options):
            logits = super().logits(tokens, **options)
            logits[:, 2, 4] += 30  # the line feed is written first, and the token before it last
            return logits

    out = df.infill(
        Late([0.5, 0.5]), [[3, MASK, MASK, 3]], num_steps=2, on_step=lambda step: seen.append(step.tokens[0].tolist()),
        controls=[controls.StopStrings(["\n", "a"], Letters())],
    )  # fmt: skip
    assert seen == [[3, MASK, 4, 3], [3, PAD, PAD, 3]]
    assert out.valid.tolist() == [[True, False, False, True]]


def test_a_hook_sees_where_decoding_is_and_decides():
    views, denoiser = [], Fixed([0.5, 0.5])

    def only_step_number(logits, view):
        views.append(view)
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor(view.step), 0.0)

    out = df.generate(denoiser, [[0], [2, 2, 2]], gen_length=4, block_length=2, logits_hook=only_step_number)
    assert out.generated.tolist() == [[1, 2, 3, 4]] * 2
    assert [view.span for view in views] == [(3, 5), (3, 5), (5, 7), (5, 7)]
    assert views[0].prompt_lengths.tolist() == [1, 3]
    assert views[0].given[:, :3].tolist() == [[False, False, True], [True, True, True]]
    assert views[2].tokens[:, 3:].tolist() == [[1, 2, MASK, MASK]] * 2
    assert not bool(views[0].given[:, 3:].any())


def test_denoisers_get_the_time_of_each_row():
    """The share of what is to be written that is masked: half of two holes after one of two steps."""
    denoiser = Fixed([0.5, 0.5])
    df.infill(denoiser, [[MASK] * 4, [0, MASK, MASK, 0]], num_steps=2)
    assert denoiser.times == [[1.0, 1.0], [0.5, 0.5]]
    df.generate(denoiser, [[0]], gen_length=4, block_length=2, num_steps=2)
    assert denoiser.times[2:] == [[1.0], [0.5]]


def test_what_a_control_rules_out_the_circuit_does_too():
    head = df.CoupledHead(ct.compile(ct.structures.hmm(4, 3, V), seed=0))
    for decode in ("latent", "marginal", "any_order", "joint"):
        out = df.generate(
            Reader(), [[0]] * 30, gen_length=8, num_steps=2, head=head, decode=decode, temperature=1.0, seeds=range(30),
            logits_hook=lambda logits, view: logits.index_fill(-1, torch.tensor([1, 3]), -torch.inf),
        )  # fmt: skip
        assert not bool(torch.isin(out.generated, torch.tensor([1, 3])).any())


ALL = {
    "EndPenalty": controls.EndPenalty(1.0),
    "EndLast": controls.EndLast(),
    "MinLength": controls.MinLength(4),
    "TopK": controls.TopK(3),
    "TopP": controls.TopP(0.8),
    "RepetitionPenalty": controls.RepetitionPenalty(1.7),
    "Guidance": controls.Guidance(0.7),
    "StopStrings": controls.StopStrings(["b", "aa"], Letters()),
}


@pytest.mark.parametrize("name", [*ALL, "all"])
def test_a_row_has_the_same_text_alone_and_beside_any_mates(name):
    head = df.CoupledHead(ct.compile(ct.structures.hmm(4, 3, V), seed=0))
    prompts, seeds, plain = [[0, 1, 2], [], [2, MASK, 1, 0, 3]], [7, 2**62, 8], []
    used = list(ALL.values()) if name == "all" else [ALL[name]]
    for plan in (df.Blocks(4, 6), df.DynamicWindows(5)):
        for temperature in (0.0, 1.0):
            options = {"gen_length": 9, "head": head, "temperature": temperature, "plan": plan}
            options["strategy"] = "low_confidence"
            together = df.generate(Reader(), prompts, seeds=seeds, controls=used, **options)
            plain.append(
                not torch.equal(together.tokens, df.generate(Reader(), prompts, seeds=seeds, **options).tokens)
            )
            for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                alone = df.generate(Reader(), [prompt], seeds=[seed], controls=used, **options)
                assert torch.equal(alone.generated[0], together.generated[row])
    assert any(plain)  # the control does something here


def test_controls_that_make_no_sense_are_refused():
    for make, name in [
        (lambda: controls.TopK(0), "top_k"),
        (lambda: controls.TopP(0.0), "top_p"),
        (lambda: controls.TopP(1.1), "top_p"),
        (lambda: controls.RepetitionPenalty(0.0), "repetition_penalty"),
        (lambda: controls.MinLength(-1), "min_length"),
        (lambda: controls.EndPenalty(-1.0), "penalty"),
        (lambda: controls.EndPenalty(float("nan")), "penalty"),
        (lambda: controls.Guidance(-1.0), "scale"),
        (lambda: controls.StopStrings("", Letters()), "stop"),
        (lambda: controls.StopStrings([], Letters()), "stop"),
    ]:
        with pytest.raises(df.errors.ArgumentError, match=f"{name}: expected"):
            make()
    for given in (controls.TopK(1), [3], [controls.TopK]):
        with pytest.raises(df.errors.ArgumentError, match="controls: expected"):
            df.generate(Fixed([1.0]), [[]], gen_length=2, controls=given)
    with pytest.raises(df.errors.ArgumentError, match="logits_hook: expected"):
        df.generate(Fixed([1.0]), [[]], gen_length=2, logits_hook=3)
    for hook in (lambda logits, view: logits[:, :, :2], lambda logits, view: None):
        with pytest.raises(df.errors.ArgumentError, match="to return"):
            df.generate(Fixed([1.0]), [[]], gen_length=2, logits_hook=hook)
