"""What docs/coming-from.md says of cirkit: its layers, operators, queries and templates, with the weights copied."""

import pytest
import torch
from test_libcirkit import CATEGORIES, UNITS, Weights, as_ours, as_peer, copy_weights, structure_of

import circuits as ct
from circuits.region_graphs import RegionGraph

pytest.importorskip("cirkit", reason="libcirkit is not installed; it comes with the extra [peers]")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("float64")]

from cirkit.backend.torch.queries import IntegrateQuery, SamplingQuery  # noqa: E402
from cirkit.pipeline import PipelineContext  # noqa: E402
from cirkit.symbolic import functional  # noqa: E402
from cirkit.symbolic import layers as peer_layers  # noqa: E402
from cirkit.symbolic.circuit import Circuit as PeerCircuit  # noqa: E402
from cirkit.templates import data_modalities, pgms, utils  # noqa: E402
from cirkit.templates import region_graph as peer_graphs  # noqa: E402
from cirkit.utils.scope import Scope  # noqa: E402

D = 4


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x():
    return torch.randint(CATEGORIES, (12, D), generator=torch.Generator().manual_seed(0))


def compiler():
    return PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)


def close(found, expected):
    torch.testing.assert_close(found.detach(), expected.detach().flatten(), rtol=1e-9, atol=1e-9)


def pair(seed, sum_product="cp"):
    """Return a circuit of cirkit over a linear tree of D variables, and ours with the same weights."""
    graph, weights = RegionGraph.linear_tree(D), Weights(seed)
    peer = as_peer(graph).build_circuit(
        input_factory=lambda scope, num_units: peer_layers.CategoricalLayer(
            scope, num_units, num_categories=CATEGORIES, probs_factory=weights
        ),
        sum_product=sum_product,
        sum_weight_factory=weights,
        num_input_units=UNITS,
        num_sum_units=UNITS,
    )
    circuit = ct.structures.from_region_graph(graph, UNITS, CATEGORIES, sum_product="cp")
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    if sum_product == "cp":
        copy_weights(pc, circuit.root, peer, next(iter(peer.outputs)), weights)
    return peer, pc


def test_missing_values_are_integrated_out(x):
    peer, pc = pair(0)
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    compiled = compiler().compile(peer)
    assert compiled(x).shape == (len(x), 1, 1)
    close(pc(x), compiled(x))
    close(ct.queries.log_marginal(pc, x, ~missing), IntegrateQuery(compiled)(x, integrate_vars=missing))
    close(
        ct.transforms.marginalize(pc, [1, 2])(x[:, [0, 3]]),
        compiler().compile(functional.integrate(peer, Scope([1, 2])))(x),
    )


def test_evidence_is_a_factor_there_and_a_condition_here(x):
    """Theirs is p(x, e), not normalised; ours is p(x | e), and log p(e) is what lies between the two."""
    peer, pc = pair(0)
    theirs = compiler().compile(functional.evidence(peer, {1: 2}))(x)
    given = x.clone()
    given[:, 1] = 2
    seen = torch.zeros(1, D, dtype=torch.bool).index_fill(1, torch.tensor([1]), True)
    evidence = ct.Evidence.observe(given[:1], seen)
    log_p = ct.queries.log_partition(pc, evidence)
    close(ct.transforms.condition(pc, evidence)(x[:, [0, 2, 3]]) + log_p, theirs)
    close(pc(given), theirs)


def test_products_of_circuits_agree_up_to_their_normaliser(x):
    (first, ours), (second, other) = pair(0), pair(1)
    context = compiler()
    theirs = context.compile(functional.multiply(first, second))
    log_z = context.compile(functional.integrate(functional.multiply(first, second)))(x[:1])
    close(ours(x) + other(x), theirs(x))
    product = ct.transforms.multiply(ours, other)
    close(product.pc(x), theirs(x) - log_z)
    close(product.log_partition.reshape(1), log_z)


def test_samples_have_their_shapes():
    peer, pc = pair(0)
    assert SamplingQuery(compiler().compile(peer))(num_samples=5)[0].shape == ct.queries.sample(pc, 5).shape == (5, D)


def test_transposed_cp_is_another_circuit(x):
    """Our "cp" is their "cp"; their "cp-t" mixes after the product, not each part before it, and so has fewer sums."""
    layers = {name: [type(layer) for layer in pair(0, name)[0].layers] for name in ("cp", "cp-t")}
    assert layers["cp"].count(peer_layers.SumLayer) == len(pair(0)[1].circuit.sums)
    assert layers["cp-t"].count(peer_layers.SumLayer) < layers["cp"].count(peer_layers.SumLayer)


def two_inputs(layer):
    """Return the circuit of cirkit whose root mixes the product of two input layers by ``layer(units, arity)``."""
    weights = Weights(2)
    parts = [
        peer_layers.CategoricalLayer(Scope([var]), UNITS, num_categories=CATEGORIES, probs_factory=weights)
        for var in (0, 1)
    ]
    product = layer(UNITS, 2)
    root = peer_layers.SumLayer(product.num_output_units, 1, weight_factory=weights)
    return PeerCircuit([*parts, product, root], {product: parts, root: [product]}, [root]), parts, root, weights


@pytest.mark.parametrize(("layer", "mode"), [("HadamardLayer", "elementwise"), ("KroneckerLayer", "outer")])
def test_product_layers_multiply_the_same_units(layer, mode, x):
    peer, parts, root, weights = two_inputs(getattr(peer_layers, layer))
    tables = [weights.of(part.probs).t() for part in parts]
    a, b = (ct.inputs(var, UNITS, ct.Categorical(CATEGORIES), weights=tables[var]) for var in (0, 1))
    ours = ct.Circuit(ct.sum(ct.product(a, b, mode=mode), num_units=1, weights=weights.of(root.weight)))
    close(ct.compile(ours, dtype=torch.float64)(x[:, :2]), compiler().compile(peer)(x[:, :2]))


@pytest.mark.parametrize("family", ["Binomial", "Gaussian"])
def test_input_layers_have_the_same_densities(family):
    weights = Weights(3)
    mixing = peer_layers.SumLayer(UNITS, 1, weight_factory=weights)
    if family == "Binomial":
        layer = peer_layers.BinomialLayer(Scope([0]), UNITS, total_count=5, probs_factory=weights)
    else:
        layer = peer_layers.GaussianLayer(Scope([0]), UNITS, mean_factory=weights, stddev_factory=weights)
    peer = PeerCircuit([layer, mixing], {mixing: [layer]}, [mixing])
    if family == "Binomial":
        distribution, parameters, values = ct.Binomial(5), weights.of(layer.probs)[None], torch.arange(6)
    else:
        distribution, parameters = ct.Gaussian(), torch.stack([weights.of(layer.mean), weights.of(layer.stddev)])
        values = torch.linspace(-1, 1, 7)
    leaf = ct.inputs(0, UNITS, distribution, weights=parameters)
    ours = ct.Circuit(ct.sum(leaf, num_units=1, weights=weights.of(mixing.weight)))
    close(ct.compile(ours, dtype=torch.float64)(values[:, None]), compiler().compile(peer)(values[:, None]))


@pytest.mark.parametrize("num_vars", [1, 2, 5])
def test_chains_and_factorizations_have_the_same_regions(num_vars):
    for ours, peer in (
        (RegionGraph.linear_tree(num_vars), peer_graphs.LinearTree(num_vars)),
        (
            RegionGraph.fully_factorized(num_vars, num_repetitions=2),
            peer_graphs.FullyFactorized(num_vars, num_repetitions=2),
        ),
    ):
        assert structure_of(ours) == structure_of(as_ours(peer))


def test_chow_liu_trees_have_the_same_regions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (500, 6), generator=generator)
    for var in range(1, 6):
        copies = torch.rand(500, generator=generator) < 0.8
        x[:, var] = torch.where(copies, x[:, (var - 1) // 2], x[:, var])
    peer = peer_graphs.ChowLiuTree(x, input_type="categorical", num_categories=2, root=0)
    assert structure_of(RegionGraph.chow_liu_tree(x, root=0)) == structure_of(as_ours(peer))


def copy_compiled(pc, node, compiled, layer):
    """Copy the weights of a compiled circuit of cirkit, without folds, whose sums over sums are one sum of ours."""
    below = compiled.layer_inputs(layer)
    if isinstance(node, ct.Input):
        pc.set_weights(node, layer.probs()[0].detach().t())
        return
    if isinstance(node, ct.Sum):
        table = layer.weight()[0].detach()
        if isinstance(node.children[0], ct.Product) and all(hasattr(child, "weight") for child in below):
            mixes = table.chunk(len(below), 1)
            table = torch.cat([mix @ child.weight()[0].detach() for mix, child in zip(mixes, below, strict=True)], 1)
            below = [compiled.layer_inputs(child)[0] for child in below]
        pc.set_weights(node, table)
    if isinstance(node, ct.Product):  # factors in the order of their variables
        below = sorted(below, key=lambda child: min(scope_of(compiled, child)))
    children = (
        sorted(node.children, key=lambda child: min(child.scope)) if isinstance(node, ct.Product) else node.children
    )
    for child, lower in zip(children, below, strict=True):
        copy_compiled(pc, child, compiled, lower)


def scope_of(compiled, layer):
    below = compiled.layer_inputs(layer)
    return (
        set(layer.scope_idx.flatten().tolist()) if not below else set().union(*(scope_of(compiled, b) for b in below))
    )


def unfolded(symbolic):
    return PipelineContext(backend="torch", semiring="lse-sum", fold=False, optimize=False).compile(symbolic)


NORMALISED = utils.Parameterization(activation="softmax", initialization="normal")


def test_the_hmm_template_is_an_hmm_that_is_not_homogeneous(x):
    peer = unfolded(
        pgms.hmm(
            range(D),
            num_latent_states=UNITS,
            input_layer_kwargs={"num_categories": CATEGORIES},
            weight_param=NORMALISED,
        )
    )
    circuit = ct.structures.hmm(D, UNITS, CATEGORIES, homogeneous=False)
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    copy_compiled(pc, circuit.root, peer, next(iter(peer.outputs)))
    close(pc(x), peer(x))


def test_the_image_template_is_a_quad_graph():
    peer = unfolded(
        data_modalities.image_data(
            (1, 3, 2), region_graph="quad-graph", input_layer="categorical", num_input_units=UNITS,
            sum_product_layer="cp", num_sum_units=UNITS, sum_weight_param=NORMALISED,
        )
    )  # fmt: skip
    circuit = ct.structures.quad_graph((3, 2), UNITS, ct.Categorical(256))
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    copy_compiled(pc, circuit.root, peer, next(iter(peer.outputs)))
    images = torch.randint(256, (8, 6), generator=torch.Generator().manual_seed(0))
    close(pc(images), peer(images))


def test_properties_have_their_names():
    peer, pc = pair(0)
    for name in ("smooth", "decomposable", "structured_decomposable"):
        assert getattr(peer.properties, name) == getattr(pc.circuit, f"is_{name}") is True
    quad = data_modalities.image_data(
        (1, 2, 2), region_graph="quad-graph", input_layer="categorical", num_input_units=2, sum_product_layer="cp",
        num_sum_units=2,
    )  # fmt: skip
    ours = ct.structures.quad_graph((2, 2), 2, 256)
    assert quad.properties.structured_decomposable == ours.is_structured_decomposable is False
    assert hasattr(peer_graphs.RegionGraph, "dump")
    assert hasattr(peer_graphs.RegionGraph, "load")
