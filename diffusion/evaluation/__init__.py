"""Evaluation: how much of the factorization barrier a circuit removes, and quality against denoiser calls."""

from diffusion.evaluation.annotations import (
    AnnotationCheck,
    AnnotationRow,
    AnnotationShare,
    AnnotationTable,
    annotation_quality,
    check_annotations,
)
from diffusion.evaluation.few_step_curve import CurvePoint, FewStepCurve, Quality, few_step_curve, few_step_sketch
from diffusion.evaluation.few_steps import FewStepRow, FewStepTable, few_step_quality
from diffusion.evaluation.gap import Estimate, GapRow, GapTable, misspecification_gap
from diffusion.evaluation.tuning import Candidate, Tuning, TuningRow, tune

__all__ = [
    "AnnotationCheck",
    "AnnotationRow",
    "AnnotationShare",
    "AnnotationTable",
    "Candidate",
    "CurvePoint",
    "Estimate",
    "FewStepCurve",
    "FewStepRow",
    "FewStepTable",
    "GapRow",
    "GapTable",
    "Quality",
    "Tuning",
    "TuningRow",
    "annotation_quality",
    "check_annotations",
    "few_step_curve",
    "few_step_quality",
    "few_step_sketch",
    "misspecification_gap",
    "tune",
]
