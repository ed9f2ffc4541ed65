"""Hard flows: how often the most probable explanations use each weight, for Viterbi training."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.semirings import LogSemiring, MaxSemiring
from circuits.evidence import Evidence
from circuits.learning.em import ExpectedFlows, checked_sample_weights, flows_of_nothing, traced_weights
from circuits.precision import own_precision
from circuits.queries.common import refuse_relative


@own_precision
def viterbi_flows(
    pc: CompiledCircuit,
    evidence: Evidence | Tensor,
    sample_weights: Tensor | None = None,  # shape: (B,)
) -> ExpectedFlows:
    """Return how often the samples' most probable latent choices use each weight, and the log-scores of these.

    An EM step from them is one of hard EM, or Viterbi training (Juang and Rabiner 1990), which never lowers the sum of
    the scores ``max_z log p(x, z)``. The flows are the gradient of the upward pass in the max semiring; equally good
    choices share a sample. The choices are those of sum units alone: missing and soft variables are summed out,
    and so are latents all of whose variables are missing.

    Args:
        pc: the circuit.
        evidence: for B samples, or complete assignments, int64 (B, D).
        sample_weights: how often sample b counts, (B,) >= 0; once when omitted.

    Returns:
        ``(flows, log_likelihood)``: per bank, and the scores, (B,), in the place of the log-likelihoods.

    Raises:
        ArgumentError: evidence or sample weights do not fit.
        PropertyError: the evidence is relative to other evidence.
    """
    given = evidence if isinstance(evidence, Evidence) else Evidence.observe(evidence)
    refuse_relative(given, "counting flows")
    if not given.batch_size:
        return flows_of_nothing(pc)
    with torch.inference_mode(False), torch.enable_grad():
        traced, sources = traced_weights(pc)
        question, log_level = Question(pc, given, traced).levelled()
        score = question.with_inputs(question.inputs(LogSemiring())).root(MaxSemiring())
        counts = (score != -torch.inf).to(score.dtype)
        if sample_weights is not None:
            counts = counts * checked_sample_weights(sample_weights, score)
        flows = torch.autograd.grad(score, list(sources.values()), counts, allow_unused=True, materialize_grads=True)
    return ExpectedFlows(dict(zip(sources, flows, strict=True)), score.detach() + log_level.to(score))
