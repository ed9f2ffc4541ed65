"""Weights of a mixture's components that depend on noise, context and what the components say."""

import numpy as np
import pytest
import torch
from contextual_cases import (
    CONTEXT,
    DOUBLE,
    LENGTH,
    TOKENS,
    B,
    H,
    piecewise,
    small_denoiser,
    told_windows,
)
from hmm_cases import TEXTS, L, V, texts

import circuits as ct
from diffusion import (
    CircuitTraining,
    CoupledDistribution,
    CoupledHead,
    LatentPotentials,
    MixtureWeights,
    NoiseCalibration,
    Prediction,
    TransitionGates,
    cache_logits,
    constraints,
    fit_coupled,
    generate,
)
from diffusion.decoding.constraints.coupled import ConstrainedCoupledDistribution
from diffusion.errors import ArgumentError
from diffusion.testing.worlds import World
from diffusion.training.circuit import coupled_loss

K = 3
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def member(pc, k):
    """The k-th component as a circuit of its own."""
    alone = ct.compile(ct.Circuit(pc.circuit.root.children[k]), dtype=DOUBLE)
    for node in (*alone.circuit.sums, *alone.circuit.inputs):
        alone.set_weights(node, pc.log_weights(node).exp().detach())
    return alone


@pytest.fixture
def pc():
    parts = [ct.structures.hmm(L, 2, V), ct.structures.hmm(L, 3, V, homogeneous=False)]
    made = ct.structures.mixture_of(
        [*parts, ct.structures.fully_factorized(L, V)], weights=torch.tensor([0.5, 0.2, 0.3], dtype=DOUBLE)
    )
    return ct.compile(made, dtype=DOUBLE, seed=0)


def moved(pc, generator, num_features=H, **options):
    """Mixture weights after some training, so to say."""
    made = MixtureWeights.for_mixture(pc, num_features, num_knots=3, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=DOUBLE, generator=generator))
    return made


def products(pc, said, tokens, masked, normalization="global"):
    """p_k(x) q(x) of all texts by component, (B, V ** L, K), and their sums Z_k, (B, K), by enumeration."""
    found = np.zeros((B, len(TEXTS), len(pc.circuit.root.children)))
    for k in range(found.shape[2]):
        dist = CoupledDistribution.of(member(pc, k), said, tokens, masked, normalization=normalization)
        found[..., k] = (dist.log_prob(texts(B)) + dist.log_partition).exp().detach().numpy().T
    return found, found.sum(1)


@pytest.mark.parametrize("normalization", ["global", "local"])
def test_components_weigh_what_the_formula_says(normalization, pc, said, block, generator):
    tokens, masked = block
    made = moved(pc, generator)
    ratio = masked.double().mean(1).numpy()
    pooled = np.stack([said.features[b, masked[b]].mean(0).numpy() for b in range(B)])
    layer = made.network
    a = np.concatenate([pooled, ratio[:, None]], 1) @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    joint, log_z = products(pc, said, tokens, masked, normalization)
    factors = np.exp(a + piecewise(made.bias, ratio)) * log_z ** -piecewise(made.power, ratio)
    law = (joint * (factors * np.array([0.5, 0.2, 0.3]))[:, None]).sum(-1)
    law /= law.sum(1, keepdims=True)
    head = CoupledHead(pc, normalization=normalization, conditioners=[made])
    dist = head(said, tokens, masked)
    np.testing.assert_allclose(dist.log_prob(texts(B)).exp().detach().numpy().T, law, rtol=1e-9, atol=1e-14)
    one_hot = np.eye(V)[np.array(TEXTS)]
    np.testing.assert_allclose(dist.marginal_probs.detach(), np.einsum("bx,xlv->blv", law, one_hot), atol=1e-10)


@pytest.mark.parametrize("num_features", [None, H])
@pytest.mark.parametrize("normalization", ["global", "local"])
def test_before_training_it_is_the_static_mixture_to_the_last_bit(normalization, num_features, pc, said, block):
    static = CoupledHead(pc, normalization=normalization)
    made = MixtureWeights.for_mixture(pc, num_features, hidden=3).double()
    head = CoupledHead(pc, normalization=normalization, conditioners=[made])
    for ask in (lambda d: d.log_prob(texts(B)), lambda d: d.log_partition):
        with torch.no_grad():
            assert torch.equal(ask(head(said, *block)), ask(static(said, *block)))
        assert torch.equal(ask(head(said, *block)), ask(static(said, *block)))


def test_training_can_begin(pc, said, block):
    made = MixtureWeights.for_mixture(pc, H, hidden=4).double()
    CoupledHead(pc, conditioners=[made])(said, *block).log_prob(block[0]).sum().backward()
    moves = {name: float(one.grad.abs().max()) for name, one in made.named_parameters() if one.grad is not None}
    assert min(moves[name] for name in ("bias", "power", "network.2.weight", "network.2.bias")) > 1e-4


def test_the_gradient_goes_through_what_the_components_say(pc, said, block, generator):
    """By finite differences, of weights in the circuit, of beta, and of the logits."""
    tokens, masked = block
    made = moved(pc, generator)
    head = CoupledHead(pc, conditioners=[made])
    name, _ = pc.bank_address("member0.transition0")

    def loss(bank, power, log_q):
        said_so = Prediction(log_q=log_q, vocab_size=V, features=said.features)
        parameters = {f"pc.bank.{name}": bank, "conditioners.0.power": power}
        dist = torch.func.functional_call(head, parameters, (said_so, tokens, masked))
        return dist.log_prob(tokens)

    given = pc.bank[name].detach().clone(), made.power.detach().clone(), said.log_q.clone()
    assert torch.autograd.gradcheck(loss, tuple(one.requires_grad_() for one in given), atol=1e-6)


def one_step(said, masked):
    """log prod q_i(x_i) of all texts, (V ** L, B), -inf where they are not what is visible."""
    log_q = said.log_q.log_softmax(-1)
    return (log_q.gather(2, texts(B).permute(1, 2, 0)) * masked.unsqueeze(-1)).sum(1).T


@pytest.mark.parametrize("scale", [0.0, 0.75])
def test_with_an_independent_component_the_gate_is_between_coupled_and_plain_prediction(scale, said, block, generator):
    """sum_k g_k p_k q / Z_k; the second is q itself, also where a calibration divides frequencies out of it."""
    tokens, masked = block
    chain = ct.compile(ct.structures.hmm(L, 2, V), dtype=DOUBLE, seed=1)
    calibration = NoiseCalibration.dividing_out(torch.tensor([5, 1, 0, 20]), strength=scale).double()
    mixture = MixtureWeights.with_independent(chain, calibration, share=0.2)
    gate = MixtureWeights.for_mixture(mixture, power=1.0)
    dist = CoupledHead(mixture, calibration=calibration, conditioners=[gate.double()])(said, tokens, masked)
    coupled = CoupledHead(chain, calibration=calibration)(said, tokens, masked).log_prob(texts(B)).exp()
    visible = ((texts(B) == tokens) | masked).all(-1)
    expected = 0.8 * coupled + 0.2 * one_step(said, masked).exp() * visible
    torch.testing.assert_close(dist.log_prob(texts(B)).exp(), expected, rtol=1e-6, atol=1e-12)
    assert mixture.circuit.num_parameters == chain.circuit.num_parameters + V + 2


def test_what_is_committed_later_conditions_the_same_joint_distribution(pc, said, block, generator):
    """In blocks of which some positions do not exist, too."""
    tokens, masked = block
    absent = torch.tensor([[False, False, True], [False, False, False], [False, False, False]])
    head = CoupledHead(pc, conditioners=[moved(pc, generator)])
    with torch.no_grad():
        dist = head.distribution(said, tokens, masked & ~absent, absent=absent)
        law = dist.log_prob(texts(B)).exp()
        observed = torch.tensor([[False, True, False]]).expand(B, -1)
        agrees = (texts(B)[..., 1] == tokens[:, 1]).double()
        expected = law * agrees / (law * agrees).sum(0)
        expected[:, 0] *= V  # the last position of the first block is summed out: every text stands for V of them
        found = dist.given(tokens, observed).log_prob(texts(B)).exp()
        torch.testing.assert_close(found, expected, **CLOSE)


def test_components_that_are_impossible_stay_so(pc, said, block, generator):
    tokens, masked = block
    pc.set_weights("member0.emission0", torch.eye(V, dtype=DOUBLE)[:, :2] + 0.0)
    tokens[2, 0] = 3  # the first component cannot say so
    made = moved(pc, generator, power=1.0)
    head = CoupledHead(pc, conditioners=[made])
    log_z = CoupledHead(pc)(said, tokens, masked).query(ct.queries.component_log_partition)
    assert log_z[2, 0] == -torch.inf
    total = head.conditional_log_likelihood(said, tokens, masked)
    total.sum().backward()
    assert bool(total.isfinite().all())
    assert all(bool(one.grad.isfinite().all()) for one in head.parameters() if one.grad is not None)


def test_mixture_weights_are_kept_and_ask_of_each_row_alone(pc, said, block, generator, tmp_path):
    tokens, masked = block
    potentials = LatentPotentials.for_hmm(pc, H, prefix="member0.").double()
    gates = TransitionGates.for_hmm(pc, H, prefix="member0.").double()
    torch.nn.init.normal_(potentials.linear.weight, generator=generator)
    torch.nn.init.normal_(gates.offsets, generator=generator)
    head = CoupledHead(pc, conditioners=[gates, moved(pc, generator, hidden=3), potentials])
    head.save(tmp_path / "head")
    loaded = CoupledHead.load(tmp_path / "head").double()
    assert loaded.needs_features
    with torch.no_grad():
        dist = head(said, tokens, masked)
        torch.testing.assert_close(loaded(said, tokens, masked).marginal_probs, dist.marginal_probs)
        for row in range(B):
            part = slice(row, row + 1)
            alone = head(said.rows(torch.tensor([row])), tokens[part], masked[part])
            torch.testing.assert_close(alone.log_prob(texts(1)), dist.log_prob(texts(B))[:, part])
        torch.testing.assert_close(dist.log_prob(texts(B)).exp().sum(0), torch.ones(B, dtype=DOUBLE))
    plain = CoupledHead(pc, conditioners=[MixtureWeights.for_mixture(pc)])
    plain.save(tmp_path / "plain")
    assert not CoupledHead.load(tmp_path / "plain").needs_features


def test_factors_on_the_root_of_others_count_too(pc, said, block, generator):
    """Those of two mixture weights, and of potentials on the root, add up."""
    made, other = moved(pc, generator, None), moved(pc, generator, None)
    both = MixtureWeights.for_mixture(pc, num_knots=3).double()
    with torch.no_grad():
        both.bias.copy_(made.bias + other.bias)
        both.power.copy_(made.power + other.power)
    found = CoupledHead(pc, conditioners=[made, other])(said, *block).log_prob(texts(B))
    torch.testing.assert_close(found, CoupledHead(pc, conditioners=[both])(said, *block).log_prob(texts(B)), **CLOSE)
    potentials = LatentPotentials({"members": 0}, K, H).double()
    torch.nn.init.normal_(potentials.linear.weight, generator=generator)
    one, two = (
        CoupledHead(pc, conditioners=order)(said, *block).log_prob(texts(B))
        for order in ([made, potentials], [potentials, made])
    )
    torch.testing.assert_close(one, two, **CLOSE)
    assert not torch.allclose(one, CoupledHead(pc, conditioners=[made])(said, *block).log_prob(texts(B)))


def test_a_constraint_conditions_the_same_joint_distribution(said, block, generator):
    tokens, masked = block
    pc = MixtureWeights.with_independent(ct.compile(ct.structures.hmm(L, 2, V), dtype=DOUBLE, seed=1))
    head = CoupledHead(pc, conditioners=[moved(pc, generator)])
    even = ct.queries.DeterministicAutomaton.from_table(torch.tensor([[0, 1] * 2, [1, 0] * 2]), accepting=[0])
    with torch.no_grad():
        dist = head(said, tokens, masked)
        law = dist.log_prob(texts(B)).exp() * ((texts(B) % 2).sum(-1) % 2 == 0)
        found = ConstrainedCoupledDistribution.under(dist, even).log_prob(texts(B)).exp()
        torch.testing.assert_close(found, law / law.sum(0), **CLOSE)


def test_what_does_not_fit_is_named(pc, said, block):
    head = CoupledHead(pc, conditioners=[MixtureWeights.for_mixture(pc, H).double()])
    with pytest.raises(ArgumentError, match="expected 2 features per position, got none"):
        head(Prediction(log_q=said.log_q, vocab_size=V), *block).log_prob(block[0])
    with pytest.raises(ArgumentError, match="root mixes 4 components for mixture weights, got 3"):
        CoupledHead(pc, conditioners=[MixtureWeights(4)])
    with pytest.raises(ArgumentError, match=r"pc: expected a circuit whose root is a mixture"):
        MixtureWeights.for_mixture(
            ct.compile(ct.Circuit(ct.product(*(ct.inputs(i, 1, ct.Categorical(2)) for i in range(2)))))
        )
    with pytest.raises(ArgumentError, match="share: expected a number between 0 and 1, got 1"):
        MixtureWeights.with_independent(pc, share=1)
    with pytest.raises(ArgumentError, match="share: expected a number between 0 and 1, got 'half'"):
        MixtureWeights.with_independent(pc, share="half")
    with pytest.raises(ArgumentError, match=r"calibration: expected df\.NoiseCalibration or None, got"):
        MixtureWeights.with_independent(pc, 0.5)
    with pytest.raises(ArgumentError, match="it is for 7 tokens"):
        MixtureWeights.with_independent(pc, NoiseCalibration(7))
    with pytest.raises(ArgumentError, match="num_knots: expected"):
        MixtureWeights(2, num_knots=1)
    with pytest.raises(ArgumentError, match="got 0"):
        MixtureWeights(2, 0)


# With a real denoiser, and in a world that is in the family.


@pytest.fixture(scope="module")
def denoiser():
    return small_denoiser()


@pytest.fixture(scope="module")
def windows():
    return told_windows()


@pytest.mark.parametrize("decode", ["latent", "marginal", "any_order", "joint"])
def test_every_mode_decodes_and_each_row_alone(decode, denoiser, windows, generator):
    pc = MixtureWeights.with_independent(ct.compile(ct.structures.hmm(LENGTH, 3, TOKENS), seed=0))
    made = MixtureWeights.for_mixture(pc, 16)
    prompt, seeds = windows[:3, :CONTEXT], [5, 6, 7]
    options = {"gen_length": LENGTH, "block_length": LENGTH, "num_steps": 2, "temperature": 1.0, "decode": decode}

    def decoded(head, rows=slice(None), **more):
        return generate(denoiser, prompt[rows], head=head, seeds=seeds[rows], **options, **more).tokens

    plain, head = CoupledHead(pc), CoupledHead(pc, conditioners=[made])
    assert torch.equal(decoded(head), decoded(plain))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    assert torch.equal(decoded(head), torch.cat([decoded(head, slice(i, i + 1)) for i in range(3)]))
    is_odd = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 0])
    even = ct.queries.DeterministicAutomaton.from_table(torch.stack([is_odd, 1 - is_odd]), accepting=[0])
    texts = decoded(head, constraint=constraints.automaton(even))[:, CONTEXT:]
    assert (is_odd[texts].sum(1) % 2 == 0).all()


def test_a_head_with_an_independent_component_is_no_worse_than_the_plain_prediction(denoiser, windows, tmp_path):
    """The circuit knows other texts, and hurts; what is fitted leaves it alone."""
    cache = cache_logits(denoiser, windows, tmp_path, block_length=LENGTH, features=True, progress=False)
    emission = torch.full((1, TOKENS), 0.001)
    emission[0, 5] = 0.992  # sure of what is seldom true
    chain = ct.compile(ct.structures.hmm(LENGTH, 1, TOKENS, emission=emission), seed=0)
    uniform = ct.compile(ct.structures.hmm(LENGTH, 1, TOKENS, emission=torch.full((1, TOKENS), 1 / TOKENS)))
    mixture = MixtureWeights.with_independent(chain)
    gate = MixtureWeights.for_mixture(mixture, power=1.0)
    head = CoupledHead(mixture, conditioners=[gate])
    mixture.requires_grad_(False)
    one_step, alone = (coupled_loss(CoupledHead(pc), cache) for pc in (uniform, chain))
    assert alone > one_step + 1
    fit_coupled(head, cache, config=CircuitTraining(steps=150, batch_size=60, learning_rate=0.3), progress=False)
    assert coupled_loss(head, cache) < one_step + 0.01


def test_training_recovers_a_mixture_that_the_context_gates():
    """Texts of one of two Markov chains on two words; the context, which the denoiser has seen, tells how probably."""
    length = 3
    blocks = torch.cartesian_prod(*[torch.arange(2)] * length)
    emission = torch.eye(2, 3, dtype=DOUBLE)
    tables = [torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([[0.2, 0.8], [0.8, 0.2]])]
    start = torch.tensor([0.6, 0.4], dtype=DOUBLE)
    parts = [ct.structures.hmm(length, 2, 3, emission=emission, initial=start, transition=t.to(DOUBLE)) for t in tables]
    pc = ct.compile(ct.structures.mixture_of(parts), dtype=DOUBLE)
    pc.requires_grad_(False)
    gates = torch.tensor([[0.95, 0.05], [0.3, 0.7]], dtype=DOUBLE)
    law = torch.stack([member(pc, k)(blocks).exp() for k in range(2)], 1) @ gates.T  # (2 ** L, 2 contexts)
    first = torch.arange(2).repeat_interleave(2**length).unsqueeze(1)
    world = World(torch.cat([first, blocks.repeat(2, 1)], 1), law.T.flatten() / 2)
    posteriors = [world.posterior(torch.tensor([word, *world.blank[1:].tolist()])) for word in range(2)]
    target = torch.stack([posterior.unflatten(0, (2, -1))[word] for word, posterior in enumerate(posteriors)], 1)
    head = CoupledHead(pc, conditioners=[MixtureWeights.for_mixture(pc, 2, num_knots=2).double()])
    blank = world.blank.expand(2, -1)
    masked = torch.ones(2, length, dtype=torch.bool)
    logits = world.uniform_denoiser().logits(blank)[:, 1:].double()
    logits[..., world.mask_id] = -torch.inf
    said = Prediction.from_logits(
        logits, masked, features=torch.eye(2, dtype=DOUBLE).unsqueeze(1).expand(-1, length, -1)
    )

    def log_law():
        return head(said, blank[:, 1:], masked).log_prob(blocks.unsqueeze(1).expand(-1, 2, -1))

    def distance():
        return float((log_law().exp() - target).abs().sum(0).max().detach() / 2)

    assert distance() > 0.05
    parameters = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -(target * log_law()).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert distance() < 1e-6
