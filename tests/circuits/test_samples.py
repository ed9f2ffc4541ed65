"""Data that lie in a file stay there: they are mapped, never copied as a whole."""

import numpy as np
import pytest
import torch

import circuits as ct
from circuits.learning import _samples


def mapped(path, array):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def values(num_samples):
    return torch.randint(0, 3, (num_samples, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()


def fitted(data, **options):
    pc = ct.compile(ct.structures.hmm(4, 3, 3), dtype=torch.float64, seed=0)
    ct.learning.fit(pc, data, optimizer="minibatch_em", batch_size=16, num_epochs=2, progress=False, **options)
    return ct.testing.enumerate_joint(pc)


def test_a_mapped_file_is_not_copied(tmp_path):
    pc = ct.compile(ct.structures.hmm(4, 3, 3), seed=0)
    file = mapped(tmp_path / "x.npy", values(50))
    assert _samples.checked_samples(pc, "data", file, None, None).x.data_ptr() == file.ctypes.data


def test_fit_from_a_mapped_file_is_the_fit_from_memory(tmp_path):
    x = values(50)
    is_observed = x != 1
    files = mapped(tmp_path / "x.npy", x), mapped(tmp_path / "observed.npy", is_observed)
    torch.testing.assert_close(
        fitted(files[0], observed=files[1]), fitted(torch.from_numpy(x), observed=is_observed), rtol=0, atol=0
    )


def test_values_are_checked_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(_samples, "_CHECKED_ELEMENTS", 40)
    x = values(50)
    x[33, 2] = 7
    with pytest.raises(ct.ArgumentError, match=r"variable 2, got 7 in sample 33"):
        fitted(mapped(tmp_path / "x.npy", x))
    is_observed = x != 7
    fitted(x, observed=is_observed)
