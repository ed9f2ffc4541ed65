"""A head that does not listen to the denoiser: the circuit given what is visible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.prediction import NEGLIGIBLE, Prediction


@register("circuit_alone")
class CircuitAlone(Conditioner):
    """Makes all tokens that the prediction holds possible equally probable.

    The product with the circuit is then the circuit's own conditional, ``p(x | visible)``: a baseline, and a component
    of a :class:`~diffusion.decoding.head_mixture.HeadMixture` where much is masked and the denoiser knows little.
    """

    needs_observed = False

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction without what it prefers."""
        impossible = prediction.log_q <= NEGLIGIBLE
        equal = torch.zeros_like(prediction.log_q).masked_fill(impossible, -torch.inf)
        return Conditioned(replace(prediction, log_q=equal))

    def settings(self) -> dict[str, Any]:
        """Return nothing: it has no arguments."""
        return {}
