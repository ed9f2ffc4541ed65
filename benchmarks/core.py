"""The core against the bare floor and against peers, in one run.

    python benchmarks/core.py            # all of it; peers need: pip install -c constraints.txt -e '.[peers]'
    python benchmarks/core.py --quick    # smaller sizes, a smoke test

Every number is the median of several rounds; within a round the candidates take turns, so that a change of the
machine's speed reaches all of them. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import Timed, cpu_seconds, measure, wall_seconds
from torch import Tensor

import circuits as ct
from circuits.algebra import logspace


def report(title: str, seconds: dict[str, list[float]], floor: str) -> None:
    print(f"\n{title}")
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, seconds[floor], strict=True))
        print(f"  {name:<52} {statistics.median(values) * 1e3:10.2f} ms   {ratio:7.2f} x")


def naive_scan(log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, x: Tensor) -> Tensor:
    """The loop that one writes first: a scaled GEMM per step, in log space in between."""
    transition = log_transition.exp()
    log_alpha = log_emission.t()[x[:, -1]]
    for step in reversed(range(x.shape[1] - 1)):
        peak = log_alpha.amax(1, keepdim=True)
        log_alpha = (log_alpha - peak).exp().matmul(transition.t()).log() + peak + log_emission.t()[x[:, step]]
    return torch.logsumexp(log_alpha + log_initial, 1)


def hmm_tables(pc: ct.CompiledCircuit) -> tuple[Tensor, Tensor, Tensor]:
    """Initial (N,), transition (N, N) and emission (N, C) log-probabilities of a compiled homogeneous HMM."""
    circuit = pc.circuit
    with torch.no_grad():
        initial = pc.log_weights(circuit.node("initial"))[0].clone()
        transition = pc.log_weights(circuit.node("transition0")).clone()
        emission = pc.log_weights(circuit.node("emission0")).t().clone()
    return initial, transition, emission


def benchmark_hmm(num_states: int, batch_size: int, length: int, num_categories: int, rounds: int) -> None:
    """Processor's time on one thread, else the clock's."""
    clock = cpu_seconds if torch.get_num_threads() == 1 else wall_seconds
    pc = ct.compile(ct.structures.hmm(length, num_states, num_categories), seed=0)
    x = torch.randint(0, num_categories, (batch_size, length), generator=torch.Generator().manual_seed(0))
    tables = hmm_tables(pc)
    weights = tables[1].exp()
    left, right = torch.rand(batch_size, num_states), torch.rand(num_states, batch_size)
    out, out_t = torch.empty(batch_size, num_states), torch.empty(num_states, batch_size)

    def forward() -> object:
        with torch.no_grad():
            return pc(x)

    def forward_backward() -> None:
        pc.zero_grad()
        pc(x).sum().backward()

    leaves = [table.clone().requires_grad_() for table in tables]

    def naive_forward_backward() -> None:
        normalised = [torch.log_softmax(leaf, -1) for leaf in leaves]
        torch.autograd.grad(naive_scan(*normalised, x).sum(), leaves)

    def naive_forward() -> object:
        with torch.no_grad():
            return naive_scan(*tables, x)

    def gemms(count: int) -> Timed:
        def run() -> None:
            for _ in range(count):
                torch.mm(left, weights, out=out)

        return run

    def gemms_transposed() -> None:
        for _ in range(length - 1):
            torch.mm(weights, right, out=out_t)

    grad_weights = torch.empty_like(weights)

    def three_gemms() -> None:
        for _ in range(length - 1):
            torch.mm(left, weights, out=out)
            torch.mm(out, weights.t(), out=left)
            torch.mm(left.t(), out, out=grad_weights)

    torch.testing.assert_close(pc(x).detach(), naive_forward(), rtol=1e-4, atol=1e-3)
    size = f"N={num_states}, B={batch_size}, L={length}"
    floor = f"{length - 1} bare GEMMs (B x N)(N x N)"
    seconds = measure(
        {
            floor: gemms(length - 1),
            f"{length - 1} bare GEMMs (N x N)(N x B)": gemms_transposed,
            "unfactor, forward": forward,
            "naive torch loop, forward": naive_forward,
        },
        rounds,
        clock=clock,
    )
    report(f"HMM log-likelihood, {size}", seconds, floor)
    floor = f"3 x {length - 1} bare GEMMs"
    seconds = measure(
        {
            floor: three_gemms,
            "unfactor, forward and backward": forward_backward,
            "naive torch loop, forward and backward": naive_forward_backward,
        },
        rounds,
        clock=clock,
    )
    report(f"HMM gradients of all weights, {size}", seconds, floor)


def hmmlearn_of(pc: ct.CompiledCircuit) -> Any:
    """The same model in hmmlearn, in linear space with scales, its fastest; a fit is one step of EM from here."""
    from hmmlearn.hmm import CategoricalHMM

    initial, transition, emission = hmm_tables(pc)
    peer = CategoricalHMM(len(initial), implementation="scaling", n_iter=1, init_params="")
    named = {"startprob_": initial, "transmat_": transition, "emissionprob_": emission}
    for name, table in named.items():
        values = table.exp().double().numpy()
        setattr(peer, name, values / values.sum(-1, keepdims=True))
    peer.n_features = emission.shape[1]
    return peer


def benchmark_long_chains(num_states: int, batch_size: int, length: int, num_categories: int, rounds: int) -> None:
    """Processor's time, of all threads together: hmmlearn runs on one."""
    circuit = ct.structures.hmm(length, num_states, num_categories)
    pc = ct.compile(circuit, seed=0)
    learnt = ct.compile(circuit, seed=0)
    x = torch.randint(0, num_categories, (batch_size, length), generator=torch.Generator().manual_seed(0))
    evidence = ct.Evidence.observe(x)
    flat, lengths = x.reshape(-1, 1).numpy(), [length] * batch_size
    peer = hmmlearn_of(pc)
    learner = hmmlearn_of(pc)
    with torch.no_grad():
        np.testing.assert_allclose(peer.score(flat, lengths), float(pc(x).double().sum()), rtol=1e-4)
    pairs: dict[str, tuple[Timed, Timed]] = {
        "log-likelihood": (lambda: pc(x).detach(), lambda: peer.score(flat, lengths)),
        "posteriors of all states": (
            lambda: ct.queries.latent_marginals(pc, evidence),
            lambda: peer.predict_proba(flat, lengths),
        ),
        "best path": (lambda: ct.queries.viterbi(pc, evidence), lambda: peer.decode(flat, lengths)),
        "one epoch of EM": (
            lambda: ct.learning.fit(learnt, x, optimizer="em", num_epochs=1, progress=False),
            lambda: learner.fit(flat, lengths),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        title = f"{name}, N={num_states}, B={batch_size}, L={length}"
        report(title, measure({"hmmlearn": theirs, "unfactor": ours}, rounds, clock=cpu_seconds), "hmmlearn")


def benchmark_memory_of_chains(num_states: int, batch_size: int) -> None:
    """By how many MB a process's peak grows with an E-step, and posteriors; a process for each length."""
    posteriors = "ct.queries.latent_marginals(pc, ct.Evidence.observe(x))\n"
    for title, first, option in (
        ("posteriors and one epoch of EM", posteriors, ""),
        ("one epoch of EM, checkpointed", "", ", checkpointed=True"),
    ):
        print(f"\npeak memory of {title}, N={num_states}, B={batch_size}")
        for length in (1000, 2000, 4000, 8000):
            code = (
                "import torch, circuits as ct\nfrom _memory import peak_resident_kb\n"
                "small = ct.compile(ct.structures.hmm(80, 2, 5))\n"
                f"ct.learning.fit(small, torch.zeros(1, 80).long(), num_epochs=1, progress=False{option})\n"
                f"pc = ct.compile(ct.structures.hmm({length}, {num_states}, 5), seed=0)\n"
                f"x = torch.randint(5, ({batch_size}, {length}))\n"
                "before = peak_resident_kb()\n"
                f"{first}"
                f"ct.learning.fit(pc, x, optimizer='em', num_epochs=1, progress=False{option})\n"
                "print((peak_resident_kb() - before) / 1024)"
            )
            places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
            call = [sys.executable, "-c", code]
            done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
            print(f"  {length:>5} steps {float(done.stdout):10.1f} MB")


def benchmark_peers(num_states: int, batch_size: int, length: int, num_categories: int, rounds: int) -> None:
    pc = ct.compile(ct.structures.hmm(length, num_states, num_categories), seed=0)
    x = torch.randint(0, num_categories, (batch_size, length), generator=torch.Generator().manual_seed(0))
    tables = hmm_tables(pc)
    initial, transition, emission = (table.exp() for table in tables)
    left, out = torch.rand(batch_size, num_states), torch.empty(batch_size, num_states)

    def gemms() -> None:
        for _ in range(length - 1):
            torch.mm(left, transition, out=out)

    def ours() -> Tensor:
        with torch.no_grad():
            return pc(x)

    floor = f"{length - 1} bare GEMMs (B x N)(N x N)"
    candidates: dict[str, Timed] = {floor: gemms, "unfactor, forward": ours}
    reference = ours()
    try:
        from pomegranate.distributions import Categorical
        from pomegranate.hmm import DenseHMM

        states = [Categorical(row.unsqueeze(0)) for row in emission]
        ends = torch.full((num_states,), 1e-30)
        pomegranate = DenseHMM(states, edges=transition, starts=initial, ends=ends)
        candidates["pomegranate, forward"] = lambda: pomegranate.forward(x.unsqueeze(-1))
    except ImportError as error:
        print(f"\n(pomegranate is not here: {error})")
    try:
        peer = hmmlearn_of(pc)
        flat, lengths = x.reshape(-1, 1).numpy(), [length] * batch_size
        np.testing.assert_allclose(peer.score(flat, lengths), float(reference.double().sum()), rtol=1e-4)
        candidates["hmmlearn, score"] = lambda: peer.score(flat, lengths)
    except ImportError as error:
        print(f"\n(hmmlearn is not here: {error})")
    report(f"HMM forward beside peers, N={num_states}, B={batch_size}, L={length}", measure(candidates, rounds), floor)


def benchmark_emission(num_states: int, num_rows: int, num_categories: int, top_k: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    log_table = torch.log_softmax(torch.randn(num_categories, num_states, generator=generator), 0)
    table = log_table.exp()
    factors = torch.log_softmax(4 * torch.randn(num_rows, num_categories, generator=generator), 1)
    listed, values = factors.topk(top_k, 1)
    linear = factors.exp()
    out = torch.empty(num_rows, num_states)

    def dense() -> Tensor:
        columns = factors.t().unsqueeze(0)
        return logspace.log_matmul(log_table.t().unsqueeze(0), columns, weights=table.t().unsqueeze(0))

    def listed_only() -> Tensor:
        return logspace.log_mix(log_table, values, listed, table=table)

    floor = "bare GEMM (B*L x V)(V x N)"
    candidates = {
        floor: lambda: torch.mm(linear, table, out=out),
        "unfactor, emission with dense evidence": dense,
        f"unfactor, emission with the best {top_k}": listed_only,
    }
    with torch.no_grad():
        size = f"B*L={num_rows}, V={num_categories}, N={num_states}"
        report(f"Coupled emission, {size}", measure(candidates, rounds), floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long-chains", action="store_true", help="only HMMs of 2,000 steps beside hmmlearn")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, float32, medians of {arguments.rounds} rounds"
    )
    scale = 8 if arguments.quick else 1
    if arguments.long_chains or arguments.quick:
        for num_states, batch_size in ((3, 1), (3, 64 // scale), (64, 1), (64, 64 // scale)):
            benchmark_long_chains(num_states, batch_size, 2000 // scale, 5, arguments.rounds)
        benchmark_memory_of_chains(16, 8)
    if arguments.long_chains:
        return
    for num_states in (64, 256, 1024):
        benchmark_hmm(num_states // scale, 64, 32, 112, arguments.rounds)
    benchmark_peers(256 // scale, 64, 32, 112, arguments.rounds)
    benchmark_emission(1024 // scale, 256, 112, 32, arguments.rounds)
    benchmark_emission(1024 // scale, 256, 16_384 // scale, 64, arguments.rounds)


if __name__ == "__main__":
    main()
