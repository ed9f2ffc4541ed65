"""The coupled output layer: a circuit, and when and how it is used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import torch
from torch import Tensor, nn

import circuits as ct
from circuits import CompiledCircuit
from circuits.arguments import checked_count, checked_temperature
from circuits.files import check_finite, file_hash, not_finite, read_tensors, write_tensors
from circuits.interop import find_jpc, load_jpc
from circuits.precision import outside_inference_mode, own_precision
from circuits.reading import Range, unreadable
from circuits.store import Manifest, read_folder, replace_folder, write_manifest
from diffusion.blocks import check_circuit
from diffusion.conditioners import Conditioned, Conditioner, MarginalMatching, NoiseCalibration
from diffusion.conditioners.base import built, check_told, described
from diffusion.coupling import CoupledDistribution, Normalization
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.prediction import Prediction, check_token_ids
from diffusion.publishing import OnHub, named, options_of, read_settings
from diffusion.vocabulary import Coupled, MappedDistribution, Vocabulary, check_padding, checked_vocabulary

if TYPE_CHECKING:
    from circuits import CircuitWeights

FORMAT = "unfactor-coupled-head"
FORMAT_VERSION = 3  # 1 had no hash of what the file holds, and a calibration at most; 2 no tokenizer or vocabulary
_FILE = "head.safetensors"
_WAY_OUT = "save the head again"


class CoupledHead(OnHub, nn.Module):
    """A compiled circuit as the output layer of a masked-token predictor: a circuit and what conditions it.

    Training, scoring and decoding build their distributions with :meth:`distribution`, so that whatever the head is set
    to holds in all three.

    Args:
        pc: a circuit over the L positions of a block, V categories each; its parameters are this module's.
        activation_threshold: gamma, for decoding; the circuit is used for sequences whose share of masked positions in
            the block is below it (at very high noise a static circuit can hurt), for all sequences when it is 1 or
            more, as by default.
        temperature: tau >= 0 of decoding where none is given there; 1 leaves it to decoding's default, 0.
        normalization: "global" or "local", see :mod:`diffusion.coupling`.
        top_k: evidence on the k best tokens only; None: on all.
        conditioners: what makes the product depend on the noise level and the context, applied in this order, see
            :class:`~diffusion.conditioners.base.Conditioner`; their parameters are this module's too. None of them: the
            plain product.
        calibration: a :class:`~diffusion.conditioners.noise_calibration.NoiseCalibration` to go before the
            conditioners; the same as naming it there.
        vocabulary: the denoiser's id of each of the circuit's C categories, distinct; every other token has probability
            zero. None: the categories are the denoiser's first C tokens, and it has no more but forbidden ones.
        tokenizer_fingerprint: of the tokenizer whose ids these are, see
            :func:`~diffusion.fingerprint.tokenizer_fingerprint`; None: that of the first denoiser that the head is
            fitted to, if it knows its own.
        decoding: a ``df.DecodingConfig``, or its options by name: what decoding with this head takes where nothing else
            is said. None: the library's defaults.

    Raises:
        ArgumentError: an argument has a wrong type or value, or a conditioner does not fit the circuit.
    """

    def __init__(
        self,
        pc: CompiledCircuit,
        activation_threshold: float = 1.0,
        temperature: float = 1.0,
        *,
        normalization: Normalization = "global",
        top_k: int | None = None,
        conditioners: Sequence[Conditioner] = (),
        calibration: NoiseCalibration | None = None,
        vocabulary: Sequence[int] | Tensor | None = None,
        tokenizer_fingerprint: str | None = None,
        decoding: Any = None,
    ) -> None:
        super().__init__()
        check_circuit(pc)
        if not activation_threshold >= 0:
            raise ArgumentError(f"activation_threshold: expected a number >= 0, got {activation_threshold!r}")
        if normalization not in get_args(Normalization):
            raise ArgumentError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}")
        checked_temperature(temperature)
        if top_k is not None:
            checked_count("top_k", top_k)
            if top_k > max(pc.circuit.num_categories):
                raise ArgumentError(
                    f"top_k: expected at most the circuit's {max(pc.circuit.num_categories)} categories, got {top_k}"
                )
        if not isinstance(conditioners, Sequence):
            raise ArgumentError(f"conditioners: expected a list of them, got {type(conditioners).__name__}")
        chosen = [*([] if calibration is None else [calibration]), *conditioners]
        for conditioner in chosen:
            if not isinstance(conditioner, Conditioner):
                raise ArgumentError(f"conditioners: expected df.Conditioner modules, got {type(conditioner).__name__}")
            conditioner.check(pc)
        if sum(isinstance(one, MarginalMatching) for one in chosen) > 1:
            raise ArgumentError("conditioners: expected at most one df.MarginalMatching, got more; give it more steps")
        self.pc = pc
        self.activation_threshold = activation_threshold
        self.temperature = temperature
        self.normalization = normalization
        self.top_k = top_k
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.decoding = {} if decoding is None else options_of(decoding)
        self.conditioners: Iterable[Conditioner] = cast(Any, nn.ModuleList(chosen))
        ids = None if vocabulary is None else checked_vocabulary(vocabulary, pc)
        self.register_buffer("vocabulary", ids, persistent=False)

    vocabulary: Tensor | None
    """The denoiser's ids of the circuit's categories, int64 (C,), or None."""

    @property
    def calibration(self) -> NoiseCalibration | None:
        """The first calibration among the conditioners, or None."""
        return next((made for made in self.conditioners if isinstance(made, NoiseCalibration)), None)

    @property
    def needs_features(self) -> bool:
        """Whether a conditioner looks at the denoiser's hidden states."""
        return any(conditioner.needs_features for conditioner in self.conditioners)

    @property
    def needs_observed(self) -> bool:
        """Whether a conditioner looks at what the denoiser says of observed positions."""
        return any(conditioner.needs_observed for conditioner in self.conditioners)

    @property
    def vocab_size(self) -> int:
        """C, the number of the circuit's categories: V, where all of the denoiser's tokens have one."""
        return max(self.pc.circuit.num_categories)

    @property
    def block_length(self) -> int:
        """L, the number of positions the circuit is over."""
        return self.pc.circuit.num_vars

    def forward(self, prediction: Prediction | Tensor, tokens: Tensor, masked: Tensor) -> Coupled:
        """Return the joint distribution of a block; see :meth:`distribution`."""
        return self.distribution(prediction, tokens, masked)

    @outside_inference_mode
    def distribution(
        self,
        prediction: Prediction | Tensor,
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        *,
        include: Tensor | None = None,  # shape: (B, L)
        absent: Tensor | None = None,  # shape: (B, L)
        keeps_list: bool = False,
        weights: CircuitWeights | None = None,
    ) -> Coupled:
        """Return the joint distribution of B blocks: what training, scoring and decoding ask.

        Args:
            prediction: what the denoiser says about the blocks, or its logits, (B, L, V).
            tokens: int64; entries at masked positions are ignored.
            masked: bool, True where a token is to be predicted.
            include: int64, tokens that ``top_k`` must not drop, for instance the true ones in training.
            absent: bool, positions that a shorter block does not have; they are summed out.
            keeps_list: whether the prediction is listed as it should be, with no regard to ``top_k``.
            weights: the circuit's, ``pc.weights()``, where the caller has read them; None: they are read, and compared
                with what was kept, now.

        Raises:
            ArgumentError: shapes or dtypes that do not fit, or a conditioner misses the denoiser's features.
        """
        if isinstance(prediction, Tensor):
            prediction = Prediction.from_logits(prediction.to(self.pc.dtype), masked)
        if self.vocabulary is None and prediction.vocab_size == self.vocab_size:
            return self._of_categories(prediction, tokens, masked, include, absent, keeps_list, weights)
        vocabulary = self._vocabulary_of(prediction, masked)
        here = masked if absent is None else masked & ~absent
        known = vocabulary.known("tokens", tokens, ~masked if absent is None else ~masked & ~absent)
        included = None if include is None else vocabulary.categories(include).clamp_min(0)
        narrowed = vocabulary.narrowed(prediction, here)
        dist = self._of_categories(narrowed, known, masked, included, absent, keeps_list, weights)
        return MappedDistribution(dist, vocabulary, tokens)

    def _vocabulary_of(self, prediction: Prediction, masked: Tensor) -> Vocabulary:
        if self.vocabulary is None:
            check_padding(prediction, masked, self.vocab_size)
        return self.vocabulary_in(prediction.vocab_size)

    def _of_categories(
        self,
        prediction: Prediction,
        tokens: Tensor,
        masked: Tensor,
        include: Tensor | None,
        absent: Tensor | None,
        keeps_list: bool,
        weights: CircuitWeights | None,
    ) -> CoupledDistribution:
        if self.top_k is not None and not keeps_list:
            prediction = prediction.listed(self.top_k, include)
        conditioned = self.condition(prediction, masked)
        if conditioned.weights:
            weights = self.pc.weights(external=conditioned.weights)
        coupled = CoupledDistribution.of(
            self.pc,
            conditioned.prediction,
            tokens,
            masked,
            normalization=self.normalization,
            latents=conditioned.latents,
            weights=weights,
            absent=absent,
        )
        for conditioner in self.conditioners:
            coupled = conditioner.refined(coupled)
        return coupled

    @own_precision
    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Apply the conditioners in order; factors of a changed prediction are normalised, which no result depends on.

        Args:
            prediction: of all tokens, or of listed ones.
            masked: bool (B, L).
        """
        check_told(prediction, self.conditioners)
        conditioned = Conditioned(prediction)
        for conditioner in self.conditioners:
            conditioned = conditioned.then(conditioner.condition(conditioned.prediction, masked))
        if conditioned.prediction is prediction:
            return conditioned
        return replace(conditioned, prediction=conditioned.prediction.normalised())

    def vocabulary_in(self, num_tokens: int) -> Vocabulary:
        """Return which of a denoiser's V tokens the categories are; raises ArgumentError if the denoiser has fewer."""
        ids = torch.arange(self.vocab_size, device=self.pc.device) if self.vocabulary is None else self.vocabulary
        return Vocabulary(ids, num_tokens)

    def unknown_ids(self, num_tokens: int, forbidden_ids: Sequence[int]) -> list[int]:
        """Return which of a denoiser's V tokens have no category.

        Args:
            num_tokens: V.
            forbidden_ids: those that it never predicts.

        Raises:
            ArgumentError: the head is for another vocabulary: it has more tokens, or none for one that is predicted,
                and does not say which ones it is about.
        """
        known = range(self.vocab_size) if self.vocabulary is None else self.vocabulary.tolist()
        unknown = set(range(num_tokens)).difference(known)
        is_wider = max(known) >= num_tokens or {self.vocab_size} != set(self.pc.circuit.num_categories)
        if is_wider or (self.vocabulary is None and not unknown.issubset(forbidden_ids)):
            raise ArgumentError(
                f"head: expected one over the denoiser's {num_tokens} tokens, got {self.vocab_size}; fit one on this "
                "denoiser's tokens, or say which of them it is about, df.CoupledHead(pc, vocabulary=...)"
            )
        return sorted(unknown)

    def spec_for(self, spec: DenoiserSpec) -> DenoiserSpec:
        """Return a denoiser's spec with all tokens forbidden that have no category: what decoding with this head obeys.

        Raises ArgumentError if the head is for another vocabulary, see :meth:`unknown_ids`.
        """
        unknown = self.unknown_ids(spec.vocab_size, spec.forbidden_ids)
        return replace(spec, forbidden_ids=tuple(sorted({*spec.forbidden_ids, *unknown})))

    def check_tokenizer(self, fingerprint: str | None) -> None:
        """Raise ArgumentError if the head was trained with a tokenizer of another fingerprint; None: unknown."""
        own = self.tokenizer_fingerprint
        if own is not None and fingerprint is not None and own != fingerprint:
            raise ArgumentError(
                f"head: expected one for the tokenizer {fingerprint}, got one for {own}, whose ids mean other tokens; "
                "take the model that it was trained with, or fit a head to this one (if only names of tokens changed: "
                "head.tokenizer_fingerprint = None)"
            )

    def conditional_log_likelihood(self, prediction: Prediction | Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return ``CLL = log p_hat(x_M | x_O)`` of the true tokens ``targets``, int64 (B, L): (B,), in nats.

        Raises:
            ArgumentError: shapes that do not fit, or a target that is no token: the observed ones are conditioned on.
        """
        size = prediction.shape[-1] if isinstance(prediction, Tensor) else prediction.vocab_size
        check_token_ids("targets", targets, masked.shape, size)
        return self.distribution(prediction, targets, masked, include=targets).log_prob(targets)

    def save(self, path: str | os.PathLike[str], *, made_from: Any = None) -> None:
        """Write a folder: the circuit in ``circuit/``, settings and conditioners in ``head.safetensors``; no pickle.

        The folder is swapped in as a whole: whoever loads it, at any time, gets the version before or this one.

        Args:
            path: the folder to write; it may be absent, empty, or hold a saved head, which is replaced.
            made_from: what it was made from, to be kept in the manifest; anything that JSON can hold.

        Raises:
            ArgumentError: ``path`` holds something else, a weight is NaN or infinite, or a conditioner is not
                registered.
            StorageError: it cannot be written: no space, no permission, ...
        """
        tensors = cast(nn.Module, self.conditioners).state_dict()
        if self.vocabulary is not None:
            tensors["vocabulary"] = self.vocabulary
        bad = not_finite(tensors)
        if bad is not None:
            raise ArgumentError(f"head: {bad} has NaN or infinite numbers; such a head cannot be saved")
        with replace_folder(path, ("circuit", _FILE), kind="a saved head") as folder:
            ct.save(self.pc, folder / "circuit")
            metadata = {
                "settings": json.dumps({name: getattr(self, name) for name in SETTINGS}),
                "conditioners": json.dumps([described(conditioner) for conditioner in self.conditioners]),
                "circuit_sha256": circuit_hash(folder),
            }
            write_tensors(folder / _FILE, tensors, format=FORMAT, version=FORMAT_VERSION, metadata=metadata)
            write_manifest(folder, format=FORMAT, version=FORMAT_VERSION, made_from=made_from)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> CoupledHead:
        """Read what :meth:`save` wrote, in single or double precision as it was.

        Raises CheckpointError if a file is missing, corrupt, of a newer format, or does not belong to the others.
        """
        return read_folder(path, cls._loaded, format=FORMAT).to(device)

    @classmethod
    def from_jpc(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        **settings: Any,
    ) -> CoupledHead:
        """Make a head of a circuit that PyJuice wrote, such as those of CoDD. Nothing in the file is executed.

        Args:
            path_or_repo: a ``.jpc`` file, or a folder or repository with one; see also :func:`diffusion.codd.load`.
            device: where the circuit goes.
            dtype: torch.float32 or torch.float64.
            revision: branch, tag or commit of the repository.
            settings: of the head, ``activation_threshold=0.5`` for instance.

        Raises:
            CheckpointError: there is no such file, or it is corrupt or hostile.
        """
        return cls(load_jpc(find_jpc(path_or_repo, revision=revision), device=device, dtype=dtype), **settings)

    @classmethod
    def _loaded(cls, folder: Path, manifest: Manifest) -> CoupledHead:
        versions, is_verified = (1, 2, FORMAT_VERSION), _FILE in manifest.files
        metadata, tensors = read_tensors(
            folder / _FILE, format=FORMAT, versions=versions, way_out=_WAY_OUT, unhashed=(1,), is_verified=is_verified
        )
        if metadata.get("circuit_sha256") != circuit_hash(folder):
            raise CheckpointError(
                f"{folder / _FILE}: expected a head of the circuit beside it, got that of another; {_WAY_OUT}"
            )
        check_finite(tensors, folder / _FILE, way_out=_WAY_OUT)
        with named(folder / _FILE, _WAY_OUT):
            given, decoding = read_settings(_Settings, metadata)
            vocabulary, made = tensors.pop("vocabulary", None), built(metadata.get("conditioners"), tensors)
            options = vars(given) | {"decoding": decoding, "vocabulary": vocabulary, "conditioners": made}
            return cls(ct.load(folder / "circuit"), **options)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a file says of a head beside tensors, conditioners and options of decoding; older ones lack some."""

    activation_threshold: Annotated[float, Range(0.0, math.inf)] = 1.0
    temperature: float = 1.0
    normalization: Normalization = "global"
    top_k: int | None = None
    tokenizer_fingerprint: str | None = None


SETTINGS = (*(field.name for field in fields(_Settings)), "decoding")


def circuit_hash(folder: Path) -> str:
    """Return a hash of the structure file of a head's circuit, which holds the hash of the weights."""
    try:
        return file_hash(folder / "circuit" / "structure.json")
    except OSError as error:
        raise unreadable(folder / "circuit", error, way_out=_WAY_OUT) from error
