"""Tensors and evidence as the Python code that builds them, for messages and failing tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from circuits.evidence import Evidence

_MAX_SHOWN = 1000


def tensor_code(tensor: Tensor) -> str:
    """Return code that builds a tensor, to the last bit."""
    numbers = str(tensor.detach().tolist()).replace("inf", "torch.inf").replace("nan", "torch.nan")
    is_default = tensor.numel() > 0 and tensor.dtype in (torch.int64, torch.bool, torch.float32)
    return f"torch.tensor({numbers}{'' if is_default else f', dtype={tensor.dtype}'}{_device_code(tensor)})"


def evidence_code(evidence: Evidence) -> str:
    """Return code that builds evidence with the same factors, perhaps stored otherwise; a summary if it is long."""
    on_variables = replace(evidence, latents=None, classes=None, reference=None)
    return _variables_code(on_variables) + _conditions_code(evidence)


def _conditions_code(evidence: Evidence) -> str:
    """Return code that adds what the evidence is relative to, and the evidence on latents and on the class."""
    code = "" if evidence.reference is None else f".relative_to({evidence_code(evidence.reference)})"
    if evidence.latents:
        if sum(factors.numel() for factors in evidence.latents.values()) > _MAX_SHOWN:
            code += f".with_latents({len(evidence.latents)} nodes)"
        else:
            items = (f"{key!r}: {tensor_code(factors)}" for key, factors in evidence.latents.items())
            code += f".with_latents({{{', '.join(items)}}})"
    if evidence.classes is not None:
        method = "with_class" if evidence.classes.dim() == 1 else "with_class_prior"
        is_long = evidence.classes.numel() > _MAX_SHOWN
        code += f".{method}({tuple(evidence.classes.shape) if is_long else tensor_code(evidence.classes)})"
    return code


def _variables_code(evidence: Evidence) -> str:
    parts = vars(evidence)
    sizes = [part.numel() for part in parts.values() if isinstance(part, Tensor)]
    if max(sizes) > _MAX_SHOWN:
        kind = "dense" if evidence.is_dense else "listed values"
        return f"Evidence({kind}, {evidence.batch_size} queries, {evidence.num_vars} variables, {evidence.device})"
    missing, otherwise = evidence.missing, parts.get("otherwise")
    if missing is None or not bool(missing.any()):
        return _code_without_missing(evidence)
    if otherwise is None and evidence.log_factors is None and evidence.values is not None and bool(missing.all()):
        return f"ct.Evidence.nothing({evidence.batch_size}, {evidence.num_vars}{_device_code(missing)})"
    known = tensor_code(~missing)
    if otherwise is not None or (evidence.values is None and evidence.log_factors is None):
        other = f"ct.Evidence.nothing({evidence.batch_size}, {evidence.num_vars}{_device_code(missing)})"
        other = other if otherwise is None else evidence_code(otherwise)
        return f"ct.Evidence.where({known}, {_code_without_missing(evidence)}, {other})"
    if evidence.values is None:
        assert evidence.log_factors is not None
        cleared = evidence.log_factors.masked_fill(missing.unsqueeze(-1), 0.0)
        return _code_without_missing(replace(evidence, log_factors=cleared))
    last = f", missing={tensor_code(missing)})" if _is_listed(evidence) else f", observed={known})"
    return _code_without_missing(evidence).removesuffix(")") + last


def _code_without_missing(evidence: Evidence) -> str:
    """Return code that builds the evidence as if no variable were missing."""
    for name, maker in (("bounds", "interval"), ("normal", "gaussian")):
        pair = vars(evidence).get(name)
        if pair is not None:
            return f"ct.Evidence.{maker}({tensor_code(pair[..., 0])}, {tensor_code(pair[..., 1])})"
    values, factors = evidence.values, evidence.log_factors
    if values is None:
        assert factors is not None
        return f"ct.Evidence.soft({tensor_code(factors)})"
    if not _is_listed(evidence):
        return f"ct.Evidence.observe({tensor_code(values[..., 0])})"
    factors = torch.zeros_like(values, dtype=torch.float32) if factors is None else factors
    return f"ct.Evidence.sparse({tensor_code(values)}, {tensor_code(factors)})"


def _is_listed(evidence: Evidence) -> bool:
    """Whether several values may be possible, or one has a factor: then it is no plain observation."""
    return evidence.log_factors is not None or (evidence.values is not None and evidence.values.shape[-1] > 1)


def _device_code(tensor: Tensor) -> str:
    return "" if tensor.device.type == "cpu" else f", device={str(tensor.device)!r}"
