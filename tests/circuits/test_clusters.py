"""k-means separates what is far apart, and never gets worse."""

import pytest
import torch

import circuits as ct
from circuits.learning import kmeans


def scattered(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    labels = torch.randint(0, 3, (num_samples,), generator=generator)
    return centres[labels] + torch.randn(num_samples, 2, generator=generator), labels


def distortion(x, labels):
    parts = [x[labels == label] for label in labels.unique()]
    return sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts)


@pytest.mark.parametrize("seed", range(5))
def test_finds_clusters_that_are_far_apart(seed):
    x, truth = scattered(300)
    labels = kmeans(x, 3, seed=seed)
    assert len({(int(a), int(b)) for a, b in zip(labels, truth, strict=True)}) == 3


def test_more_steps_are_never_worse():
    x = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    values = [distortion(x, kmeans(x, 6, num_steps=steps, seed=1)) for steps in (0, 1, 3, 50)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_a_weight_is_a_number_of_copies():
    x, _ = scattered(60)
    counts = torch.arange(60) % 3
    weighted = kmeans(x, 3, sample_weights=counts.float(), seed=0)
    repeated = kmeans(x.repeat_interleave(counts, 0), 3, seed=0)
    assert torch.equal(weighted.repeat_interleave(counts), repeated)


@pytest.mark.parametrize("offset", [1e6, -1e8])
def test_clusters_do_not_depend_on_the_origin(offset):
    x, _ = scattered(60)
    assert torch.equal(kmeans(x.double() + offset, 3, seed=0), kmeans(x.double(), 3, seed=0))


def test_fewer_distinct_samples_than_clusters():
    labels = kmeans(torch.tensor([[0], [1], [0], [1]]), 3)
    assert labels[0] == labels[2] != labels[1] == labels[3]


def test_arguments_are_checked():
    with pytest.raises(ct.ArgumentError, match="data"):
        kmeans(torch.zeros(3), 2)
    with pytest.raises(ct.ArgumentError, match="num_clusters"):
        kmeans(torch.zeros(3, 2), 0)
    with pytest.raises(ct.ArgumentError, match="sample_weights"):
        kmeans(torch.zeros(3, 2), 2, sample_weights=torch.zeros(3))
    with pytest.raises(ct.ArgumentError, match="sample_weights: expected finite"):
        kmeans(torch.zeros(3, 2), 2, sample_weights=torch.full((3,), torch.inf))
    with pytest.raises(ct.ArgumentError, match="num_steps"):
        kmeans(torch.zeros(3, 2), 2, num_steps=-1)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ct.ArgumentError, match="data: expected finite numbers"):
            kmeans(torch.tensor([[0.0], [bad], [1.0]]), 2)


@pytest.mark.parametrize("seed", range(5))
def test_samples_of_weight_zero_are_no_centres(seed):
    x = torch.tensor([[0.0], [0.1], [1.0], [1.1], [100.0]])
    labels = kmeans(x, 2, sample_weights=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), seed=seed)
    assert labels[0] == labels[1] != labels[2] == labels[3]
