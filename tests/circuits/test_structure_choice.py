"""The structure that validation asks for: the smallest that is not clearly worse than the best."""

import numpy as np
import pytest
import torch

import circuits as ct

OPTIONS = {"optimizer": "em", "num_epochs": 30, "progress": False}


def two_kinds(num_samples, generator):
    """Six bits that are mostly 0, or mostly 1: a mixture of two."""
    kind = torch.randint(2, (num_samples, 1), generator=generator)
    return (kind + (torch.rand(num_samples, 6, generator=generator) < 0.1).long()) % 2


def candidates():
    return {f"{k} components": ct.structures.mixture(6, 2, k) for k in (1, 2, 8)}


def test_the_smallest_within_one_standard_error_is_chosen(generator):
    data, held_out = two_kinds(400, generator), two_kinds(200, generator)
    choice = ct.learning.choose_structure(candidates(), data, held_out, dtype=torch.float64, **OPTIONS)
    losses = {}
    for name, circuit in candidates().items():
        pc = ct.compile(circuit, dtype=torch.float64, seed=0)
        ct.learning.fit(pc, data, validation_data=held_out, **OPTIONS)
        losses[name] = pc(held_out).detach().numpy()
    means = {name: own.mean() for name, own in losses.items()}
    best = max(means, key=means.get)
    for name, score in choice.scores.items():
        difference = losses[best] - losses[name]
        assert score.log_likelihood == pytest.approx(means[name])
        assert score.behind == pytest.approx(difference.mean(), abs=1e-12)
        assert score.standard_error == pytest.approx(np.std(difference, ddof=1) / np.sqrt(200), abs=1e-12)
    assert [score.num_free_parameters for score in choice.scores.values()] == [6, 1 + 12, 7 + 48]
    assert choice.name == "2 components"
    assert choice.pc.num_free_parameters == 13
    assert choice.pc(held_out).mean().item() == pytest.approx(means["2 components"])


def test_of_circuits_that_were_fitted_each_in_its_own_way_the_same_is_chosen(generator):
    data, held_out = two_kinds(400, generator), two_kinds(200, generator)
    expected = ct.learning.choose_structure(candidates(), data, held_out, **OPTIONS)
    fitted = {name: ct.compile(circuit, seed=0) for name, circuit in candidates().items()}
    for pc in fitted.values():
        ct.learning.fit(pc, data, validation_data=held_out, **OPTIONS)
    choice = ct.learning.choose_fitted(fitted, held_out)
    assert choice.name == expected.name
    assert choice.scores == expected.scores
    assert choice.pc is fitted["2 components"]
    with pytest.raises(ct.ArgumentError, match="fitted: expected compiled circuits by name"):
        ct.learning.choose_fitted(candidates(), held_out)
    with pytest.raises(ct.ArgumentError, match="validation_data: expected an integer >= 2, got 1"):
        ct.learning.choose_fitted(fitted, held_out[:1])


def test_an_interrupted_choice_goes_on_where_it_was(generator, tmp_path, monkeypatch):
    data, held_out = two_kinds(100, generator), two_kinds(50, generator)
    made = ct.learning.choose_structure(candidates(), data, held_out, folder=tmp_path / "a", **OPTIONS)
    short = dict(list(candidates().items())[:2])
    ct.learning.choose_structure(short, data, held_out, folder=tmp_path / "b", **OPTIONS | {"num_epochs": 7})
    again = ct.learning.choose_structure(candidates(), data, held_out, folder=tmp_path / "b", **OPTIONS)
    assert again.name == made.name
    assert again.scores == made.scores
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "1 components.safetensors", "2 components.safetensors", "8 components.safetensors",
    ]  # fmt: skip
    assert all(torch.equal(one, two) for one, two in zip(again.pc.parameters(), made.pc.parameters(), strict=True))


def test_a_candidate_that_rules_a_validation_sample_out_is_not_chosen(generator):
    data, held_out = two_kinds(100, generator), two_kinds(50, generator)
    never = torch.eye(2).unsqueeze(0).expand(6, 2, 2)
    stuck = ct.structures.hmm(6, 2, 2, transition=torch.eye(2), emission=torch.eye(2))
    made = {"stuck": stuck, "one": ct.structures.hmm(6, 1, 2)}
    choice = ct.learning.choose_structure(made, data, held_out, **OPTIONS)
    assert choice.name == "one"
    assert choice.scores["stuck"].log_likelihood == -torch.inf
    only = {"stuck": ct.structures.hmm(6, 2, 2, False, transition=never[:5], emission=never)}
    with pytest.raises(ct.ArgumentError, match="validation_data: expected samples that some candidate allows"):
        ct.learning.choose_structure(only, data, held_out, **OPTIONS)


def test_what_cannot_be_chosen_from_is_named(generator):
    data = two_kinds(10, generator)
    with pytest.raises(ct.ArgumentError, match="candidates: expected circuits by name, got"):
        ct.learning.choose_structure({}, data, data)
    with pytest.raises(ct.ArgumentError, match=r"names that files can have, got '\.\./a'"):
        ct.learning.choose_structure({"../a": ct.structures.hmm(6, 2, 2)}, data, data)
    with pytest.raises(ct.ArgumentError, match="validation_data: expected an integer >= 2, got 1"):
        ct.learning.choose_structure(candidates(), data, data[:1])
    with pytest.raises(ct.ArgumentError, match="folder: expected a path or None, got 3"):
        ct.learning.choose_structure(candidates(), data, data, folder=3)
