"""CircuitDensity behaves as scikit-learn expects of an estimator, and its densities are exact.

All of scikit-learn's estimator checks that it selects for a density estimator pass. It leaves out, by the estimator's
tags, the check that NaN is refused (here NaN is a missing value; infinity is refused below), and those of classifiers
(targets are optional here). Two skip themselves: one needs pandas, one needs SCIPY_ARRAY_API to be set.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn")

from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer
from sklearn.utils.estimator_checks import estimator_checks_generator

import circuits as ct
from circuits.sklearn.columns import columns_of


def small(**options):
    return ct.CircuitDensity(**{"num_latents": 2, "num_epochs": 3, "random_state": 0, **options})


@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        pytest.param(*pair, id=getattr(pair[1], "func", pair[1]).__name__)
        for pair in estimator_checks_generator(small())
    ],
)
def test_estimator_checks_of_scikit_learn(estimator, check):
    check(estimator)


def integers(count=80, num_vars=3, seed=0):
    random = np.random.RandomState(seed)
    first = random.randint(3, size=(count, 1))
    return (first + random.randint(2, size=(count, num_vars))) * 10 - 5  # values -5, 5, 15, 25: not the codes


def every(values, num_vars):
    return np.array(np.meshgrid(*[values] * num_vars)).reshape(num_vars, -1).T


@pytest.mark.parametrize("structure", ["mixture", "fully_factorized", "hmm"])
def test_the_density_of_integers_sums_to_one(structure):
    model = small(structure=structure).fit(integers())
    log_density = model.score_samples(every([-5, 5, 15, 25], 3))
    np.testing.assert_allclose(np.exp(log_density).sum(), 1, rtol=1e-9)
    assert np.isneginf(model.score_samples([[-5, 5, 16]])).all()
    assert model.score(integers()) == pytest.approx(model.score_samples(integers()).mean())
    assert set(np.unique(model.sample(50, random_state=1))) <= {-5, 5, 15, 25}


def test_a_tree_learnt_from_data_beats_independence():
    data = integers(300)
    tree, independent = (
        small(structure=name, num_epochs=20).fit(data).score(data) for name in ("hclt", "fully_factorized")
    )
    assert tree > independent + 0.1


def one_number_per_category(columns, num_bins):
    """A point in every bin, and one just outside of them on both sides, where the tails start: (D, num_bins + 2)."""
    steps = np.concatenate([[-1e-9], np.arange(num_bins) + 0.5, [num_bins + 1e-9]])
    return columns.least[:, None] + steps * columns.widths[:, None]


@pytest.mark.parametrize("structure", ["mixture", "hmm"])
def test_the_density_of_numbers_integrates_to_one(structure):
    data = np.random.RandomState(0).normal([0, 3], [1, 5], size=(200, 2))
    model = small(structure=structure, num_bins=8).fit(data)
    columns = model.columns_
    points = np.array(np.meshgrid(*one_number_per_category(columns, 8))).reshape(2, -1).T
    np.testing.assert_allclose(np.exp(model.score_samples(points)).sum() * columns.widths.prod(), 1, rtol=1e-6)
    far = columns.greatest + columns.widths * np.array([[1, 0.5], [4, 0.5]])
    np.testing.assert_allclose(np.diff(model.score_samples(far)), -3, rtol=1e-6)  # exponential tails
    drawn = model.sample(1000, random_state=0)
    assert ((drawn >= columns.least) & (drawn <= columns.greatest)).mean() > 0.95
    np.testing.assert_allclose(drawn.mean(0), data.mean(0), atol=1.5)


def test_missing_values_are_summed_out():
    data = np.random.RandomState(0).normal(size=(100, 3))
    data[np.random.RandomState(1).uniform(size=data.shape) < 0.2] = np.nan
    model = small(num_bins=4).fit(data)
    grid = one_number_per_category(model.columns_, 4)[1]
    completed = np.stack([np.full(6, 0.1), grid, np.full(6, -0.2)], axis=1)
    total = np.logaddexp.reduce(model.score_samples(completed)) + np.log(model.columns_.widths[1])
    np.testing.assert_allclose(model.score_samples([[0.1, np.nan, -0.2]]), total, rtol=1e-6)
    np.testing.assert_allclose(model.score_samples(np.full((1, 3), np.nan)), 0, atol=1e-9)


def test_infinity_is_refused():
    with pytest.raises(ValueError, match="infinity"):
        small().fit(np.array([[0.0, np.inf], [1.0, 2.0]]))


def test_draws_follow_bins_and_tails():
    columns = columns_of(np.linspace(-1, 3, 9).reshape(-1, 1), "auto", 4, shared=False)
    codes = np.repeat(np.arange(6), 4000).reshape(-1, 1)
    drawn = columns.decode(codes, np.random.RandomState(0))
    assert (columns.encode(drawn).codes == codes).all()
    np.testing.assert_allclose(drawn.reshape(6, -1).mean(1), [-2, -0.5, 0.5, 1.5, 2.5, 4], atol=0.1)


def test_given_categories_stay_possible_and_floats_may_hold_them():
    data = integers() // 10 + 1
    model = small(categories=6).fit(data)
    np.testing.assert_allclose(np.exp(model.score_samples(every(range(6), 3))).sum(), 1, rtol=1e-9)
    assert np.isfinite(model.score_samples([[5, 5, 5]])).all()
    with_gaps = data.astype(float)
    with_gaps[::3, 1] = np.nan
    assert np.isfinite(small(categories=[6, 6, 6]).fit(with_gaps).score(with_gaps))
    with pytest.raises(ct.ArgumentError, match="categories=2"):
        small(categories=2).fit(data)


def test_class_probabilities_are_bayes_rule():
    data = integers(120)
    labels = np.where(data[:, 0] + data[:, 1] > 10, "high", "low")
    model = small().fit(data, labels)
    assert model.classes_.tolist() == ["high", "low"]
    joint = np.stack(
        [pc(torch.from_numpy(model.columns_.encode(data).codes)).detach().numpy() for pc in model.circuits_]
    )
    joint = np.exp(joint.T) * model.class_prior_
    np.testing.assert_allclose(model.predict_proba(data), joint / joint.sum(1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(np.exp(model.score_samples(data)), joint.sum(1), rtol=1e-9)
    assert (model.predict(data) == labels).mean() > 0.8
    np.testing.assert_allclose(model.predict_proba([[1, 2, 3]]), [model.class_prior_], rtol=1e-9)  # impossible
    assert model.sample(7).shape == (7, 3)


def test_without_classes_there_is_no_predict():
    model = small().fit(integers())
    assert not hasattr(model, "predict_proba")
    with pytest.raises(NotFittedError):
        small().score_samples(integers())


def test_sample_weights_count_samples():
    data = integers(30)
    counts = np.random.RandomState(0).randint(3, size=30)
    weighted = small().fit(data, sample_weight=counts)
    repeated = small().fit(np.repeat(data, counts, axis=0))
    np.testing.assert_allclose(weighted.score_samples(data), repeated.score_samples(data), rtol=1e-6)
    with pytest.raises(ct.ArgumentError, match="sample_weight"):
        small().fit(data, sample_weight=-np.ones(30))
    with pytest.raises(ValueError, match="non-zero"):
        small().fit(data, sample_weight=np.zeros(30))


@pytest.mark.parametrize("targets", [None, np.arange(40) % 2])
def test_trees_are_learnt_from_weighted_and_incomplete_data(targets):
    random = np.random.RandomState(0)
    data = random.randint(3, size=(40, 5)).astype(float)
    data[random.uniform(size=data.shape) < 0.2] = np.nan
    counts = random.randint(3, size=40)
    repeated_targets = None if targets is None else np.repeat(targets, counts)
    weighted = small(structure="hclt", categories=3).fit(data, targets, sample_weight=counts)
    repeated = small(structure="hclt", categories=3).fit(np.repeat(data, counts, axis=0), repeated_targets)
    np.testing.assert_allclose(weighted.score_samples(data), repeated.score_samples(data), rtol=1e-6)


def test_where_values_are_missing_does_not_decide_on_the_tree():
    random = np.random.RandomState(0)
    first, second = random.randint(2, size=(2, 500))
    data = np.stack([first, second, first, second], axis=1).astype(float)
    data[np.ix_(random.uniform(size=500) < 0.5, [0, 1])] = np.nan  # together: as if they were dependent
    (pc,) = small(structure="hclt", categories=2, num_latents=2).fit(data).circuits_
    pairs = {tuple(sorted(node.scope)) for node in pc.circuit.nodes if len(node.scope) == 2}
    assert (0, 1) not in pairs
    assert pairs & {(0, 2), (1, 3)}


def test_with_targets_it_is_a_classifier():
    random = np.random.RandomState(0)
    targets = np.arange(60) % 2
    data = random.normal(size=(60, 2)) + 5 * targets[:, None]
    search = GridSearchCV(small(), {"num_latents": [1, 2]}, scoring="roc_auc", cv=2, error_score="raise")
    assert search.fit(data, targets).best_score_ > 0.9
    assert is_classifier(small().fit(data, targets))
    assert not is_classifier(small().fit(data))


def test_it_works_inside_scikit_learn():
    data = np.random.RandomState(0).normal(size=(60, 2))
    search = GridSearchCV(small(), {"num_latents": [1, 2], "num_bins": [4]}, cv=2).fit(data)
    assert search.best_params_["num_bins"] == 4
    pipeline = make_pipeline(KBinsDiscretizer(3, encode="ordinal", quantile_method="linear"), small(categories=3))
    assert np.isfinite(cross_val_score(pipeline, data, cv=2)).all()
    copy = clone(small(num_latents=5))
    assert copy.get_params()["num_latents"] == 5
    assert copy.set_params(num_latents=6).num_latents == 6


def test_a_function_builds_the_structure():
    def chain(data, num_categories):
        return ct.structures.mixture(len(num_categories), num_categories, 3)

    assert np.isfinite(small(structure=chain).fit(integers()).score(integers()))
    with pytest.raises(ct.ArgumentError, match="structure"):
        small(structure=lambda data, num_categories: "no circuit").fit(integers())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"structure": "magic"}, "structure"),
        ({"categories": "some"}, "categories"),
        ({"categories": [2]}, "categories"),
        ({"categories": None}, "categories"),
        ({"categories": 2.0}, "categories"),
        ({"categories": 0}, "categories"),
        ({"num_bins": 0}, "num_bins"),
        ({"num_latents": 0}, ">= 1"),
        ({"num_epochs": 0}, "num_epochs"),
    ],
)
def test_bad_options_are_named(options, problem):
    with pytest.raises(ct.ArgumentError, match=problem):
        small(**options).fit(integers())


def test_numpy_numbers_of_categories():
    data = np.arange(12).reshape(6, 2) % 5
    one, each = (small(categories=categories).fit(data) for categories in (np.int64(5), np.array([5, 5])))
    assert one.score(data) == each.score(data)


def test_integers_that_do_not_fit_into_64_bits_are_not_wrapped():
    with pytest.raises(ct.ArgumentError, match=r"below 2\^63, got 18446744073709551615"):
        small().fit(np.array([[2**64 - 1], [0]], dtype=np.uint64))


def test_a_range_that_is_no_finite_number_is_refused():
    with pytest.raises(ct.ArgumentError, match="range is a finite number"):
        small().fit(np.array([[1e308], [-1e308]]))


def test_a_circuit_with_classes_is_no_structure():
    def conditional(data, num_categories):
        return ct.structures.rat_spn(len(num_categories), 1, 1, 2, list(num_categories), num_classes=2)

    with pytest.raises(ct.ArgumentError, match="without classes"):
        small(structure=conditional).fit(integers())


def test_without_scikit_learn_the_error_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None; import circuits as ct\ntry:\n    ct.CircuitDensity\n"
    code += "except ct.ArgumentError as error:\n    print(error)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "unfactor[sklearn]" in result.stdout


def test_columns_of_missing_values_at_the_end_change_no_hidden_markov_model():
    x = np.random.default_rng(0).integers(0, 3, (60, 6)).astype(float)
    long = np.concatenate([x, np.full((60, 20), np.nan)], axis=1)
    scores = [small(structure="hmm", num_epochs=5, categories=3).fit(data).score(data) for data in (x, long)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_an_estimator_of_long_sequences_is_saved_by_joblib(tmp_path):
    import joblib

    X = np.random.default_rng(0).integers(0, 3, (20, 200))
    estimator = ct.CircuitDensity("hmm", num_latents=2, num_epochs=1, random_state=0).fit(X)
    joblib.dump(estimator, tmp_path / "estimator.joblib")
    loaded = joblib.load(tmp_path / "estimator.joblib")
    np.testing.assert_array_equal(loaded.score_samples(X), estimator.score_samples(X))


@pytest.mark.parametrize("targets", [False, True])
def test_information_criteria_are_those_of_the_textbook(targets):
    """A mixture of K components of D variables with C values: K - 1 + K D (C - 1) numbers a class, and shares."""
    random = np.random.default_rng(0)
    X, y = random.integers(0, 3, (60, 4)), np.arange(60) % 2
    estimator = ct.CircuitDensity("mixture", num_latents=2, num_epochs=3, random_state=0).fit(X, y if targets else None)
    count = 1 + 2 * 4 * 2
    count = 2 * count + 1 if targets else count
    total = estimator.score_samples(X).sum()
    assert estimator.aic(X) == pytest.approx(2 * count - 2 * total)
    assert estimator.bic(X) == pytest.approx(count * np.log(60) - 2 * total)


def test_the_criterion_prefers_as_many_components_as_the_data_have():
    random = np.random.default_rng(0)
    kind = random.integers(0, 2, 400)
    X = (random.random((400, 6)) < np.where(kind, 0.9, 0.1)[:, None]).astype(int)
    criteria = [
        ct.CircuitDensity("mixture", num_latents=k, num_epochs=30, random_state=0).fit(X).bic(X) for k in (1, 2, 6)
    ]
    assert np.argmin(criteria) == 1


def two_classes(count=60):
    data = integers(count)
    return data, np.where(data[:, 0] + data[:, 1] > 10, "high", "low")


def test_a_declared_classifier_is_one_before_it_is_fitted():
    """Bayes' rule by hand: the class with the greater share times density; calibration needs to know it before."""
    data, classes = two_classes()
    model = small(categories=[31] * 3, classifier=True)
    data = data + 5
    assert is_classifier(model)
    assert not is_classifier(small())
    model.fit(data, classes)
    joint = [
        queries_of(pc, data) + np.log(share) for pc, share in zip(model.circuits_, model.class_prior_, strict=True)
    ]
    expected = np.where(joint[0] > joint[1], "high", "low")
    assert model.score(data, classes) == pytest.approx((expected == classes).mean())
    assert cross_val_score(model, data, classes, cv=2).max() <= 1
    calibrated = CalibratedClassifierCV(model, cv=2).fit(data, classes)
    np.testing.assert_allclose(calibrated.predict_proba(data).sum(1), 1)
    with pytest.raises(ct.ArgumentError, match="y: expected the class of every sample"):
        model.fit(data)


def queries_of(pc, codes):
    with torch.no_grad():
        return ct.queries.log_likelihood(pc, torch.from_numpy(codes)).numpy()


def test_targets_can_be_ignored():
    data, classes = two_classes()
    model = small(classifier=False).fit(data, classes)
    assert not is_classifier(model)
    np.testing.assert_allclose(model.score_samples(data), small().fit(data).score_samples(data))


def test_the_estimator_says_why_its_fits_stopped():
    data, classes = two_classes()
    model = small(tol=1e-2, num_epochs=200).fit(data, classes)
    assert [result.stopped for result in model.fits_] == ["converged", "converged"]
    gains = [np.diff(result.train_log_likelihood) for result in model.fits_]
    assert all((gain[:-1] >= 1e-2).all() and gain[-1] < 1e-2 for gain in gains)
    assert [result.stopped for result in small().fit(data).fits_] == ["num_epochs"]


def test_an_optimizer_is_an_object_too():
    data = integers()
    one, other = small(optimizer=ct.learning.EM(pseudocount=0.5)).fit(data), small(pseudocount=0.5).fit(data)
    np.testing.assert_allclose(one.score_samples(data), other.score_samples(data), rtol=0)
