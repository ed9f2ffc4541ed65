"""Circuits as a scikit-learn estimator of densities and classes; needs scikit-learn >= 1.6, the extra ``[sklearn]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from circuits import queries, structures
from circuits.engine.compile import CompiledCircuit, compile
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.learning.fit import FitResult, fit
from circuits.learning.optimizers import Optimizer
from circuits.learning.samples import Samples
from circuits.sklearn.columns import Array, Encoded, columns_of
from circuits.symbolic import Circuit

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils import ClassifierTags, check_random_state
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ArgumentError(
        f"CircuitDensity: expected scikit-learn >= 1.6, which is not there ({error}); pip install 'unfactor[sklearn]'"
    ) from error

StructureName = Literal["mixture", "fully_factorized", "hmm", "hclt"]
StructureBuilder = Callable[[Tensor, tuple[int, ...]], Circuit]
"""From data, int64 (N, D), and the number of categories of every variable to a circuit."""


def _has_classes(estimator: CircuitDensity) -> bool:
    return bool(estimator.classifier) or getattr(estimator, "classes_", None) is not None


class CircuitDensity(DensityMixin, BaseEstimator):
    """Estimate the density of discrete or binned data with a probabilistic circuit, exactly normalised.

    Integer columns are categories, and so are floating-point ones whose ``categories`` are given. Other floating-point
    columns are cut into bins of equal width over the range seen in training; the density is constant within a bin and
    falls off exponentially outside of the range. NaN is a missing value: it is summed out, in training and in scoring.
    With targets ``y`` one circuit is fitted per class, ``predict_proba`` is Bayes' rule, and ``score_samples`` is the
    density of the mixture of classes.

    Args:
        structure: "mixture", "fully_factorized", "hmm" (the columns are steps of one sequence), "hclt" (hidden Chow-Liu
            tree, learned from the data), or a function from data, int64 (N, D), and the number of categories of every
            column to a circuit.
        num_latents: states of the hidden variables; not used by "fully_factorized" and functions.
        categories: of integer data: "auto": the distinct values of a column in training, all others being impossible;
            or C, or one C per column: the values 0 to C - 1.
        num_bins: of floating-point data, per column.
        optimizer: a name, "em", "minibatch_em" or "anemone", or an object such as ``ct.learning.EM(frozen=...)``, see
            ``ct.learning.fit``.
        num_epochs: passes over the data, at most.
        tol: stop when an epoch gains less than this, in nats per sample, see ``ct.learning.fit``; None: do not.
        batch_size: the greatest number of samples a batch.
        pseudocount: smoothing, see ``ct.learning.fit``; None: the optimizer's default.
        device: where the circuits are.
        random_state: for initial weights and the order of batches: an integer, a ``RandomState``, or None.
        classifier: True: it is a classifier, to scikit-learn also before it is fitted: targets are needed, and
            ``score`` is the accuracy, as of all classifiers. False: targets are ignored. None: it becomes one by being
            fitted with targets, and ``score`` stays the mean log-density.

    Attributes:
        circuits_: the fitted circuits, one per class, or one.
        fits_: what the fits measured, and why they stopped, one ``FitResult`` per circuit.
        classes_: the classes, sorted; None without targets.
        class_prior_: their share in the training data; None without targets.
        columns_: how values are encoded as categories.
        n_features_in_: D.
        feature_names_in_: names of the columns, if they had any.
    """

    classes_: Array | None

    def __init__(
        self,
        structure: StructureName | StructureBuilder = "mixture",
        *,
        num_latents: int = 8,
        categories: Literal["auto"] | int | Sequence[int] = "auto",
        num_bins: int = 16,
        optimizer: Literal["em", "minibatch_em", "anemone"] | Optimizer = "em",
        num_epochs: int = 30,
        tol: float | None = None,
        batch_size: int = 256,
        pseudocount: float | None = None,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
        classifier: bool | None = None,
    ) -> None:
        self.structure = structure
        self.num_latents = num_latents
        self.categories = categories
        self.num_bins = num_bins
        self.optimizer = optimizer
        self.num_epochs = num_epochs
        self.tol = tol
        self.batch_size = batch_size
        self.pseudocount = pseudocount
        self.device = device
        self.random_state = random_state
        self.classifier = classifier

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> CircuitDensity:
        """Fit the circuit, or one per class.

        Args:
            X: integers or floating-point numbers (N, D), NaN where missing.
            y: classes (N,), or None; ignored where ``classifier`` is False.
            sample_weight: how often each sample counts, (N,) >= 0.

        Raises:
            ValueError: data, targets or weights that do not fit, as scikit-learn reports them.
            ArgumentError: an option that does not fit (a ValueError too).
        """
        data = self._validated(X, reset=True)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, data)
        if weights is not None and bool((weights < 0).any()):
            raise ArgumentError(f"sample_weight: expected numbers >= 0, the least is {weights.min()}")
        labels = None if y is None or self.classifier is False else np.asarray(y)
        if labels is None and self.classifier:
            raise ArgumentError("y: expected the class of every sample, got None; requires y, or classifier=None")
        if labels is not None:
            check_classification_targets(labels)
            if labels.shape != (len(data),):
                raise ArgumentError(f"y: expected one class per sample, ({len(data)},), got shape {labels.shape}")
        if weights is not None:
            counted = weights > 0
            if not counted.any():
                raise ArgumentError("sample_weight: every weight is zero, so there is nothing to learn from")
            data, weights = data[counted], weights[counted]
            labels = None if labels is None else labels[counted]
        self.columns_ = columns_of(data, self.categories, self.num_bins, shared=self.structure == "hmm")
        encoded = self.columns_.encode(data)
        if not encoded.possible.all():
            raise ArgumentError(
                f"X: expected the values that categories={self.categories!r} allows, got {data[~encoded.possible][0]}"
            )
        random = check_random_state(self.random_state)
        if labels is None:
            self.classes_ = self.class_prior_ = None
            self._fit_circuits(encoded, [np.arange(len(data))], weights, random)
            return self
        self.classes_ = np.unique(labels)
        counts = np.ones(len(data)) if weights is None else weights
        self.class_prior_ = np.array([counts[labels == c].sum() for c in self.classes_]) / counts.sum()
        self._fit_circuits(encoded, [np.flatnonzero(labels == label) for label in self.classes_], weights, random)
        return self

    def _fit_circuits(
        self, encoded: Encoded, parts: list[Array], weights: Array | None, random: np.random.RandomState
    ) -> None:
        fitted = [self._fitted(encoded, rows, weights, random) for rows in parts]
        self.circuits_, self.fits_ = [pc for pc, _ in fitted], [result for _, result in fitted]

    def score_samples(self, X: Any) -> Array:
        """Return the log-density of samples, (N,), in nats; -inf outside of what training made possible."""
        joint = self._joint_log_density(X)
        return np.logaddexp.reduce(joint, axis=1)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the mean log-density of samples, in nats; the accuracy on classes y where ``classifier`` is True."""
        values = self.predict(X) == np.asarray(y) if self.classifier else self.score_samples(X)
        return float(np.average(values, weights=sample_weight))

    def aic(self, X: Any) -> float:
        """Return Akaike's information criterion on samples, ``2 k - 2 log p(X)`` of k numbers: less is better.

        Edges and tails of bins are not counted.
        """
        log_likelihood, num_free = self._fit_and_size(X)
        return 2 * num_free - 2 * float(log_likelihood.sum())

    def bic(self, X: Any) -> float:
        """Return the Bayesian information criterion on N samples, ``k log N - 2 log p(X)``: less is better."""
        log_likelihood, num_free = self._fit_and_size(X)
        return num_free * float(np.log(len(log_likelihood))) - 2 * float(log_likelihood.sum())

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> Array:
        """Draw samples, (n_samples, D): values of integer columns, numbers uniform within their bin of others.

        Args:
            n_samples: how many.
            random_state: the estimator's own when None.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, (int, np.integer)) or n_samples < 1:
            raise ArgumentError(f"n_samples: expected an integer >= 1, got {n_samples!r}")
        random = check_random_state(self.random_state if random_state is None else random_state)
        counts = [n_samples] if self.class_prior_ is None else random.multinomial(n_samples, self.class_prior_)
        draws = []
        for pc, count in zip(self.circuits_, counts, strict=True):
            generator = torch.Generator(pc.device).manual_seed(int(random.randint(2**31 - 1)))
            if count:
                draws.append(queries.sample(pc, int(count), generator=generator).cpu().numpy())
        return self.columns_.decode(random.permutation(np.concatenate(draws)), random)

    @available_if(_has_classes)
    def predict_proba(self, X: Any) -> Array:
        """Return p(class | sample), (N, number of classes), in the order of ``classes_``.

        A sample that no class makes possible gets the classes' shares in the training data.
        """
        joint = self._joint_log_density(X)
        joint = np.where(np.isneginf(joint).all(axis=1, keepdims=True), self._log_prior(), joint)
        posterior = np.exp(joint - joint.max(axis=1, keepdims=True))
        return posterior / posterior.sum(axis=1, keepdims=True)

    @available_if(_has_classes)
    def predict(self, X: Any) -> Array:
        """Return the most probable class of every sample, (N,)."""
        assert self.classes_ is not None
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that NaN is welcome, and that what was fitted with targets is a classifier."""
        tags = super().__sklearn_tags__()
        if _has_classes(self):
            tags.target_tags.required = bool(self.classifier)
            tags.estimator_type, tags.classifier_tags = "classifier", ClassifierTags()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        return tags

    def _validated(self, X: Any, *, reset: bool) -> Array:
        data: Array = validate_data(self, X, reset=reset, dtype="numeric", ensure_all_finite="allow-nan")
        if data.dtype.kind not in "biuf":
            raise ArgumentError(f"X: expected integers or floating-point numbers, got {data.dtype}")
        if data.dtype.kind == "f":
            return data.astype(np.float64)
        if data.dtype.kind == "u" and data.max() > np.iinfo(np.int64).max:
            raise ArgumentError(f"X: expected integers below 2^63, got {data.max()}")
        return data.astype(np.int64)

    def _fit_and_size(self, X: Any) -> tuple[Array, int]:
        """Return the log-density of samples, and how many numbers it depends on; R classes have R - 1 shares."""
        log_density = self.score_samples(X)
        return log_density, sum(pc.num_free_parameters for pc in self.circuits_) + len(self.circuits_) - 1

    def _log_prior(self) -> Array:
        return np.zeros(1) if self.class_prior_ is None else np.log(self.class_prior_)

    def _joint_log_density(self, X: Any) -> Array:
        """Return log p(class) p(x | class), (N, number of circuits)."""
        check_is_fitted(self)
        data = self._validated(X, reset=False)
        encoded = self.columns_.encode(data)
        densities = [self._log_density(pc, encoded) for pc in self.circuits_]
        return np.stack(densities, axis=1) + self._log_prior()

    @torch.no_grad()
    def _log_density(self, pc: CompiledCircuit, encoded: Encoded) -> Array:
        parts = []
        for start in range(0, len(encoded.codes), self.batch_size):
            rows = slice(start, start + self.batch_size)
            x, observed = torch.from_numpy(encoded.codes[rows]), torch.from_numpy(encoded.observed[rows])
            parts.append(pc.log_partition(Evidence.observe(x, observed).to(pc.device)).cpu().numpy())
        return np.where(encoded.possible, np.concatenate(parts) - encoded.log_volume, -np.inf)

    def _fitted(
        self, encoded: Encoded, rows: Array, weights: Array | None, random: np.random.RandomState
    ) -> tuple[CompiledCircuit, FitResult]:
        codes, observed = torch.from_numpy(encoded.codes[rows]), torch.from_numpy(encoded.observed[rows])
        counts = None if weights is None else torch.from_numpy(weights[rows].astype(np.float64))
        circuit = self._circuit(codes, observed, counts)
        seed = int(random.randint(2**31 - 1))
        pc = compile(circuit, device=self.device, dtype=torch.float64, seed=seed)
        options: dict[str, Any] = {} if self.pseudocount is None else {"pseudocount": self.pseudocount}
        if isinstance(self.optimizer, str):
            options["seed"] = seed
        result = fit(
            pc,
            Samples(codes, None if bool(observed.all()) else observed, counts),
            optimizer=self.optimizer,
            num_epochs=self.num_epochs,
            tol=self.tol,
            batch_size=self.batch_size,
            progress=False,
            **options,
        )
        return pc, result

    def _circuit(self, codes: Tensor, observed: Tensor, counts: Tensor | None) -> Circuit:
        num_categories = self.columns_.num_categories
        num_vars = len(num_categories)
        if callable(self.structure):
            circuit = self.structure(codes, num_categories)
            if not isinstance(circuit, Circuit) or circuit.num_categories != num_categories or circuit.num_classes:
                got = f"{circuit} with {circuit.num_categories}" if isinstance(circuit, Circuit) else f"{circuit!r:.60}"
                raise ArgumentError(
                    f"structure: expected a function that returns a ct.Circuit without classes over variables with "
                    f"{num_categories} categories, got {got}"
                )
            return circuit
        if self.structure == "mixture":
            return structures.mixture(num_vars, num_categories, self.num_latents)
        if self.structure == "fully_factorized":
            return structures.fully_factorized(num_vars, num_categories)
        if self.structure == "hmm":
            return structures.hmm(num_vars, self.num_latents, max(num_categories))
        if self.structure == "hclt":
            return structures.hclt(codes, self.num_latents, num_categories, weights=counts, observed=observed)
        raise ArgumentError(
            f"structure: expected 'mixture', 'fully_factorized', 'hmm', 'hclt' or a function, got {self.structure!r}"
        )
