"""Conditioners: a changed prediction, factors on latents, weights at run time; learnt with the head, kept with it."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from contextual_cases import CONTEXT, LENGTH, TOKENS, small_denoiser, told_windows
from hmm_cases import L, N, V, hmm, joint, joints, tables, texts
from safetensors import safe_open
from torch import nn

import circuits as ct
from circuits.files import write_tensors
from circuits.store import write_manifest
from diffusion import (
    CircuitTraining,
    Conditioned,
    Conditioner,
    CoupledHead,
    LatentPotentials,
    LowRankTransitions,
    NoiseCalibration,
    Prediction,
    TransitionGates,
    cache_logits,
    constraints,
    evaluation,
    fit_coupled,
    generate,
)
from diffusion.conditioners import register
from diffusion.conditioners.base import conditioner_class
from diffusion.decoding.constraints.coupled import ConstrainedCoupledDistribution
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.head import FORMAT
from diffusion.testing.worlds import World
from diffusion.training.circuit import coupled_loss

B, H = 3, 2


@pytest.fixture
def pc():
    return hmm()


@pytest.fixture
def said(generator):
    logits = torch.randn(B, L, V, dtype=torch.float64, generator=generator)
    features = torch.randn(B, L, H, generator=generator)
    return Prediction.from_logits(logits, features=features)


@pytest.fixture
def block(generator):
    masked = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    return torch.randint(V, (B, L), generator=generator), masked


@pytest.fixture
def potentials(pc, generator):
    made = LatentPotentials.for_hmm(pc, H)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def test_new_potentials_are_the_plain_product(pc, said, block):
    plain, conditioned = CoupledHead(pc), CoupledHead(pc, conditioners=[LatentPotentials.for_hmm(pc, H)])
    torch.testing.assert_close(conditioned(said, *block).marginal_probs, plain(said, *block).marginal_probs)


@pytest.mark.parametrize("normalization", ["global", "local"])
def test_potentials_multiply_the_states_of_every_step(normalization, pc, said, block, potentials):
    """By enumeration of texts and states, with exp(A h + a r + c) per state computed by numpy."""
    tokens, masked = block
    weight, bias = potentials.linear.weight.detach().numpy(), potentials.linear.bias.detach().numpy()
    ratio = masked.numpy().mean(1)[:, None, None]
    factors = np.exp(said.features.numpy() @ weight[:, :H].T + ratio * weight[:, H] + bias)
    law = joints(pc, said.log_q.exp().numpy(), tokens, masked, normalization, factors).sum(-1)
    head = CoupledHead(pc, normalization=normalization, conditioners=[potentials])
    dist = head.distribution(said, tokens, masked)
    np.testing.assert_allclose(dist.log_prob(texts(B)).exp().T.detach(), law, rtol=1e-4, atol=1e-9)


def test_the_gradient_reaches_potentials_and_calibration(pc, said, block):
    tokens, masked = block
    made = [LatentPotentials.for_hmm(pc, H).double(), NoiseCalibration(V, 2).double()]
    head = CoupledHead(pc, conditioners=made)

    def loss():
        return head.conditional_log_likelihood(said, tokens, masked).sum()

    for parameter in (made[0].linear.weight, made[0].linear.bias, made[1].log_scale, made[1].bias):
        (grad,) = torch.autograd.grad(loss(), [parameter])
        assert grad.abs().max() > 0
        index = tuple(0 for _ in parameter.shape)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[index] += step
                values.append(loss())
                parameter[index] -= step
        torch.testing.assert_close(grad[index], (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-8)


def test_conditioners_are_applied_in_order_and_their_factors_add_up(pc, said, block, potentials):
    tokens, masked = block
    twice = CoupledHead(pc, conditioners=[potentials, potentials])
    doubled = LatentPotentials(**potentials.settings())
    doubled.load_state_dict({name: 2 * tensor for name, tensor in potentials.state_dict().items()})
    once = CoupledHead(pc, conditioners=[doubled])
    torch.testing.assert_close(twice(said, *block).marginal_probs, once(said, *block).marginal_probs)
    calibration = NoiseCalibration(V, 2)
    with torch.no_grad():
        calibration.log_scale.fill_(0.7)
    sharper = replace(said, log_q=said.log_q * 2.0 ** (0.7 / np.log(2)))
    found = CoupledHead(pc, calibration=calibration, conditioners=[potentials]).distribution(said, tokens, masked)
    expected = CoupledHead(pc, conditioners=[potentials]).distribution(sharper, tokens, masked)
    torch.testing.assert_close(found.marginal_probs, expected.marginal_probs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [None, 2])
def test_potentials_on_groups_of_states_are_those_of_the_dense_chain(rank, said, block, generator, tmp_path):
    follows, sizes = torch.tensor([[True, True, False], [False, True, True], [True, False, True]]), [1, 2, 1]
    sparse = ct.compile(ct.structures.block_sparse_hmm(L, sizes, V, follows, rank=rank), dtype=torch.float64, seed=0)
    table = torch.zeros(4, 4, dtype=torch.float64)
    starts = [0, 1, 3, 4]
    for g, group in enumerate(range(3)):
        own = sparse.log_weights(f"transition0_{g}").exp().detach()
        rows, at = slice(starts[group], starts[group + 1]), 0
        for h in torch.nonzero(follows[g]).flatten().tolist():
            table[rows, starts[h] : starts[h + 1]] += own[:, at : at + sizes[h]]
            at += sizes[h]
        if rank is not None:
            table[rows] += own[:, at:] @ sparse.log_weights("factor0").exp().detach()
    emission = torch.cat([sparse.log_weights(f"emission0_{g}").exp().detach().T for g in range(3)])
    initial = sparse.log_weights("initial").exp().detach()[0]
    dense = ct.compile(
        ct.structures.hmm(L, 4, V, initial=initial, transition=table, emission=emission), dtype=torch.float64
    )
    expected = moved(LatentPotentials.for_hmm(dense, H, hidden=3).double(), generator)
    made = LatentPotentials.for_block_sparse_hmm(sparse, H, hidden=3).double()
    made.load_state_dict(expected.state_dict())
    head = CoupledHead(sparse, conditioners=[made])
    head.save(tmp_path / "head")
    law = CoupledHead(dense, conditioners=[expected])(said, *block).log_prob(texts(B))
    for one in (head, CoupledHead.load(tmp_path / "head").double()):
        torch.testing.assert_close(one(said, *block).log_prob(texts(B)), law, rtol=1e-6, atol=1e-9)
    with pytest.raises(ArgumentError, match="units: expected states from -1 to 3 of nodes that have a position"):
        LatentPotentials({"initial": 0}, 4, H, units={"initial": [0, 1, 4, 2]})


def test_potentials_on_pairs_of_states_are_those_of_the_dense_chain(said, block, generator):
    pairs = ct.compile(ct.structures.monarch_hmm(L, (2, 3), V), dtype=torch.float64, seed=0)
    right = torch.stack([pairs.parameters_of(f"transition0_{a}") for a in range(2)])
    left = torch.stack([pairs.parameters_of(f"factor0_{b}") for b in range(3)])
    dense = ct.structures.hmm(
        L,
        6,
        V,
        initial=pairs.parameters_of("initial")[0],
        transition=torch.einsum("abd,dac->abcd", right, left).reshape(6, 6),
        emission=torch.cat([pairs.parameters_of(f"emission0_{a}").T for a in range(2)]),
    )
    dense = ct.compile(dense, dtype=torch.float64)
    expected = moved(LatentPotentials.for_hmm(dense, H).double(), generator)
    made = LatentPotentials.for_block_sparse_hmm(pairs, H).double()
    made.load_state_dict(expected.state_dict())
    found = CoupledHead(pairs, conditioners=[made])(said, *block).log_prob(texts(B))
    law = CoupledHead(dense, conditioners=[expected])(said, *block).log_prob(texts(B))
    torch.testing.assert_close(found, law, rtol=1e-6, atol=1e-9)
    for kind in (TransitionGates, LatentPotentials):
        with pytest.raises(ArgumentError, match=r"pc: expected a circuit of ct.structures.hmm, got one without its"):
            kind.for_hmm(pairs, H)


def test_potentials_on_a_tree_read_the_positions_that_its_hidden_variables_emit(said, block, generator):
    """By enumeration of the states of the two hidden variables of the tree 0 - 1 - 2, of which 2 is a leaf."""
    edges = [(0, 1), (1, 2), (1, 3), (3, 4)]
    circuit = ct.structures.latent_tree(edges, N, V, root=1)
    wide = ct.compile(ct.structures.mixture_of([circuit, ct.structures.fully_factorized(5, V)]), dtype=torch.float64)
    made = LatentPotentials.for_tree(wide, H, prefix="member0.")
    assert made.positions == {"member0.root": 1, "member0.transition3": 3}
    assert LatentPotentials.for_tree(ct.compile(circuit), H).positions == {"root": 1, "transition3": 3}
    pc = ct.compile(ct.structures.latent_tree([(0, 1), (1, 2)], N, V, root=0), dtype=torch.float64, seed=0)
    potentials = moved(LatentPotentials.for_tree(pc, H).double(), generator)
    assert potentials.positions == {"root": 0, "transition1": 1}
    tokens, masked = block
    weight, bias = potentials.linear.weight.detach(), potentials.linear.bias.detach()
    ratio = masked.double().mean(1, keepdim=True)
    factors = [said.features[:, i].double() @ weight[:, :H].T + ratio * weight[:, H] + bias for i in (0, 1)]
    root, step = pc.log_weights("root").exp()[0], pc.log_weights("transition1").exp()
    emit = [pc.log_weights(f"emission{i}").exp() for i in range(L)]
    law = torch.zeros(B, V**L, dtype=torch.float64)
    x = texts(B)[:, 0]
    for z, y in itertools.product(range(N), repeat=2):
        p = root[z] * step[z, y] * emit[0][x[:, 0], z] * emit[1][x[:, 1], y] * emit[2][x[:, 2], y]
        law += (factors[0][:, z] + factors[1][:, y]).exp().unsqueeze(1) * p
    q = (said.log_q.exp().gather(2, texts(B).permute(1, 2, 0))).masked_fill(~masked.unsqueeze(-1), 1.0).prod(1)
    law = law * q * ((texts(B) == tokens) | masked).all(-1).T
    found = CoupledHead(pc, conditioners=[potentials])(said, tokens, masked).log_prob(texts(B)).exp().T
    torch.testing.assert_close(found, law / law.sum(1, keepdim=True), rtol=1e-6, atol=1e-12)


@register("test_transitions")
class Transitions(Conditioner):
    """Weights at run time: the transition of the first step becomes softmax(a r) in every row, r the mask ratio."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([slope, 0.0]))

    def condition(self, prediction, masked):
        row = torch.log_softmax(self.slope * masked.to(self.slope).mean(-1, keepdim=True), -1)
        return Conditioned(prediction, weights={"transition0": row.unsqueeze(1).expand(-1, N, -1)})

    def settings(self):
        return {}


def test_a_conditioner_of_ones_own_gives_weights_at_run_time(pc, said, block, tmp_path):
    tokens, masked = block
    head = CoupledHead(pc, top_k=V, conditioners=[Transitions(2.0)])
    head.save(tmp_path / "head")
    for dist in (head(said, tokens, masked), CoupledHead.load(tmp_path / "head")(said, tokens, masked)):
        found = dist.log_prob(texts(B)).exp().T.detach()
        for b in range(B):
            row = torch.softmax(torch.tensor([2.0, 0.0], dtype=torch.float64) * masked[b].double().mean(), 0)
            pc.set_weights(pc.sum_node("transition0"), row.expand(N, -1))
            law = joints(pc, said.log_q.exp().numpy(), tokens, masked, "global").sum(-1)
            np.testing.assert_allclose(found[b], law[b], rtol=1e-6, atol=1e-9)
    with pytest.raises(ArgumentError, match="two of them give weights to 'transition0'"):
        CoupledHead(pc, conditioners=[Transitions(), Transitions()])(said, tokens, masked)


def test_a_loaded_head_has_the_conditioners_of_the_saved_one(pc, said, block, potentials, tmp_path):
    calibration = NoiseCalibration(V, 3)
    nn.init.normal_(calibration.bias)
    head = CoupledHead(pc, normalization="local", conditioners=[potentials, calibration])
    head.save(tmp_path / "head")
    loaded = CoupledHead.load(tmp_path / "head")
    assert [type(made) for made in loaded.conditioners] == [LatentPotentials, NoiseCalibration]
    assert loaded.needs_features
    assert loaded.calibration is not None
    assert torch.equal(loaded(said, *block).marginal_probs, head(said, *block).marginal_probs)


def test_what_does_not_fit_is_named(pc, said, block, potentials, tmp_path):
    tokens, masked = block
    head = CoupledHead(pc, conditioners=[potentials])

    class Unregistered(Transitions):
        name = ""

    with pytest.raises(ArgumentError, match="expected 2 features per position, got none; ask with features=True"):
        head.distribution(replace(said, features=None), tokens, masked)
    with pytest.raises(ArgumentError, match="expected 2 features per position, got 3"):
        head.distribution(replace(said, features=torch.zeros(B, L, 3)), tokens, masked)
    with pytest.raises(ArgumentError, match="the potentials of 'initial' are for 5 units at position 0"):
        CoupledHead(pc, conditioners=[LatentPotentials({"initial": 0}, 5, H)])
    with pytest.raises(ArgumentError, match="got 'elsewhere'"):
        CoupledHead(pc, conditioners=[LatentPotentials({"elsewhere": 0}, N, H)])
    with pytest.raises(ArgumentError, match=r"conditioners: expected df\.Conditioner modules, got Linear"):
        CoupledHead(pc, conditioners=[nn.Linear(2, 2)])
    with pytest.raises(ArgumentError, match="positions: expected positions by the name"):
        LatentPotentials({}, N, H)
    with pytest.raises(ArgumentError, match="names Transitions already"):
        register("test_transitions")(Unregistered)
    with pytest.raises(ArgumentError, match="name: expected one of"):
        conditioner_class("unheard of")
    with pytest.raises(ArgumentError, match="name: expected one of"):
        CoupledHead(pc, conditioners=[Unregistered()]).save(tmp_path / "head")


def test_a_file_with_a_conditioner_that_nobody_registered_is_refused(pc, said, tmp_path):
    @register("test_forgotten")
    class Forgotten(Transitions):
        pass

    CoupledHead(pc, conditioners=[Forgotten()]).save(tmp_path / "head")
    from diffusion.conditioners import base

    del base._registry["test_forgotten"]
    with pytest.raises(CheckpointError, match=r"test_forgotten.*import the module that registers it"):
        CoupledHead.load(tmp_path / "head")


def with_conditioners(head, folder, change):
    """Save a head, its conditioners' description changed and all hashes made again."""
    head.save(folder)
    path = folder / "head.safetensors"
    with safe_open(path, "pt") as file:
        texts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    records = json.loads(texts["conditioners"])
    records = change(records) or records
    write_tensors(path, tensors, format=FORMAT, version=3, metadata=texts | {"conditioners": json.dumps(records)})
    (folder / "manifest.json").unlink()
    write_manifest(folder, format=FORMAT, version=3)


def setting(index, **values):
    return lambda records: records[index]["settings"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(0, num_knots="5"), r"conditioners\[0\]: noise_calibration: settings: num_knots: expected an integer"),
        (setting(0, num_knots=1), r"conditioners\[0\]: noise_calibration: num_knots: expected an integer >= 2, got 1"),
        (setting(0, num_knots=True), "num_knots: expected an integer from .*, got True"),
        (
            setting(0, num_tokens=10**12),
            r"tensor 0\.bias: expected \(5, 1000000000000\), as the settings say, got \(5, ",
        ),
        (setting(0, num_tokens=10**40), "num_tokens: expected an integer from .*, got a number beyond 64 bits"),
        (setting(0, surprise=1), "settings: keys: expected no others, got 'surprise'"),
        (
            setting(1, positions=[1, 2]),
            r"latent_potentials: settings: positions: expected an object with keys, got a list",
        ),
        (setting(1, positions={"initial": [0]}), r"settings: positions\['initial'\]: expected an integer"),
        (setting(1, positions={"initial": -1}), r"conditioners\[1\]: latent_potentials: positions"),
        (setting(1, num_features=None), "num_features: expected an integer"),
        (setting(1, hidden=10**9, seed=0), "tensor 1.*, as the settings say"),
        (
            lambda records: records[1]["settings"].pop("num_units") and None,
            "settings: keys: expected num_units, got none",
        ),
        (lambda records: records[1].update(settings=7), "settings: expected an object with keys, got 7"),
        (lambda records: records[1].update(name=["x"]), r"conditioners\[1\]: name: expected str, got a list"),
        (lambda records: [7], r"conditioners\[0\]: expected an object with keys, got 7"),
        (lambda records: {"a": 1}, "conditioners: expected a list, got a dict"),
        (lambda records: records[:1], r"conditioners: tensor 1\..*: expected none, as the settings say, got"),
    ],
)
def test_settings_of_conditioners_in_a_file_are_of_their_types_and_sizes(change, message, pc, potentials, tmp_path):
    head = CoupledHead(pc, conditioners=[NoiseCalibration(V), potentials])
    with_conditioners(head, tmp_path / "head", lambda records: None)
    assert [type(one) for one in CoupledHead.load(tmp_path / "head").conditioners] == [
        NoiseCalibration,
        LatentPotentials,
    ]
    with_conditioners(head, tmp_path / "head", change)
    with pytest.raises(CheckpointError, match=rf"head\.safetensors: .*{message}.*; save the head again"):
        CoupledHead.load(tmp_path / "head")


def test_a_conditioner_without_types_is_built_of_what_it_said(pc, tmp_path):
    @register("test_untyped")
    class Untyped(Transitions):
        def __init__(self, anything, **others):
            super().__init__()
            self.said = {"anything": anything, **others}

        def settings(self):
            return self.said

    said = {"anything": [1, {"a": "b"}], "more": None}
    CoupledHead(pc, conditioners=[Untyped(**said)]).save(tmp_path / "head")
    (loaded,) = CoupledHead.load(tmp_path / "head").conditioners
    assert loaded.settings() == said


# With a real denoiser: features beside the logits, cached, trained on, decoded with.


@pytest.fixture(scope="module")
def denoiser():
    return small_denoiser()


@pytest.fixture(scope="module")
def windows():
    return told_windows()


def test_features_are_what_the_logits_are_read_from(denoiser, windows):
    with torch.no_grad():
        logits, features = denoiser.logits_and_features(windows, window=(CONTEXT, CONTEXT + LENGTH))
        assert torch.equal(logits, denoiser.logits(windows, window=(CONTEXT, CONTEXT + LENGTH)))
    expected = features @ denoiser.embedding.weight.T + denoiser.output_bias
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 3])
def test_potentials_are_trained_on_a_cache_with_features(top_k, denoiser, windows, tmp_path):
    options = {"block_length": LENGTH, "batch_size": 16, "progress": False, "top_k": top_k}
    plain = cache_logits(denoiser, windows, tmp_path / "plain", **options)
    cache = cache_logits(denoiser, windows, tmp_path / "cache", features=True, **options)
    assert plain.features is None
    batch = cache.batch(slice(None))
    assert torch.equal(batch.log_q, plain.batch(slice(None)).log_q)
    canvas = windows.clone()
    canvas[:, CONTEXT:] = canvas[:, CONTEXT:].masked_fill(batch.masked, 8)
    said = Prediction.ask(denoiser, canvas, window=(CONTEXT, CONTEXT + LENGTH), features=True)
    torch.testing.assert_close(batch.features, said.features, rtol=2e-3, atol=2e-3)  # float16

    def head(*conditioners):
        return CoupledHead(ct.compile(ct.structures.hmm(LENGTH, 6, TOKENS), seed=0), conditioners=conditioners)

    without, conditioned = head(), head(LatentPotentials.for_hmm(head().pc, 16))
    assert coupled_loss(without, cache) == pytest.approx(coupled_loss(conditioned, cache), rel=1e-5)
    config = CircuitTraining(steps=80, batch_size=60, learning_rate=0.05, feature_learning_rate=0.05)
    for one in (without, conditioned):
        fit_coupled(one, cache, config=config, progress=False)
    assert coupled_loss(conditioned, cache) < coupled_loss(without, cache) - 0.05
    with pytest.raises(ArgumentError, match=r"cache_logits\(\.\.\., features=True\)"):
        coupled_loss(conditioned, plain)


def test_conditioners_that_read_features_have_a_learning_rate_of_their_own(denoiser, windows, tmp_path):
    cache = cache_logits(denoiser, windows, tmp_path, block_length=LENGTH, features=True, progress=False)
    pc = ct.compile(ct.structures.hmm(LENGTH, 6, TOKENS), seed=0)
    calibration, potentials = NoiseCalibration(TOKENS), LatentPotentials.for_hmm(pc, 16)
    head = CoupledHead(pc, conditioners=[calibration, potentials])
    config = CircuitTraining(steps=1, batch_size=60, learning_rate=0.05, feature_learning_rate=0.002)
    fit_coupled(head, cache, config=config, progress=False)
    # Adam's first update moves every parameter by its learning rate, whatever the gradient's size
    assert potentials.linear.weight.abs().max().item() == pytest.approx(0.002, rel=1e-3)
    assert calibration.bias.abs().max().item() == pytest.approx(0.05, rel=1e-3)


def test_features_are_asked_for_wherever_a_head_needs_them(denoiser, windows):
    pc = ct.compile(ct.structures.hmm(LENGTH, 3, TOKENS), seed=0)
    made = LatentPotentials.for_hmm(pc, 16)
    head = CoupledHead(pc, conditioners=[made])
    plain = CoupledHead(pc)
    options = {"gen_length": 8, "block_length": LENGTH, "num_steps": 4, "temperature": 0.0, "decode": "marginal"}
    prompt = windows[:4, :CONTEXT]
    assert torch.equal(
        generate(denoiser, prompt, head=head, **options).tokens,
        generate(denoiser, prompt, head=plain, **options).tokens,
    )
    with torch.no_grad():
        made.linear.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    assert not torch.equal(
        generate(denoiser, prompt, head=head, **options).tokens,
        generate(denoiser, prompt, head=plain, **options).tokens,
    )
    rows = [
        evaluation.misspecification_gap(denoiser, one, windows, mask_ratios=(1.0,)).rows[0] for one in (head, plain)
    ]
    assert rows[0].one_step == rows[1].one_step
    assert rows[0].coupled != rows[1].coupled


@pytest.mark.parametrize("decode", ["latent", "marginal", "any_order", "joint"])
def test_every_mode_decodes_with_contextual_transitions_and_each_row_alone(decode, denoiser, windows, generator):
    pc = ct.compile(ct.structures.hmm(LENGTH, 3, TOKENS), seed=0)
    made = [TransitionGates.for_hmm(pc, 16), LatentPotentials.for_hmm(pc, 16, hidden=4)]
    prompt, seeds = windows[:3, :CONTEXT], [5, 6, 7]
    options = {"gen_length": LENGTH, "block_length": LENGTH, "num_steps": 2, "temperature": 1.0, "decode": decode}

    def decoded(head, rows=slice(None), **more):
        return generate(denoiser, prompt[rows], head=head, seeds=seeds[rows], **options, **more).tokens

    plain, head = CoupledHead(pc), CoupledHead(pc, conditioners=made)
    assert torch.equal(decoded(head), decoded(plain))
    for conditioner in made:
        moved(conditioner, generator)
    assert torch.equal(decoded(head), torch.cat([decoded(head, slice(i, i + 1)) for i in range(3)]))
    assert not torch.equal(decoded(head), decoded(plain))
    is_odd = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 0])
    even = ct.queries.DeterministicAutomaton.from_table(torch.stack([is_odd, 1 - is_odd]), accepting=[0])
    texts = decoded(head, constraint=constraints.automaton(even))[:, CONTEXT:]
    assert (is_odd[texts].sum(1) % 2 == 0).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_conditioners_compute_in_their_own_precision_under_autocast(half, potentials, said, block):
    pc = ct.compile(hmm().circuit, seed=0)  # float32: what autocast would turn into half precision
    head = CoupledHead(pc, conditioners=[NoiseCalibration(V), potentials.float()])
    prediction = replace(said, log_q=said.log_q.float())
    expected = head.conditional_log_likelihood(prediction, *block)
    with torch.autocast("cpu", dtype=half):
        found = head.conditional_log_likelihood(prediction, *block)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# Contextual transitions.


def gates_for(pc, **options):
    return TransitionGates.for_hmm(pc, H, **options).double()


def low_rank_for(pc, **options):
    return LowRankTransitions.for_hmm(pc, H, **options).double()


def potentials_for(pc, **options):
    return LatentPotentials.for_hmm(pc, H, **options).double()


CONTEXTUAL = {
    "potentials": potentials_for,
    "deep potentials": lambda pc: potentials_for(pc, hidden=5),
    "gates": gates_for,
    "deep gates": lambda pc: gates_for(pc, hidden=5, num_tables=3),
    "one table": lambda pc: gates_for(pc, num_tables=1),
    "low rank": low_rank_for,
    "deep low rank": lambda pc: low_rank_for(pc, hidden=5, rank=1),
}


def moved(conditioner, generator):
    """The same conditioner after some training, so to say."""
    with torch.no_grad():
        for parameter in conditioner.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return conditioner


@pytest.mark.parametrize("normalization", ["global", "local"])
@pytest.mark.parametrize("name", CONTEXTUAL)
@pytest.mark.parametrize("homogeneous", [True, False])
def test_before_training_a_contextual_head_is_the_static_one_to_the_last_bit(
    homogeneous, name, normalization, said, block
):
    pc = ct.compile(ct.structures.hmm(L, N, V, homogeneous), dtype=torch.float64, seed=0)
    static = CoupledHead(pc, normalization=normalization)
    head = CoupledHead(pc, normalization=normalization, conditioners=[CONTEXTUAL[name](pc)])
    for ask in (lambda d: d.log_prob(texts(B)), lambda d: d.log_partition):
        with torch.no_grad():
            assert torch.equal(ask(head(said, *block)), ask(static(said, *block)))
        torch.testing.assert_close(ask(head(said, *block)), ask(static(said, *block)))


@pytest.mark.parametrize("name", sorted(set(CONTEXTUAL) - {"one table"}))
def test_training_can_begin(name, pc, said, block):
    """The gradient of a new conditioner is not 0."""
    conditioner = CONTEXTUAL[name](pc)
    CoupledHead(pc, conditioners=[conditioner]).conditional_log_likelihood(said, *block).sum().backward()
    assert max(float(p.grad.abs().max()) for p in conditioner.parameters() if p.grad is not None) > 1e-4


def contextual_transitions(conditioner, pc, features, masked):
    """The transitions of every block by numpy, (B, L - 1, N, N), from the formulas of the modules' texts."""
    own = tables(pc)[1]
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in [conditioner.network]]
    found = np.zeros((B, *own.shape))
    for b, t in itertools.product(range(B), range(L - 1)):
        context = np.concatenate([features[b, t], features[b, t + 1], [masked[b].mean(), t / (L - 1)]])
        ((weight, bias),) = layers
        out = weight @ context + bias
        if isinstance(conditioner, TransitionGates):
            offsets = np.concatenate([np.zeros((1, N, N)), conditioner.offsets.detach().numpy()])
            ways = own[t] * np.exp(offsets)
            gates = np.exp(out) / np.exp(out).sum()
            found[b, t] = np.einsum("t,tki->ki", gates, ways / ways.sum(-1, keepdims=True))
        else:
            v = np.exp(conditioner.log_v.detach().numpy())
            more = own[t] + N * v / v.sum(0) @ np.maximum(out, 0).reshape(N, -1).T
            found[b, t] = more / more.sum(-1, keepdims=True)
    return found


@pytest.mark.parametrize("name", ["gates", "low rank"])
def test_transitions_are_those_of_the_formula(name, pc, said, block, generator):
    tokens, masked = block
    conditioner = moved(CONTEXTUAL[name](pc), generator)
    transitions = contextual_transitions(conditioner, pc, said.features.double().numpy(), masked.numpy())
    initial, _, emissions = tables(pc)
    dist = CoupledHead(pc, conditioners=[conditioner]).distribution(said, tokens, masked)
    found = dist.log_prob(texts(B)).exp().T.detach().numpy()
    for b in range(B):
        of_block = initial, transitions[b], emissions
        law = joint(of_block, said.log_q[b].exp().numpy(), tokens[b].tolist(), masked[b].tolist(), "global").sum(-1)
        np.testing.assert_allclose(found[b], law / law.sum(), rtol=1e-6, atol=1e-12)


def all_contextual(pc, generator):
    made = [moved(potentials_for(pc, hidden=3), generator), moved(gates_for(pc), generator), NoiseCalibration(V, 2)]
    nn.init.normal_(made[2].double().bias, generator=generator)
    return made


@pytest.mark.parametrize("transitions", ["gates", "low rank"])
def test_contextual_heads_are_kept_and_ask_of_each_row_alone(transitions, pc, said, block, generator, tmp_path):
    tokens, masked = block
    made = all_contextual(pc, generator)
    if transitions == "low rank":
        made[1] = moved(low_rank_for(pc, rank=2), generator)
    head = CoupledHead(pc, conditioners=made)
    head.save(tmp_path / "head")
    loaded = CoupledHead.load(tmp_path / "head").double()
    with torch.no_grad():
        dist = head(said, tokens, masked)
        found = loaded(said, tokens, masked)
        torch.testing.assert_close(found.marginal_probs, dist.marginal_probs, rtol=1e-6, atol=1e-8)
        for row in range(B):
            part = slice(row, row + 1)
            alone = head(said.rows(torch.tensor([row])), tokens[part], masked[part])
            torch.testing.assert_close(alone.log_prob(texts(1)), dist.log_prob(texts(B))[:, part])
            torch.testing.assert_close(alone.mode, dist.mode[part])
        law = dist.log_prob(texts(B)).exp()
        torch.testing.assert_close(law.sum(0), torch.ones(B, dtype=torch.float64))
        one_hot = torch.nn.functional.one_hot(texts(B), V).double()  # (V ** L, B, L, V)
        torch.testing.assert_close(dist.marginal_probs, (law[..., None, None] * one_hot).sum(0))


@pytest.mark.parametrize("normalization", ["global", "local"])
def test_constraints_and_latents_work_with_contextual_heads(normalization, pc, said, block, generator):
    tokens, masked = block
    head = CoupledHead(pc, normalization=normalization, conditioners=all_contextual(pc, generator))
    even = ct.queries.DeterministicAutomaton.from_table(torch.tensor([[0, 1] * 2, [1, 0] * 2]), accepting=[0])
    with torch.no_grad():
        dist = head(said, tokens, masked)
        constrained = ConstrainedCoupledDistribution.under(dist, even)
        accepted = (texts(B) % 2).sum(-1) % 2 == 0
        law = dist.log_prob(texts(B)).exp() * accepted
        torch.testing.assert_close(constrained.log_prob(texts(B)).exp(), law / law.sum(0))
        latents = dist.given_latents(generator=ct.RowGenerators(torch.arange(B)))
        assert latents.log_q.shape == (B, L, V)
        posterior = dist.posterior()
        torch.testing.assert_close(posterior.log_q.exp()[masked], dist.marginal_probs[masked])
        assert dist.draw(0.5, ct.RowGenerators(torch.arange(B))).shape == (B, L)


def test_conditioners_name_nodes_of_any_circuit(generator):
    """A tree of three variables, and a mixture of two chains whose weights depend on the context."""
    leaves = [ct.inputs(var, N, ct.Categorical(V)) for var in range(L)]
    left, right = (ct.sum(leaf, num_units=N, name=name) for leaf, name in ((leaves[0], "left"), (leaves[2], "right")))
    tree = ct.compile(ct.Circuit(ct.sum(ct.product(left, leaves[1], right), num_units=1)), dtype=torch.float64, seed=0)
    said = Prediction.from_logits(
        torch.randn(B, L, V, dtype=torch.float64, generator=generator), features=torch.randn(B, L, H)
    )
    tokens, masked = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    places = {"left": [1, 0], "right": [1, 2]}
    for made in (TransitionGates(places, (N, N), H), LowRankTransitions(places, (N, N), H, rank=1)):
        head = CoupledHead(tree, conditioners=[moved(made.double(), generator)])
        total = head(said, tokens, masked).log_prob(texts(B)).exp().sum(0).detach()
        torch.testing.assert_close(total, torch.ones(B, dtype=torch.float64))
    chains = [ct.structures.hmm(L, N, V).with_prefix(prefix) for prefix in ("a.", "b.")]
    mixture = ct.compile(ct.Circuit(ct.sum(*(c.root for c in chains), num_units=1, name="which")), dtype=torch.float64)
    which = LatentPotentials({"which": 1}, 2, H).double()
    first = TransitionGates({f"a.transition{t}": [t, t + 1] for t in range(L - 1)}, (N, N), H).double()
    head = CoupledHead(mixture, conditioners=[moved(which, generator), moved(first, generator)])
    total = head(said, tokens, masked).log_prob(texts(B)).exp().sum(0).detach()
    torch.testing.assert_close(total, torch.ones(B, dtype=torch.float64))


def test_what_does_not_fit_contextual_transitions_is_named(pc, said, block):
    with pytest.raises(ArgumentError, match=r"'transition0' has a table \(3, 3\).*got \(2, 2\)"):
        CoupledHead(pc, conditioners=[TransitionGates({"transition0": [0, 1]}, (3, 3), H)])
    with pytest.raises(ArgumentError, match="got 'elsewhere'"):
        CoupledHead(pc, conditioners=[LowRankTransitions({"elsewhere": [0]}, (N, N), H)])
    with pytest.raises(ArgumentError, match="as many positions"):
        TransitionGates({"transition0": [0, 1], "transition1": [1]}, (N, N), H)
    with pytest.raises(ArgumentError, match="positions: expected positions by the name of a sum node"):
        TransitionGates({}, (N, N), H)
    with pytest.raises(ArgumentError, match="rank: expected an integer"):
        low_rank_for(pc, rank=0)
    with pytest.raises(ArgumentError, match="expected 2 features per position, got none"):
        CoupledHead(pc, conditioners=[gates_for(pc)])(replace(said, features=None), *block)
    with pytest.raises(ArgumentError, match="two of them give weights to 'transition0'"):
        CoupledHead(pc, conditioners=[gates_for(pc), low_rank_for(pc)])(said, *block)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TransitionGates(3, (N, N), H), "positions: expected positions by the name of a sum node, got 3"),
        (lambda: TransitionGates({"transition0": 1}, (N, N), H), "positions: expected lists of positions by name"),
        (lambda: TransitionGates({"transition0": [0]}, N, H), r"shape: expected \(units, children\) of the nodes, got"),
        (lambda: LowRankTransitions({"transition0": [0]}, (), H), r"shape: expected \(units, children\) of the nodes"),
        (lambda: LowRankTransitions({"transition0": [0]}, (N, N), None), "num_features: expected an integer"),
        (lambda: LatentPotentials({"initial": 0}, N, H, seed="a"), "seed: expected an integer"),
        (lambda: LatentPotentials(3, N, H), "positions: expected positions by the name of a sum node, got 3"),
        (
            lambda: LatentPotentials.for_hmm(ct.structures.hmm(2, 2, 2), H),
            r"pc: expected a compiled circuit, ct\.compile\(circuit\), got Circ",
        ),
        (lambda: TransitionGates.for_hmm(None, H), "pc: .* got NoneType"),
        (lambda: CoupledHead(ct.compile(ct.structures.hmm(2, 2, 2)), conditioners=3), "conditioners: .* got int"),
    ],
)
def test_arguments_of_another_kind_are_named(make, said):
    with pytest.raises(ArgumentError, match=said):
        make()


IN_THE_FAMILY = {
    "potentials": (0, lambda pc, seed: LatentPotentials.for_hmm(pc, 2)),
    "gates": (5, lambda pc, seed: TransitionGates.for_hmm(pc, 2, num_tables=2, seed=seed)),
    "low rank": (2, lambda pc, seed: LowRankTransitions.for_hmm(pc, 2, rank=1, seed=seed)),
}


class TestAWorldInTheFamily:
    """Texts of a Markov chain on two words whose transitions depend on a first word, which the denoiser has seen."""

    L = 3

    def log_law(self, head, world):
        """log p(block | first word) of all blocks, (2 ** L, 2), with a denoiser that knows no block."""
        masked = torch.ones(2, self.L, dtype=torch.bool)
        blank = world.blank.expand(2, -1)
        logits = world.uniform_denoiser().logits(blank)[:, 1:].double()
        logits[..., world.mask_id] = -torch.inf
        seen = torch.eye(2, dtype=torch.float64).unsqueeze(1).expand(-1, self.L, -1)
        said = Prediction.from_logits(logits, masked, features=seen)
        return head(said, blank[:, 1:], masked).log_prob(self.blocks().unsqueeze(1).expand(-1, 2, -1))

    def blocks(self):
        return torch.cartesian_prod(*[torch.arange(2)] * self.L)

    @pytest.mark.parametrize("name", IN_THE_FAMILY)
    def test_training_recovers_its_joint_distribution(self, name):
        seed, made = IN_THE_FAMILY[name]
        emission = torch.eye(2, 3, dtype=torch.float64)
        pc = ct.compile(ct.structures.hmm(self.L, 2, 3, emission=emission), dtype=torch.float64, seed=seed)
        pc.requires_grad_(False)
        true = CoupledHead(pc, conditioners=[moved(made(pc, 0).double(), torch.Generator().manual_seed(seed))])
        first = torch.arange(2).repeat_interleave(2**self.L).unsqueeze(1)
        texts_of = torch.cat([first, self.blocks().repeat(2, 1)], 1)
        uniform = World(texts_of, torch.full((len(texts_of),), 1 / len(texts_of)))
        with torch.no_grad():
            world = World(texts_of, self.log_law(true, uniform).exp().T.flatten() / 2)
        posteriors = [world.posterior(torch.tensor([word, *world.blank[1:].tolist()])) for word in range(2)]
        target = torch.stack([posterior.unflatten(0, (2, -1))[word] for word, posterior in enumerate(posteriors)], 1)

        head = CoupledHead(pc, conditioners=[made(pc, 5).double()])

        def distance():
            with torch.no_grad():
                return float((self.log_law(head, world).exp() - target).abs().sum(0).max() / 2)

        assert distance() > 0.05
        parameters = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(parameters, max_iter=80, tolerance_change=0, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = -(target * self.log_law(head, world)).sum()
            value.backward()
            return value

        optimizer.step(loss)
        assert distance() < 1e-6
