"""Data that do not fit in memory are read a few rows at a time, and say the same as in memory."""

import numpy as np
import pytest
import torch
from learning_cases import weights_of

import circuits as ct
from circuits import digests, learning
from circuits.learning import samples as _samples
from circuits.learning import tables


class Recorded:
    """A table on disk that insists on increasing rows, and remembers the largest request."""

    def __init__(self, values):
        self.values = values
        self.largest = 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        assert isinstance(rows, np.ndarray)
        assert rows.dtype.kind == "i"
        assert bool((np.diff(rows) > 0).all())
        self.largest = max(self.largest, len(rows))
        return self.values[rows]


def values(num_samples):
    x = torch.randint(0, 3, (num_samples, 4), generator=torch.Generator().manual_seed(0))
    return x.to(torch.uint8).numpy()


def fitted(data, optimizer="minibatch_em", **options):
    pc = ct.compile(ct.structures.hmm(4, 3, 3), dtype=torch.float64, seed=0)
    options = {"batch_size": 16, "num_epochs": 2, "progress": False} | options
    result = learning.fit(pc, data, optimizer=optimizer, **options)
    return result, weights_of(pc)


def assert_same(one, other):
    assert one[0] == other[0]
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["em", "anemone"])
def test_a_table_is_read_in_parts_and_says_what_memory_says(optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_PART_ELEMENTS", 80)  # 20 rows
    x = values(1000)
    tables = [Recorded(x), Recorded(x != 1), Recorded(x[:300]), Recorded(x[:300] != 2)]
    data, observed, validation_data, validation_observed = tables
    found = fitted(
        data,
        optimizer,
        observed=observed,
        validation_data=validation_data,
        validation_observed=validation_observed,
        checkpoint_path=tmp_path / "fit.safetensors",
    )
    expected = fitted(
        x,
        optimizer,
        observed=x != 1,
        validation_data=x[:300],
        validation_observed=x[:300] != 2,
        # the checkpoint of the table is one of the same data
        checkpoint_path=tmp_path / "fit.safetensors",
    )
    assert_same(found, expected)
    assert_same(found, fitted(x, optimizer, observed=x != 1, validation_data=x[:300], validation_observed=x[:300] != 2))
    assert [table.largest for table in tables] == [20] * 4


def test_tables_start_circuits_too():
    x = values(1000)
    pcs = [ct.compile(ct.structures.hmm(4, 3, 3), seed=0) for _ in range(2)]
    for pc, data in zip(pcs, (Recorded(x), x), strict=True):
        learning.initialize_inputs(pc, data)
    assert torch.equal(ct.testing.enumerate_joint(pcs[0]), ct.testing.enumerate_joint(pcs[1]))


def mapped(path, array):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("view", [np.asarray, lambda x: x[:, ::2], lambda x: x[::2], np.asfortranarray])
def test_a_mapped_file_is_neither_copied_nor_hashed_without_need(view, tmp_path, monkeypatch):
    monkeypatch.setattr(_samples, "digest", None)
    file = mapped(tmp_path / "x.npy", view(values(50)))
    assert isinstance(file, np.memmap)
    assert tables.as_rows("data", file).data_ptr() == file.ctypes.data
    part = file[:, ::2]
    assert tables.as_rows("data", part).data_ptr() == part.ctypes.data
    if file.shape[1] == 4:
        assert_same(fitted(file), fitted(torch.from_numpy(np.array(file))))


def test_reversed_arrays_are_copied():
    assert_same(fitted(values(50)[::-1]), fitted(values(50)[::-1].copy()))


def test_hashes_do_not_depend_on_parts(monkeypatch):
    x = torch.arange(60.0).reshape(3, 20).t()
    whole = digests.digest(x, None, torch.tensor(2.0), torch.zeros(0, 3))
    monkeypatch.setattr(digests, "_PART_ELEMENTS", 7)
    assert digests.digest(x, None, torch.tensor(2.0), torch.zeros(0, 3)) == whole
    assert digests.digest(x + 1, None, torch.tensor(2.0), torch.zeros(0, 3)) != whole


def test_wrong_values_are_found_in_the_part_they_are_in(monkeypatch):
    monkeypatch.setattr(digests, "_PART_ELEMENTS", 40)
    x = values(50)
    x[33, 2] = 7
    with pytest.raises(ct.ArgumentError, match=r"variable 2, got 7 in sample 33"):
        fitted(Recorded(x))
    fitted(Recorded(x), observed=Recorded(x != 7))


class Short(Recorded):
    def __getitem__(self, rows):
        return super().__getitem__(rows)[:1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Recorded(values(9)[:, :3]), r"data: expected integers of shape \(num_samples, 4\)"),
        (Recorded(values(9)[:0]), "data: expected at least one sample"),
        (Recorded(values(9).astype(str)), "data: expected an array of numbers"),
        (Recorded(values(9).astype(">i4")), "data: expected an array of numbers"),
        (Short(values(9)), "data: asked for 9 rows, it gave 1"),
        ("text", "data: expected a tensor, a numpy array, lists of numbers, or a table"),
    ],
)
def test_tables_that_do_not_fit_are_refused(data, message):
    with pytest.raises(ct.ArgumentError, match=message):
        fitted(data)
