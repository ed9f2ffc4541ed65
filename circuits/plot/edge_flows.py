"""How much of the data flows through every edge of a circuit's graph."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.evidence import Evidence
from circuits.symbolic import Product, Sum


def edge_flows(pc: CompiledCircuit, evidence: Evidence) -> list[tuple[float, ...]]:
    """Return how often a sample uses each edge on average: per node of the circuit, one number per child.

    That is the probability, given the sample and averaged over the samples that are possible, that the latent choices
    reach the child by this edge (the child as a whole, all its units together). As in learning, nothing is counted at
    nodes on whose variables nothing is known.
    """
    with torch.inference_mode(False), torch.enable_grad():
        question, _ = Question(pc, evidence).levelled()
        inputs = [value.detach().requires_grad_() for value in question.inputs(LogSemiring())]
        values = question.with_inputs(inputs).upward(LogSemiring())
        log_z = question.mixed(LogSemiring(), values[-1])
        possible = log_z != -torch.inf
        counts = possible.to(log_z.dtype) / possible.sum().clamp_min(1)
        flows = torch.autograd.grad(log_z, values, counts)
    per_node = []
    with torch.no_grad():
        for node in pc.circuit.nodes:
            layer, row = pc.address(node)
            flow = flows[layer][row]
            if isinstance(node, Product):
                per_node.append((float(flow.sum()),) * len(node.children))
            elif isinstance(node, Sum):
                if layer in question.silent:
                    flow = flow.masked_fill(question.silent[layer][row], 0.0)
                children = [values[at[0]][at[1]] for at in map(pc.address, node.children)]
                shares = _shares(pc.log_weights(node), node.mixed(children), values[layer][row], flow)
                sizes = [1 if node.unit is not None else child.num_units for child in node.children]
                per_node.append(tuple(float(part.sum()) for part in shares.split(sizes)))
            else:
                per_node.append(())
    return per_node


def _shares(log_weights: Tensor, values: Tensor, mixed: Tensor, flow: Tensor) -> Tensor:
    """Split the flow (O, B) of sum units among their inputs (I, B): returns (I,)."""
    is_reached = (flow > 0) & (mixed != -torch.inf)
    scale = torch.where(is_reached, flow.log() - mixed, -torch.inf)
    logs = log_weights.unsqueeze(-1) + values + scale.unsqueeze(1)  # (O, I, B)
    return logs.exp().sum((0, 2))
