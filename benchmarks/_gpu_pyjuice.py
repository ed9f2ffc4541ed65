"""PyJuice on the same device: a section of ``gpu.py``. Without the package, or where it fails, the rows say so."""

from __future__ import annotations

from typing import Any

import torch
from _gpu_measure import Section, bare_gemms
from _gpu_sections import MODELS, TOP_K, bare_coupling, coupled_circuit, no_grad, problem
from _timing import Timed
from core import hmm_tables
from region_graphs import CASES, data_for
from torch import Tensor

import circuits as ct


def pyjuice(section: Section) -> None:
    """The same circuits with the same weights in PyJuice."""
    batch_size = section.size(64, 4)
    hmm = ct.structures.hmm(section.size(32, 5), section.size(1024, 32), section.size(112, 7))
    for case, circuit in (("HMM, N=1024", hmm), ("quad tree, 28x28", CASES["quad tree, 28x28"](section.is_quick))):
        pc = ct.compile(circuit, seed=0, device=section.device)
        _likelihoods(section, f"{case}, B={batch_size}", pc, data_for(circuit, batch_size).to(section.device))
    pc = coupled_circuit(section, section.size(MODELS["LLaDA"], 50))
    for batch_size in (1, section.size(8, 2)):
        _coupled(section, pc, section.size(TOP_K, 5), batch_size)


def _likelihoods(section: Section, case: str, pc: ct.CompiledCircuit, x: Tensor) -> None:
    kept: list[Any] = []

    def theirs() -> Any:
        if not kept:
            kept.append(_compiled(ct.interop.to_pyjuice(pc), pc.device))
            difference = float((kept[0](x)[:, 0] - pc(x)).abs().max())
            section.note(f"{case}: PyJuice's log-likelihoods differ from ours by at most {difference:.1e} nats.")
        return kept[0]

    def their_forward() -> Timed:
        model = theirs()
        return no_grad(lambda: model(x))

    def their_flows() -> Timed:
        model = theirs()

        def run() -> None:
            model(x)
            model.backward(x, flows_memory=0.0)

        return no_grad(run)

    floor = "bare GEMMs"
    forward = {floor: lambda: bare_gemms(pc, len(x)), "unfactor": lambda: no_grad(lambda: pc(x))}
    section.compare(f"{case}, forward", forward | {"PyJuice": their_forward}, floor=floor)
    flows = {
        floor: lambda: bare_gemms(pc, len(x), backward=True),
        "unfactor": lambda: lambda: ct.learning.expected_flows(pc, x),
        "PyJuice": their_flows,
    }
    section.compare(f"{case}, flows of EM", flows, floor=floor)


def _coupled(section: Section, pc: ct.CompiledCircuit, top_k: int, batch_size: int) -> None:
    """Log Z of a wholly masked block: the best tokens as soft evidence, in PyJuice sorted as it wants them."""
    logits, tokens, _ = problem(pc, batch_size)
    factors, values = torch.log_softmax(logits, -1).topk(top_k, -1)
    values, order = values.sort(-1)
    evidence = ct.Evidence.sparse(values, factors.gather(-1, order))
    case = f"LLaDA, log Z, top-k {top_k}, B={batch_size}"

    def theirs() -> Timed:
        juice = ct.interop.pyjuice.import_pyjuice()
        initial, transition, emission = (table.exp().cpu() for table in hmm_tables(pc))
        family = juice.distributions.SoftEvidenceCategorical(pc.circuit.num_categories[0])
        num_states = len(initial)
        root = juice.structures.GeneralizedHMM(
            pc.circuit.num_vars, num_states, input_dist=family, alpha=transition, beta=emission, gamma=initial
        )
        model = _compiled(root, pc.device)
        arguments = {
            "categorical_evidence_logp": evidence.log_factors.contiguous(),
            "soft_evidence_cat_ids": values.contiguous(),
            "soft_evidence_value_mask": torch.zeros_like(tokens, dtype=torch.bool),
        }
        run = no_grad(lambda: model(tokens, **arguments))
        difference = float((run()[:, 0] - pc(evidence)).abs().max())
        section.note(f"{case}: PyJuice's log Z differs from ours by at most {difference:.1e} nats.")
        return run

    floor = "bare, float32"
    candidates = {
        floor: lambda: bare_coupling(pc, batch_size, top_k, torch.float32),
        "unfactor": lambda: no_grad(lambda: pc(evidence)),
        "PyJuice": theirs,
    }
    section.compare(case, candidates, floor=floor)


def _compiled(root: Any, device: torch.device) -> Any:
    return ct.interop.pyjuice.import_pyjuice().compile(root, device=device, verbose=False).to(device)
