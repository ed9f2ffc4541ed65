"""What ``gpu.py`` measures, one function a section."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from _gpu_measure import Built, Section, bare_gemms
from _timing import Timed, wall_seconds
from core import hmm_tables, naive_scan
from region_graphs import CASES, data_for, forward_backward
from torch import Tensor

import circuits as ct
import diffusion as df
from circuits.evidence import Evidence, Listed

LENGTH, NUM_STATES, TOP_K = 32, 1024, 1024
MODELS = {"LLaDA": 126_464, "Dream": 152_064}
"""Vocabularies of the models whose coupled circuits have been published."""


def core(section: Section) -> None:
    """Hidden Markov models beside their matrix products and beside the loop that one writes first."""
    for num_states in (8, 16) if section.is_quick else (64, 256, 1024, 4096):
        _hidden_markov_model(section, num_states, section.size(64, 4), section.size(LENGTH, 5), section.size(112, 7))


def _hidden_markov_model(section: Section, num_states: int, batch_size: int, length: int, num_categories: int) -> None:
    circuit = ct.structures.hmm(length, num_states, num_categories)
    pc = ct.compile(circuit, seed=0, device=section.device)
    x = data_for(circuit, batch_size).to(section.device)
    tables = hmm_tables(pc)
    leaves = [table.clone().requires_grad_() for table in tables]

    def naive() -> Tensor:
        return naive_scan(*tables, x)

    def naive_gradients() -> object:
        normalised = [torch.log_softmax(leaf, -1) for leaf in leaves]
        return torch.autograd.grad(naive_scan(*normalised, x).sum(), leaves)

    torch.testing.assert_close(pc(x).detach(), naive(), rtol=1e-4, atol=1e-3)
    case = f"HMM, N={num_states}, B={batch_size}, L={length}"
    loops = no_grad(naive), naive_gradients
    _forward_and_backward(section, case, pc, x, loops)


def region_graphs(section: Section) -> None:
    """Region-graph circuits beside the batched matrix products of their layers."""
    for name, build in CASES.items():
        _region_graph(section, name, build(section.is_quick))


def _region_graph(section: Section, name: str, circuit: ct.Circuit) -> None:
    def compiled() -> ct.CompiledCircuit:
        return ct.compile(circuit, seed=0, device=section.device)

    section.note(f"{name}: {wall_seconds(compiled):.1f} s to compile {circuit}.")
    pc = compiled()
    for batch_size in (section.size(64, 4), section.size(512, 8)):
        x = data_for(circuit, batch_size).to(section.device)
        _forward_and_backward(section, f"{name}, B={batch_size}", pc, x)


def _forward_and_backward(
    section: Section, case: str, pc: ct.CompiledCircuit, x: Tensor, loops: tuple[Timed, Timed] | None = None
) -> None:
    """Time likelihoods, and likelihoods with gradients; ``loops`` do the same by hand."""
    floor = "bare GEMMs"
    forward: dict[str, Built] = {
        floor: lambda: bare_gemms(pc, len(x)),
        "unfactor": lambda: no_grad(lambda: pc(x)),
    }
    both: dict[str, Built] = {
        floor: lambda: bare_gemms(pc, len(x), backward=True),
        "unfactor": lambda: lambda: forward_backward(pc, x),
    }
    if loops is not None:
        forward["bare torch loop"], both["bare torch loop"] = (lambda: loops[0]), (lambda: loops[1])
    section.compare(f"{case}, forward", forward, floor=floor)
    section.compare(f"{case}, forward and backward", both, floor=floor)


def coupling(section: Section) -> None:
    """The coupled output layer at the shapes of real models, beside the bare products of emission and transitions."""
    section.note(
        "The circuit computes in float32. 'bfloat16 logits' are the denoiser's, cast inside; 'bare, bfloat16' are the "
        "same products in bfloat16, which the library does not do."
    )
    models = {"tiny": 50} if section.is_quick else MODELS
    for model, num_tokens in models.items():
        pc = coupled_circuit(section, num_tokens)
        for top_k in (section.size(TOP_K, 5), None):
            for batch_size in (1, section.size(8, 2)):
                case = f"{model}, V={num_tokens}, {f'top-k {top_k}' if top_k else 'all tokens'}, B={batch_size}"
                _coupling_case(section, case, pc, top_k, batch_size)
        del pc


def coupled_circuit(section: Section, num_tokens: int) -> ct.CompiledCircuit:
    """Return the hidden Markov model over a block that a real model's head would be."""
    circuit = ct.structures.hmm(section.size(LENGTH, 4), section.size(NUM_STATES, 8), num_tokens)
    return ct.compile(circuit, seed=0, device=section.device)


def problem(pc: ct.CompiledCircuit, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (B, L, V), tokens and masks (B, L) of blocks with about three quarters masked."""
    generator = torch.Generator(pc.device).manual_seed(0)
    shape, num_tokens = (batch_size, pc.circuit.num_vars), pc.circuit.num_categories[0]
    logits = 4 * torch.randn(*shape, num_tokens, device=pc.device, generator=generator)
    tokens = torch.randint(num_tokens, shape, device=pc.device, generator=generator)
    masked = torch.rand(shape, device=pc.device, generator=generator) < 0.75
    masked[:, 0] = True
    return logits, tokens, masked


def _coupling_case(section: Section, case: str, pc: ct.CompiledCircuit, top_k: int | None, batch_size: int) -> None:
    logits, tokens, masked = problem(pc, batch_size)

    def coupled(of: Callable[[df.CoupledDistribution], Tensor], dtype: torch.dtype = torch.float32) -> Built:
        given = logits.to(dtype)
        return lambda: no_grad(lambda: of(df.CoupledDistribution(pc, given, tokens, masked, top_k=top_k)))

    def training_step() -> None:
        pc.zero_grad()
        dist = df.CoupledDistribution(pc, logits, tokens, masked, top_k=top_k, include=tokens if top_k else None)
        dist.log_prob(tokens).sum().backward()

    generator = torch.Generator(pc.device).manual_seed(0)
    floor = "bare, float32"
    bare: dict[str, Built] = {
        floor: lambda: bare_coupling(pc, batch_size, top_k, torch.float32),
        "bare, bfloat16": lambda: bare_coupling(pc, batch_size, top_k, torch.bfloat16),
    }
    questions: dict[str, Built] = {
        "unfactor, log Z": coupled(lambda dist: dist.log_partition),
        "unfactor, log Z, bfloat16 logits": coupled(lambda dist: dist.log_partition, torch.bfloat16),
        "unfactor, marginals": coupled(lambda dist: dist.marginal_probs),
        "unfactor, sample": coupled(lambda dist: dist.sample(generator=generator)),
    }
    section.compare(case, bare | questions, floor=floor)
    training: dict[str, Built] = {"unfactor, CLL and its gradients": lambda: training_step}
    section.compare(f"{case}, training", bare | training, floor=floor)  # apart: it normalises the table every time
    pc.zero_grad()


def bare_coupling(pc: ct.CompiledCircuit, batch_size: int, top_k: int | None, dtype: torch.dtype) -> Timed:
    """Return the emission, one GEMM or one gathered sum of k rows, and the transitions' products."""
    num_rows, num_tokens = batch_size * pc.circuit.num_vars, pc.circuit.num_categories[0]
    num_states = pc.circuit.inputs[0].num_units
    table = torch.rand(num_tokens, num_states, device=pc.device, dtype=dtype)
    transitions = bare_gemms(pc, batch_size, dtype=dtype)
    if top_k is None:
        factors = torch.rand(num_rows, num_tokens, device=pc.device, dtype=dtype)
        emission = torch.empty(num_rows, num_states, device=pc.device, dtype=dtype)
        return lambda: (torch.mm(factors, table, out=emission), transitions())
    listed = torch.randint(num_tokens, (num_rows, top_k), device=pc.device)
    shares = torch.rand(num_rows, top_k, device=pc.device, dtype=dtype)
    bag = torch.nn.functional.embedding_bag
    return lambda: (bag(listed, table, mode="sum", per_sample_weights=shares), transitions())


class FixedDenoiser:
    """A denoiser that costs nothing: the same logits whatever is visible."""

    def __init__(self, logits: Tensor) -> None:
        self.fixed = logits[0]
        self.device = logits.device
        num_positions, num_tokens = self.fixed.shape
        last = num_tokens - 1
        self.spec = df.DenoiserSpec(
            vocab_size=num_tokens,
            mask_id=last,
            pad_id=last,
            eos_ids=(),
            forbidden_ids=(last,),
            max_length=num_positions,
        )

    def logits(self, tokens: Tensor, *, window: tuple[int, int] | None = None, **_: object) -> Tensor:
        """Return the logits of a window, (B, L, V)."""
        return self.fixed[slice(*(window or (0, tokens.shape[1])))].expand(len(tokens), -1, -1)


def decoding(section: Section) -> None:
    """One block decoded in every mode, and what a CUDA graph of the circuit's part would save."""
    pc = coupled_circuit(section, section.size(MODELS["LLaDA"], 50))
    top_k, num_steps = section.size(TOP_K, 5), section.size(4, 2)
    logits, _, _ = problem(pc, 1)
    denoiser, head = FixedDenoiser(logits), df.CoupledHead(pc, top_k=top_k)
    canvas = torch.full(logits.shape[:2], denoiser.spec.mask_id, device=pc.device)
    floor = f"{num_steps} x bare, float32"

    def block(decode: df.decoding.config.DecodeMode) -> Built:
        options = {"head": head, "decode": decode, "temperature": 1.0, "seeds": [0]}
        return lambda: lambda: df.infill(denoiser, canvas, plan=df.Anywhere(num_steps), **options)

    def bare() -> Timed:
        once = bare_coupling(pc, 1, top_k, torch.float32)
        return lambda: [once() for _ in range(num_steps)]

    steps: dict[str, Built] = {floor: bare}
    steps |= {f"decode={name!r}": block(name) for name in df.decoding.config.MODES}
    section.compare(f"a block of {canvas.shape[1]} in {num_steps} steps, B=1, top-k {top_k}", steps, floor=floor)

    log_z, marginals = evidence_to_answers(pc, logits, top_k)
    eager: dict[str, Built] = {"eager, log Z": lambda: no_grad(log_z), "eager, marginals": lambda: marginals}
    graphs: dict[str, Built] = {
        "CUDA graph of the traced path, log Z": lambda: traced(no_grad(log_z), pc.device),
        "CUDA graph of the traced path, marginals": lambda: traced(marginals, pc.device),
    }
    section.compare("CUDA graphs of the traced path", eager | graphs, floor="eager, log Z")
    checked: dict[str, Built] = {  # last: a capture that fails may leave the process unfit for anything else
        "CUDA graph of the eager path, log Z": lambda: captured(no_grad(log_z), pc.device),
        "CUDA graph of a block": lambda: captured(block("joint")(), pc.device),
    }
    section.compare("CUDA graphs of the eager path", eager | checked, floor="eager, log Z")


def torch_compile(section: Section) -> None:
    """Log Z of one block with its best tokens as evidence, traced and compiled with CUDA graphs; it takes a while."""
    pc = coupled_circuit(section, section.size(MODELS["LLaDA"], 50))
    top_k = section.size(TOP_K, 5)
    log_z, _ = evidence_to_answers(pc, problem(pc, 1)[0], top_k)
    candidates: dict[str, Built] = {
        "eager": lambda: no_grad(log_z),
        "mode='reduce-overhead'": lambda: with_graph_trees(no_grad(log_z), pc.device),
    }
    section.compare(f"torch.compile, log Z, B=1, top-k {top_k}", candidates, floor="eager")


def evidence_to_answers(pc: ct.CompiledCircuit, logits: Tensor, top_k: int) -> tuple[Timed, Timed]:
    """Return two functions of fixed evidence on the best tokens: log Z (B,), and the marginals of the listed tokens."""
    with torch.no_grad():
        factors, values = torch.log_softmax(logits, -1).topk(top_k, -1)
        banks = pc.weights()

    def log_z() -> Tensor:
        return pc.log_partition(Evidence(Listed(values, factors)), banks)

    def marginals() -> Tensor:
        traced_factors = factors.clone().requires_grad_()
        log_z = pc.log_partition(Evidence(Listed(values, traced_factors)), banks)
        return torch.autograd.grad(log_z.sum(), traced_factors)[0]

    return log_z, marginals


def traced(run: Timed, device: torch.device) -> Timed:
    """Capture what ``torch.compile`` would trace: the same without the checks that ask the device for a number."""
    expected = run()

    def unchecked() -> object:
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            return run()

    torch.testing.assert_close(unchecked(), expected, rtol=1e-3, atol=1e-3)
    return captured(unchecked, device)


def with_graph_trees(run: Timed, device: torch.device) -> Timed:
    """Return what ``torch.compile`` makes of a function when it may use CUDA graphs."""
    _need_cuda(device)
    return torch.compile(run, mode="reduce-overhead")


def captured(run: Timed, device: torch.device) -> Timed:
    """Return the replay of a CUDA graph of one run."""
    _need_cuda(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return lambda: (graph.replay(), result)  # the result lives in the graph's memory


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"CUDA graphs need a CUDA device, this is {device}")


def no_grad(run: Timed) -> Timed:
    """Return the same without gradients."""
    return torch.no_grad()(run)
