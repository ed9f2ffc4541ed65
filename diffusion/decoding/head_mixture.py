"""A mixture of the plain prediction and of heads, weighed by the mask ratio.

    p_hat(x) = g_0(r) prod_i q_i(x_i) + sum_k g_k(r) p_hat_k(x),      g = softmax of log-weights, piecewise linear in r

Every head has a circuit, a calibration and conditioners of its own, so it says more than the components of one circuit
(:class:`~diffusion.conditioners.mixture_weights.MixtureWeights`), which share what they are multiplied with; it costs
as much as its heads together. With weights that were fitted well it is no worse than the best of them at any ratio.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from circuits.arguments import checked_count, checked_number, kind_of
from circuits.files import check_finite, not_finite, read_tensors, write_tensors
from circuits.precision import own_precision
from circuits.reading import Range
from circuits.store import MANIFEST, Manifest, read_folder, replace_folder, write_manifest
from diffusion.conditioners.context import at_mask_ratio
from diffusion.decoding.constraints.coupled import check_chain
from diffusion.decoding.mixed_distribution import MixedDistribution, PlainDistribution
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction, check_token_ids
from diffusion.publishing import FILES, OnHub, facts, named, options_of, read_settings

FORMAT = "unfactor-head-mixture"
FORMAT_VERSION = 1
MIXTURE_FILE = "mixture.safetensors"
_MAX_HEADS = 32
_WAY_OUT = "save the mixture again"


class Examples(Protocol):
    """Blocks whose tokens are known: a batch of a :class:`~diffusion.training.logit_cache.LogitCache`."""

    @property
    def prediction(self) -> Prediction: ...  # noqa: D102
    @property
    def tokens(self) -> Tensor: ...  # noqa: D102
    @property
    def masked(self) -> Tensor: ...  # noqa: D102


class HeadMixture(OnHub, nn.Module):
    """A mixture of the plain prediction and of fitted heads; a joint output layer like each of them.

    Draws, marginals and conditionals are exact at temperature 1. At another, the component is drawn from the weights to
    the power 1 / tau, and its tokens as it draws them at tau; at 0 it is the likeliest of the components' best texts.
    Under a constraint the circuits of all heads have to be chains; a component gains by what it foresaw of it. A head
    with :class:`~diffusion.conditioners.circuit_alone.CircuitAlone` makes the circuit alone a component. Activation
    thresholds, temperatures and options of decoding of single heads do not count here.

    Args:
        heads: K of them, up to 32, over as many positions.
        vocab_size: V of the denoiser; None: that of the heads' circuits.
        num_knots: M >= 2; log-weights are given at M evenly spaced mask ratios from 0 to 1, and linear in between.
        decoding: what decoding with it takes where nothing else is said, see :class:`diffusion.CoupledHead`.

    Attributes:
        log_weights: (M, 1 + K), first those of the plain prediction; 0 at first.

    Raises:
        ArgumentError: there are no heads, or they do not fit together.
    """

    activation_threshold: ClassVar[float] = 1.0
    temperature: ClassVar[float] = 1.0
    top_k: ClassVar[int | None] = None
    downloaded: ClassVar[tuple[str, ...]] = (MIXTURE_FILE, *(f"head*/{name}" for name in FILES), MANIFEST)

    def __init__(
        self,
        heads: Sequence[CoupledHead],
        *,
        vocab_size: int | None = None,
        num_knots: int = 9,
        decoding: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(heads, Sequence) or not heads or not all(isinstance(one, CoupledHead) for one in heads):
            raise ArgumentError(f"heads: expected one or more df.CoupledHead, got {heads!r:.60}")
        if len(heads) > _MAX_HEADS:
            raise ArgumentError(f"heads: expected at most {_MAX_HEADS}, got {len(heads)}; leave some out")
        if vocab_size is not None:
            checked_count("vocab_size", vocab_size)
        sizes = {(one.block_length, one.vocab_size if vocab_size is None else vocab_size) for one in heads}
        if len(sizes) > 1:
            raise ArgumentError(f"heads: expected as many positions and tokens in all of them, got {sorted(sizes)}")
        ((self.block_length, self.vocab_size),) = sizes
        self.decoding = {} if decoding is None else options_of(decoding)
        self.heads = cast(Sequence[CoupledHead], nn.ModuleList(heads))
        knots = torch.zeros(checked_count("num_knots", num_knots, 2), 1 + len(heads), dtype=heads[0].pc.dtype)
        self.log_weights = nn.Parameter(knots.to(heads[0].pc.device))

    @property
    def needs_features(self) -> bool:
        """Whether one of the heads looks at the denoiser's hidden states."""
        return any(head.needs_features for head in self.heads)

    @own_precision
    def distribution(
        self,
        prediction: Prediction | Tensor,
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        *,
        include: Tensor | None = None,  # shape: (B, L)
        absent: Tensor | None = None,  # shape: (B, L)
        keeps_list: bool = False,
    ) -> MixedDistribution:
        """Return the joint distribution of B blocks, see :meth:`diffusion.CoupledHead.distribution`.

        ``keeps_list`` changes nothing: heads list what their own ``top_k`` says, under a constraint too.
        """
        masked = masked if absent is None else masked & ~absent
        if isinstance(prediction, Tensor):
            prediction = Prediction.from_logits(prediction.to(self.log_weights.dtype), masked)
        asked: dict[str, Any] = {"include": include, "absent": absent}
        parts = [head.distribution(prediction, tokens, masked, **asked) for head in self.heads]
        log_weights = at_mask_ratio(masked, self.log_weights)[0].log_softmax(1)
        known = ~masked if absent is None else ~masked & ~absent
        said = replace(prediction.whole(), log_q=prediction.dense().to(log_weights), values=None)
        sure = said.with_observed(tokens, known)
        plain = PlainDistribution(sure, tokens, masked, absent)
        return MixedDistribution((plain, *parts), log_weights, sure, tokens, masked)

    def conditional_log_likelihood(self, prediction: Prediction | Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return that of the true tokens, (B,), in nats, as :meth:`diffusion.CoupledHead` has it."""
        size = prediction.shape[-1] if isinstance(prediction, Tensor) else prediction.vocab_size
        check_token_ids("targets", targets, masked.shape, size)
        return self.distribution(prediction, targets, masked, include=targets).log_prob(targets)

    def check_constraint(self) -> None:
        """Raise ArgumentError unless the circuits of all heads are chains: then it is exact under a constraint too."""
        for head in self.heads:
            check_chain(head.pc)

    def check_tokenizer(self, fingerprint: str | None) -> None:
        """Raise ArgumentError if a head was trained with a tokenizer of another fingerprint; None: unknown."""
        for head in self.heads:
            head.check_tokenizer(fingerprint)

    def save(self, path: str | os.PathLike[str], *, made_from: Any = None) -> None:
        """Write a folder: the heads in ``head0/``, ``head1/``, ..., the weights in ``mixture.safetensors``; no pickle.

        The folder is swapped in as a whole. Arguments and errors are those of :meth:`diffusion.CoupledHead.save`.
        """
        tensors = {"log_weights": self.log_weights}
        if not_finite(tensors) is not None:
            raise ArgumentError("log_weights: expected finite numbers, got NaN or infinite ones; fit them again")
        names = (MIXTURE_FILE, *map("head{}".format, range(_MAX_HEADS)))
        with replace_folder(path, names, kind="a saved mixture of heads") as folder:
            for number, head in enumerate(self.heads):
                head.save(folder / f"head{number}")
            settings = {"num_heads": len(self.heads), "vocab_size": self.vocab_size, "decoding": self.decoding}
            metadata = {"settings": json.dumps(settings)}
            write_tensors(folder / MIXTURE_FILE, tensors, format=FORMAT, version=FORMAT_VERSION, metadata=metadata)
            write_manifest(folder, format=FORMAT, version=FORMAT_VERSION, made_from=made_from)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> HeadMixture:
        """Read what :meth:`save` wrote.

        Raises CheckpointError if a file is missing, corrupt, of a newer format, or does not belong to the others.
        """
        return read_folder(path, cls._loaded, format=FORMAT).to(device)

    @classmethod
    def _loaded(cls, folder: Path, manifest: Manifest) -> HeadMixture:
        metadata, tensors = read_tensors(
            folder / MIXTURE_FILE,
            format=FORMAT,
            versions=(FORMAT_VERSION,),
            way_out=_WAY_OUT,
            is_verified=MIXTURE_FILE in manifest.files,
        )
        check_finite(tensors, folder / MIXTURE_FILE, way_out=_WAY_OUT)
        with named(folder / MIXTURE_FILE, _WAY_OUT):
            said, decoding = read_settings(_Settings, metadata)
            if decoding is None:
                raise KeyError("decoding")
            heads = [CoupledHead.load(folder / f"head{number}") for number in range(said.num_heads)]
            log_weights = tensors["log_weights"]
            mixture = cls(heads, vocab_size=said.vocab_size, num_knots=len(log_weights), decoding=decoding)
            mixture.load_state_dict({**mixture.state_dict(), "log_weights": log_weights})
            return mixture

    def files(self) -> tuple[str, ...]:
        """Return the names of its files, the manifest last."""
        return (
            MIXTURE_FILE,
            *(f"head{number}/{name}" for number in range(len(self.heads)) for name in FILES),
            MANIFEST,
        )

    def facts(self) -> dict[str, str]:
        """Return what a model card says about it."""
        of = [f"{said['circuit']}, conditioners: {said['conditioners']}" for said in map(facts, self.heads)]
        return {"a mixture of": "; ".join(["the plain prediction", *of])}

    def fit(self, batches: Iterable[Examples], *, decay: float = 1e-3) -> HeadMixture:
        """Set the weights to those of maximum likelihood on some blocks; return the mixture.

        Each block counts once, however much of it is masked: a component that no block prefers is then left out of
        draws too, while per masked token it would cost next to nothing to keep it.

        Args:
            batches: of blocks that the heads were not fitted on, such as ``[cache.batch(slice(None))]`` of a cache for
                validation.
            decay: of the squares of log-weights, which keeps those that no block speaks of equal.

        Raises:
            ArgumentError: these are no batches, a block is impossible under prediction and heads alike, none has masked
                tokens, or the decay is no number >= 0.
        """
        checked_number("decay", decay)
        if not isinstance(batches, Iterable):
            raise ArgumentError(
                f"batches: expected some, each with prediction, tokens and masked, got {kind_of(batches)}; of a cache "
                "give [cache.batch(slice(None))]"
            )
        scores, ratios = [], []
        with torch.no_grad():
            for batch in batches:
                parts = self.distribution(batch.prediction, batch.tokens, batch.masked).parts
                some = batch.masked.any(1)
                scores.append(torch.stack([part.log_prob(batch.tokens) for part in parts], 1)[some])
                ratios.append(batch.masked[some])
        if not any(map(len, ratios)):
            raise ArgumentError(
                "batches: expected blocks with masked tokens, got none; take those of a validation cache"
            )
        masked, given = torch.cat(ratios), torch.cat(scores)
        if not bool((given > -torch.inf).any(1).all()):
            raise ArgumentError(
                "batches: expected blocks that the prediction or a head holds possible, got some with probability 0 "
                "under all; leave them out"
            )
        log_weights = self.log_weights.detach().double().requires_grad_()
        _fit_weights(log_weights, given.double(), masked, decay=decay)
        with torch.no_grad():
            self.log_weights.copy_(log_weights)
        return self


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a file says of a mixture beside its weights."""

    num_heads: Annotated[int, Range(1, _MAX_HEADS)]
    vocab_size: Annotated[int, Range(1, 1 << 40)]


@torch.enable_grad()
def _fit_weights(log_weights: Tensor, given: Tensor, masked: Tensor, *, decay: float) -> None:
    """Overwrite log-weights, (M, K), by those of maximum likelihood, by L-BFGS.

    Args:
        log_weights: a leaf that requires a gradient.
        given: log-probabilities of blocks under each component, (B, K).
        masked: bool (B, L); every block has masked tokens.
        decay: of the squares of log-weights.
    """
    optimizer = torch.optim.LBFGS([log_weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_prob = (at_mask_ratio(masked, log_weights)[0].log_softmax(1) + given).logsumexp(1)
        value = decay * log_weights.square().sum() - log_prob.mean()
        value.backward()
        return value

    optimizer.step(loss)
