"""Latent variable distillation: a circuit starts from the latent states that another model found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.learning import EM, Samples, fit
from circuits.learning.samples import Rows
from circuits.symbolic import Input, Sum


def distill_latents(
    pc: CompiledCircuit,
    data: Samples | Rows,  # shape: (N, D)
    states: Mapping[str | Input | Sum, Tensor],  # each of shape: (N,)
    *,
    pseudocount: float = 1.0,
    batch_size: int = 256,
    **options: Any,
) -> None:
    """Do one EM step in which some latent variables are known, in place: latent variable distillation.

    The states may come from any model that sees more than the circuit does, such as clusters of a neural network's
    features (Liu, Zhang, Van den Broeck 2023, "Scaling Up Probabilistic Circuits by Latent Variable Distillation").
    Latents without states are inferred as always. More steps are ``ct.learning.fit`` on ``ct.learning.Samples(x,
    latents=states)``.

    Args:
        pc: the circuit.
        data: values (N, D), or ``ct.learning.Samples`` without latents.
        states: int64 (N,) by node or its name, -1 where unknown, see ``ct.learning.Samples``. In a mixture, a hidden
            Markov model or a latent tree, the unit of the input node of a variable is the state of its latent.
        pseudocount: a >= 0, see ``ct.learning.em_step``.
        batch_size: the greatest number of samples a batch.
        options: ``observed``, ``sample_weights`` and ``labels``, as ``ct.learning.fit`` takes them.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
        ImpossibleEvidenceError: all samples have probability zero with these states.
    """
    samples = replace(data if isinstance(data, Samples) else Samples(data), latents=states)
    optimizer = EM(pseudocount=pseudocount)
    fit(pc, samples, optimizer=optimizer, num_epochs=1, batch_size=batch_size, progress=False, **options)
