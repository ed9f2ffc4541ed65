"""No queries, and tensors that have no numbers of their own: right shapes, or errors that say what to do."""

import pytest
import torch

import circuits as ct
from circuits import queries as q
from circuits.arguments import check_stored

D, C = 4, 5
NOTHING = torch.zeros(0, D, dtype=torch.int64)


@pytest.fixture(scope="module")
def pc():
    return ct.compile(ct.structures.hmm(D, 3, C), seed=0)


QUERIES = {
    "log_partition": (lambda pc, e: q.log_partition(pc, e), (0,)),
    "marginals": (lambda pc, e: q.marginals(pc, e), (0, D, C)),
    "pairwise_marginals": (lambda pc, e: q.pairwise_marginals(pc, e), (0, D, D, C, C)),
    "mutual_information": (lambda pc, e: q.mutual_information(pc, e), (0, D, D)),
    "covariance": (lambda pc, e: q.covariance(pc, e), (0, D, D)),
    "mean": (lambda pc, e: q.mean(pc, e), (0, D)),
    "variance": (lambda pc, e: q.variance(pc, e), (0, D)),
    "entropy_bounds": (lambda pc, e: q.entropy_bounds(pc, e)[0], (0,)),
    "latent_entropy": (lambda pc, e: q.latent_entropy(pc, e), (0,)),
    "mpe": (lambda pc, e: q.mpe(pc, e)[0], (0, D)),
    "k_best": (lambda pc, e: q.k_best(pc, 2, e)[0], (0, 2, D)),
    "sample": (lambda pc, e: q.sample(pc, 3, evidence=e), (3, 0, D)),
    "without replacement": (lambda pc, e: q.sample_without_replacement(pc, 3, evidence=e)[0], (0, 3, D)),
}


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("evidence", [ct.Evidence.observe(NOTHING), ct.Evidence.soft(torch.zeros(0, D, C))])
def test_no_query_has_no_answer(pc, name, evidence):
    ask, shape = QUERIES[name]
    assert ask(pc, evidence).shape == shape


def test_no_rows_have_no_covariance_under_continuous_families_either():
    leaves = [ct.inputs(var, 2, ct.Gaussian()) for var in range(2)]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)), seed=0)
    assert q.covariance(pc, ct.Evidence.observe(torch.full((0, 2), torch.nan))).shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda x: x.to("meta"), "on the device meta; make it elsewhere"), (lambda x: x.to_sparse(), r"to_dense\(\)")],
    ids=["meta", "sparse"],
)
def test_tensors_without_numbers_are_refused_in_words(pc, make, said):
    x, factors = torch.zeros(9, D, dtype=torch.int64), torch.zeros(2, D, C)
    calls = [
        lambda: ct.Evidence.observe(make(x)),
        lambda: ct.Evidence.soft(make(factors)),
        lambda: q.log_likelihood(pc, make(x)),
        lambda: ct.learning.fit(pc, make(x), progress=False),
        lambda: ct.structures.hclt(make(x), 2, C),
        lambda: ct.RegionGraph.chow_liu_tree(make(x)),
        lambda: check_stored("x", make(x)),
    ]
    for call in calls:
        with pytest.raises(ct.ArgumentError, match=said):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_a_circuits(pc, dtype):
    with pytest.raises(ct.ArgumentError, match=r"dtype: expected torch\.float32 or torch\.float64"):
        ct.compile(ct.structures.hmm(D, 3, C), seed=0).to(dtype)
