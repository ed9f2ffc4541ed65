"""Laws of what an answer may depend on: the present weights and the evidence, and nothing around them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits import learning, queries
from circuits.engine.compile import compile
from circuits.errors import CheckpointError, ImpossibleEvidenceError
from circuits.evidence import Evidence
from circuits.testing.conformance._cases import Case, law
from circuits.testing.conformance._structure_cases import StructureCases


class StateLaws(StructureCases):
    """What must not depend on earlier calls, on the caller's precision, or on runs that are others."""

    @law
    def test_every_write_to_the_weights_is_seen(self, case: Case) -> None:
        """Also through ``.data``, without gradients, where weights are kept between calls."""
        other = compile(case.circuit, dtype=torch.float64, seed=case.seed + 1)
        with torch.no_grad():
            case.pc.log_partition(case.evidence)
            for parameter, written in zip(case.pc.parameters(), other.parameters(), strict=True):
                parameter.data.copy_(written)
            found = queries.log_partition(case.pc, case.evidence)
        assert torch.equal(found, queries.log_partition(other, case.evidence).detach())

    @law
    def test_autocast_changes_no_answer(self, case: Case) -> None:
        """Passes run in the circuit's own dtype, forward and backward."""
        pc, seen = compile(case.circuit, dtype=torch.float32, seed=case.seed), []  # autocast leaves float64 alone
        for enabled in (False, True):
            pc.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                log_z = queries.log_partition(pc, case.evidence)
                possible = log_z[log_z > -torch.inf]
                if possible.requires_grad:
                    possible.sum().backward()
            gradients = [p.grad for p in pc.parameters() if p.grad is not None]
            seen.append([log_z.detach(), *(gradient.clone() for gradient in gradients)])
        assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))

    @law
    def test_a_row_that_says_nothing_teaches_nothing(self, case: Case) -> None:
        """Flows of ragged evidence do not change when rows without any observation are added."""
        nothing = Evidence.nothing(2, case.circuit.num_vars)
        for flows in (learning.expected_flows, learning.viterbi_flows):
            assert all(not bool(flow.any()) for flow in flows(case.pc, nothing).flows.values())

    @law
    def test_a_run_that_starts_elsewhere_is_another_run(self, case: Case) -> None:
        """A checkpoint is continued from the weights that its run started from, and refused from others."""
        data = queries.sample(case.pc, 4, generator=case.generator)
        other = compile(case.circuit, dtype=torch.float64, seed=case.seed + 1)
        is_another = any(not torch.equal(*pair) for pair in zip(case.pc.parameters(), other.parameters(), strict=True))
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {
                "checkpoint_path": Path(folder) / "run.safetensors",
                "num_epochs": 1,
                "progress": False,
            }
            learning.fit(case.pc, data, **options)
            learned = any(not torch.equal(*pair) for pair in zip(case.pc.parameters(), other.parameters(), strict=True))
            if is_another and learned:
                with pytest.raises((CheckpointError, ImpossibleEvidenceError)):
                    learning.fit(other, data, **options)
