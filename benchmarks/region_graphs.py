"""Region-graph circuits beside libcirkit: speed, peak memory and compile time, in one run.

    python benchmarks/region_graphs.py            # the peer needs: pip install -c constraints.txt -e '.[peers]'
    python benchmarks/region_graphs.py --quick    # small sizes, a smoke test

Both sides evaluate the same circuit with the same weights; first a small one, to see that the likelihoods agree.
Every time is the median of several rounds in which the candidates take turns, and every ratio the median of the rounds'
ratios. Peak memory is that of a process of its own per candidate, above what it held before its circuit was built.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _memory import peak_resident_kb
from _timing import measure
from torch import Tensor, nn

import circuits as ct


def quad_circuit(side: int, num_units: int, num_categories: int, *, is_graph: bool) -> ct.Circuit:
    """Build the quad graph (halves both ways, mixed) or quad tree of a square image with dense CP layers."""
    graph = ct.RegionGraph.quad_graph((side, side)) if is_graph else ct.RegionGraph.quad_tree((side, side))
    return ct.structures.from_region_graph(graph, num_units, ct.Categorical(num_categories))


def latent_tree(num_vars: int, num_latents: int, seed: int) -> ct.Circuit:
    """Build the shape of a hidden Chow-Liu tree over binary variables: a random tree of latents, a leaf below each."""
    generator = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(max(0, v - 4), v, (), generator=generator)) for v in range(1, num_vars)]
    hidden = [f"z{var}" for var in range(num_vars)]
    edges = [(hidden[parent], hidden[var]) for var, parent in enumerate(parents, start=1)]
    observed = {f"x{var}": var for var in range(num_vars)}
    edges += [(hidden[var], node) for node, var in observed.items()]
    return ct.structures.latent_tree(edges, num_latents, ct.Bernoulli(), variables=observed, root=hidden[0])


CASES: dict[str, Callable[[bool], ct.Circuit]] = {
    "quad graph, 28x28": lambda quick: quad_circuit(8 if quick else 28, 32, 256, is_graph=True),
    "quad tree, 28x28": lambda quick: quad_circuit(8 if quick else 28, 32, 256, is_graph=False),
    "HCLT, 100 variables, 32 latents": lambda quick: latent_tree(20 if quick else 100, 32, 0),
}


def build_ours(circuit: ct.Circuit) -> ct.CompiledCircuit:
    return ct.compile(circuit, seed=0)


def build_cirkit(circuit: ct.Circuit, weights_from: ct.CompiledCircuit | None = None) -> nn.Module:
    """Build the same circuit with libcirkit, softmax weights throughout; copy the weights where they are given."""
    from cirkit.pipeline import PipelineContext
    from cirkit.symbolic.circuit import Circuit
    from cirkit.symbolic.initializers import ConstantTensorInitializer, NormalInitializer
    from cirkit.symbolic.layers import CategoricalLayer, HadamardLayer, SumLayer
    from cirkit.symbolic.parameters import Parameter, SoftmaxParameter, TensorParameter
    from cirkit.utils.scope import Scope

    def softmax_weights(node: ct.Input | ct.Sum) -> Any:
        rows, columns = node.parameter_shape
        shape = (columns, rows) if isinstance(node, ct.Input) else (rows, columns)
        initializer: Any = NormalInitializer()
        if weights_from is not None:
            log_weights = weights_from.log_weights(node).detach()
            log_weights = log_weights.t() if isinstance(node, ct.Input) else log_weights
            initializer = ConstantTensorInitializer(log_weights.contiguous().numpy())
        return Parameter.from_unary(SoftmaxParameter(shape, axis=1), TensorParameter(*shape, initializer=initializer))

    built: dict[ct.Node, Any] = {}
    for node in circuit.nodes:
        if isinstance(node, ct.Input):
            built[node] = CategoricalLayer(
                Scope([node.var]),
                node.num_units,
                num_categories=node.distribution.num_categories,
                probs=softmax_weights(node),
            )
        elif isinstance(node, ct.Product):
            built[node] = HadamardLayer(node.num_units, arity=len(node.children))
        else:
            assert isinstance(node, ct.Sum)
            width = node.children[0].num_units
            built[node] = SumLayer(width, node.num_units, arity=len(node.children), weight=softmax_weights(node))
    wired = {built[node]: [built[child] for child in node.children] for node in circuit.nodes if node.children}
    symbolic = Circuit(list(built.values()), wired, [built[circuit.root]])
    # one context per circuit: a context keeps every circuit that it compiled alive
    return PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True).compile(symbolic)


BUILDERS: dict[str, Callable[[ct.Circuit], nn.Module]] = {"unfactor": build_ours, "libcirkit": build_cirkit}


def data_for(circuit: ct.Circuit, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(circuit.num_categories[0], (batch_size, circuit.num_vars), generator=generator)


def forward_backward(model: Any, x: Tensor) -> None:
    model.zero_grad()
    model(x).sum().backward()


def check_agreement() -> None:
    """Compare the likelihoods of small circuits with copied weights."""
    for circuit in (quad_circuit(5, 3, 4, is_graph=True), quad_circuit(4, 3, 4, is_graph=False), latent_tree(9, 3, 0)):
        ours = build_ours(circuit)
        peer = build_cirkit(circuit, weights_from=ours)
        x = data_for(circuit, 16)
        torch.testing.assert_close(ours(x), peer(x).flatten(), rtol=1e-4, atol=1e-4)
    print("likelihoods of small circuits agree with libcirkit's, weights copied")


def report(title: str, seconds: dict[str, list[float]]) -> None:
    base = next(iter(seconds))
    for name, values in seconds.items():
        ratio = statistics.median(value / ours for value, ours in zip(values, seconds[base], strict=True))
        print(f"  {title:<22} {name:<10} {statistics.median(values) * 1e3:10.1f} ms   {ratio:6.2f} x ours")


def benchmark(case: str, batch_size: int, rounds: int, quick: bool) -> None:
    circuit = CASES[case](quick)
    print(f"\n{case}{' (quick: smaller)' if quick else ''}, batch {batch_size}: {circuit}")
    models: dict[str, nn.Module] = {}
    compile_seconds = {}
    for name, build in BUILDERS.items():
        start = time.perf_counter()
        models[name] = build(circuit)
        compile_seconds[name] = [time.perf_counter() - start]
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"the circuits differ: {counts} parameters")
    x = data_for(circuit, batch_size)

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return model(x)

        return run

    def both(model: nn.Module) -> Callable[[], object]:
        return lambda: forward_backward(model, x)

    report("compile", compile_seconds)
    report("forward", measure({name: forward(model) for name, model in models.items()}, rounds))
    report("forward and backward", measure({name: both(model) for name, model in models.items()}, rounds))
    memory = {name: [peak_memory(case, name, batch_size, quick)] for name in models}
    for name, (peak,) in memory.items():
        print(f"  {'peak memory':<22} {name:<10} {peak:10.0f} MB   {peak / memory['unfactor'][0]:6.2f} x ours")


def peak_memory(case: str, name: str, batch_size: int, quick: bool) -> float:
    """Return by how many MB a process's peak grows by building the circuit and two steps forward and backward."""
    options = ["--probe", case, name, "--batch-size", str(batch_size), *(["--quick"] if quick else [])]
    out = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def probe(case: str, name: str, batch_size: int, quick: bool) -> None:
    circuit = CASES[case](quick)
    forward_backward(BUILDERS[name](latent_tree(3, 2, 0)), data_for(latent_tree(3, 2, 0), 2))  # loads the libraries
    gc.collect()
    before = peak_resident_kb()
    model, x = BUILDERS[name](circuit), data_for(circuit, batch_size)
    for _ in range(2):
        forward_backward(model, x)
    print((peak_resident_kb() - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--probe", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.probe:
        probe(*arguments.probe, arguments.batch_size, arguments.quick)
        return
    from importlib.metadata import version

    print(
        f"torch {torch.__version__}, libcirkit {version('libcirkit')}, python {platform.python_version()}, "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, float32, medians of "
        f"{arguments.rounds} rounds"
    )
    check_agreement()
    for case in CASES:
        benchmark(case, arguments.batch_size, arguments.rounds, arguments.quick)


if __name__ == "__main__":
    main()
