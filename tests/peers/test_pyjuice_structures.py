"""Structures have as many units and parameters as PyJuice's of the same name, and the same regions."""

import platform
import sys
import warnings
from collections import Counter

import pytest
import torch

import circuits as ct

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("PyJuice has no wheels for this platform", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyJuice and its Triton warn of is not ours
    import pyjuice as juice
    from pyjuice import structures as peer
    from pyjuice.nodes.distributions import Categorical

pytestmark = pytest.mark.filterwarnings("ignore")

K, C = 4, 3


def counts_of(root):
    """Return the numbers of sum units, input units and parameters; tied ones are counted once."""
    sums = [node for node in root if node.is_sum()]
    leaves = [node for node in root if node.is_input()]
    parameters = sum(node.num_edges for node in sums if not node.is_tied())
    parameters += sum(node.num_nodes * C for node in leaves if not node.is_tied())
    return sum(node.num_nodes for node in sums), sum(node.num_nodes for node in leaves), parameters


def own_counts(circuit):
    units = [sum(node.num_units for node in nodes) for nodes in (circuit.sums, circuit.inputs)]
    return *units, circuit.num_parameters


@pytest.mark.parametrize("homogeneous", [True, False])
def test_hmm(homogeneous):
    theirs = peer.HMM(6, K, C, homogeneous=homogeneous, block_size=K)
    assert own_counts(ct.structures.hmm(6, K, C, homogeneous)) == counts_of(theirs)


def test_hclt_finds_the_same_tree():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(C, (500, 7), generator=generator)
    for var in range(1, 7):
        copies = torch.rand(500, generator=generator) < 0.7
        x[:, var] = torch.where(copies, x[:, (var - 1) // 2], x[:, var])
    theirs = peer.HCLT(x.float(), K, input_dist=Categorical(num_cats=C), num_bins=C, sigma=0.05, block_size=K)
    ours = ct.structures.hclt(x, K, C)
    assert own_counts(ours) == counts_of(theirs)
    scopes = {frozenset(node.scope.to_list()) for node in theirs if node.is_sum()}
    assert {node.scope for node in ours.sums} == scopes


@pytest.mark.parametrize(("shape", "interval"), [((2, 3), 1), ((3, 3), 1), ((4, 6), 2)])
def test_poon_domingos_has_the_same_regions(shape, interval):
    theirs = peer.PD(
        shape, K, split_intervals=interval, input_dist=Categorical(num_cats=C), block_size=K, max_prod_block_conns=100
    )
    ours = ct.RegionGraph.poon_domingos(shape, interval)
    regions = {frozenset(node.scope.to_list()) for node in theirs if not node.is_input()}
    regions |= {frozenset(node.scope.to_list()) for node in theirs if node.is_input() and interval == 1}
    assert {ours.scope(region) for region in range(ours.num_regions)} == regions


@pytest.mark.parametrize(("num_vars", "depth", "repetitions"), [(8, 2, 3), (12, 2, 2), (16, 3, 1)])
def test_rat_spn_has_regions_of_the_same_sizes(num_vars, depth, repetitions):
    theirs = peer.RAT_SPN(num_vars, K, depth, repetitions, input_dist=Categorical(num_cats=C), block_size=K)
    sizes = Counter(len(node.scope) for node in theirs if node.is_sum())
    ours = ct.RegionGraph.random_binary_tree(num_vars, depth, repetitions, seed=0)
    assert Counter(scope.bit_count() for scope in ours.scope_bits) == sizes


def tables(units, width, seed):
    draw = torch.rand(units, width, generator=torch.Generator().manual_seed(seed)) + 0.1
    return draw / draw.sum(1, keepdim=True)


@pytest.mark.parametrize("mode", ["elementwise", "outer"])
def test_nodes_built_by_hand_are_the_same_circuit(mode):
    """Blocks of units are units; a tied duplicate is ``tied_to``; edges between all pairs are the mode "outer"."""
    leaf, weights = tables(4, C, seed=0), tables(1, 4 if mode == "elementwise" else 16, seed=1)
    a = juice.inputs(0, num_node_blocks=2, block_size=2, dist=Categorical(num_cats=C), params=leaf.flatten())
    b = a.duplicate(1, tie_params=True)
    assert b.is_tied()
    edges = {}
    if mode == "outer":  # of single units, in the order of our product
        pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        edges = {"edge_ids": pairs, "sparse_edges": True}
    product = juice.multiply(a, b, **edges)
    root = juice.summate(product, num_node_blocks=1, block_size=1)
    root.init_parameters()
    root.set_params(weights.reshape(-1, 1, product.block_size))
    theirs = ct.interop.from_pyjuice(root, dtype=torch.float64)

    x = ct.inputs(0, 4, ct.Categorical(C), weights=leaf.t())
    y = ct.inputs(1, 4, ct.Categorical(C), tied_to=x)
    ours = ct.sum(ct.product(x, y, mode=mode), num_units=1, weights=weights)
    joint = ct.testing.enumerate_joint(ct.compile(ct.Circuit(ours), dtype=torch.float64))
    torch.testing.assert_close(ct.testing.enumerate_joint(theirs), joint, rtol=1e-5, atol=1e-5)


def test_the_names_on_the_page_exist():
    for module, names in (
        (juice, "inputs multiply summate compile TensorCircuit save load"),
        (juice.structures, "HMM HCLT RAT_SPN PD"),
        (
            juice.distributions,
            "Categorical DiscreteLogistic Bernoulli Gaussian Literal SoftEvidenceCategorical ExternProductCategorical",
        ),
        (juice.queries, "marginal conditional sample"),
        (juice.optim, "FullBatchEM MiniBatchEM Anemone Adam SGD"),
        (juice.transformations, "grow prune_by_score"),
        (juice.TensorCircuit, "forward_mpe mini_batch_em"),
    ):
        for name in names.split():
            assert hasattr(module, name), name
