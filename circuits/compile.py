"""From a symbolic :class:`~circuits.graph.Circuit` to tensors: layering, folding, tied weights.

Nodes are sorted into topological layers; nodes of one layer with the same kind and shapes are folded into one tensor
operation. Weights of equal shape lie in one *bank*, a parameter (P, O, I) whose rows the layers select, so tied nodes
share a row and a layer usually reads one contiguous slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from circuits import passes
from circuits.distributions import Categorical, Direct, Distribution
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.graph import Circuit, Input, Node, ParametricNode, Product, Sum, parameter_owner
from circuits.input_layers import DirectLayer, InputLayer, TableLayer
from circuits.layers import ProductLayer, SumLayer, Weights
from circuits.rows import Address, ParameterRows
from circuits.semiring import LogSemiring

_DIRICHLET = Categorical(1)  # its initial log-weights do not depend on the number of categories


class CompiledCircuit(nn.Module):
    """A circuit on tensors: an ``nn.Module`` whose call is ``log p(x)``. Build it with :func:`compile`.

    The parameters are unconstrained log-weights, normalised by a log-softmax on every read. So any ``torch.optim``
    optimizer can move them freely, EM writes the logarithm of its new weights, and a zero weight is -inf and stays so.

    Attributes:
        circuit: the symbolic circuit.
        bank: the parameters by name: ``sum_OxI`` of shape (P, O, I), normalised along I; ``input_CxK`` of shape
            (P, C, K), normalised along C. P counts the distinct parameters of that shape. Families other than
            categorical ones have ``input_FAMILY_AxB``, with raw parameters as the family defines them.
        families: the input family of each bank whose name starts with "input".
    """

    num_categories: Tensor

    def __init__(self, circuit: Circuit, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.circuit = circuit
        layers = _fold(circuit)
        self._address: dict[Node, Address] = {
            node: (position, row) for position, nodes in enumerate(layers) for row, node in enumerate(nodes)
        }
        self._parameter_address, bank_shapes, self.families = _assign_parameters(layers)
        self.bank = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in bank_shapes.items()}
        )
        self.sum_banks = [name for name in bank_shapes if name.startswith("sum")]
        built = [self._build_layer(nodes, dtype) for nodes in layers]
        self.input_layers: Sequence[InputLayer] = cast(
            Any, nn.ModuleList(layer for layer in built if isinstance(layer, InputLayer))
        )
        self.inner_layers: Sequence[ProductLayer | SumLayer] = cast(
            Any, nn.ModuleList(layer for layer in built if not isinstance(layer, InputLayer))
        )
        self.layer_sizes = [(len(nodes), nodes[0].num_units) for nodes in layers]
        self.last_uses = _last_uses(layers, self._address)
        self.register_buffer("num_categories", torch.tensor(circuit.num_categories), persistent=False)
        self._cache: dict[str, tuple[tuple[object, ...], Weights]] = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.bank.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return next(iter(self.bank.values())).dtype

    def forward(self, x: Tensor | Evidence) -> Tensor:
        """Return ``log p(x)`` of assignments, (B, D), see :meth:`Evidence.observe`, or log Z of any evidence: (B,).

        Raises:
            ArgumentError: a wrong shape or dtype, or a value outside its variable's categories.
        """
        return self.log_partition(x if isinstance(x, Evidence) else Evidence.observe(x))

    def log_partition(self, evidence: Evidence, banks: passes.Banks | None = None) -> Tensor:
        """Return ``log Z(e) = log sum_x p(x) prod_i e_i(x_i)``, shape (B,), differentiable in factors and weights.

        Args:
            evidence: for B queries.
            banks: normalised weights to use in place of this module's own, see :meth:`weights`.
        """
        banks = self.weights() if banks is None else banks
        return passes.log_root(self, self.leaves(evidence, banks), banks)

    def leaves(self, evidence: Evidence, banks: passes.Banks | None = None) -> list[Tensor]:
        """Return the log-values of all input units under the evidence: per input layer (F, K, B)."""
        if not torch.compiler.is_compiling():
            evidence.check(self.num_categories)
        return passes.leaves(self, LogSemiring(), evidence, self.weights() if banks is None else banks)

    def weights(self) -> passes.Banks:
        """Return the normalised weights of every bank.

        Without gradients they are computed once and kept until the parameters change; changes are seen through
        in-place operations on the parameters (optimizers, ``load_state_dict``, ``.to``), not through ``.data``.
        """
        return {name: self._bank_weights(name, parameter) for name, parameter in self.bank.items()}

    def log_weights(self, node: ParametricNode, banks: passes.Banks | None = None) -> Tensor:
        """Return normalised log-weights of one node: sums (K, I), finite families (C, K); from ``banks`` if given."""
        bank, row = self._parameter(node)
        if isinstance(self.families.get(bank), Direct):
            raise ArgumentError(f"node: a {self.families[bank]} has no table of weights; use pc.parameters_of(node)")
        return (self.weights() if banks is None else banks)[bank].log[row]

    def parameters_of(self, node: ParametricNode) -> Tensor:
        """Return the parameters of one node as its family defines them, for instance rates (1, K); sums (K, I)."""
        if isinstance(node, Input):
            return node.distribution.parameters(self.bank_row(node))
        return self.log_weights(node).exp()

    def bank_row(self, node: ParametricNode) -> Tensor:
        """Return the unconstrained parameters of one node: sums (K, I), inputs as their family defines them."""
        bank, row = self._parameter(node)
        return self.bank[bank][row]

    @torch.no_grad()
    def set_weights(self, node: ParametricNode, weights: Tensor) -> None:
        """Set the weights of one node, and of all nodes tied to it: sums (K, I), inputs (C, K), each >= 0.

        Inputs of other families than categorical take parameters as :meth:`parameters_of` returns them.
        """
        bank, row = self._parameter(node)
        family = self.families.get(bank)
        if family is not None and not isinstance(family, Categorical):
            is_shaped = tuple(weights.shape) == node.parameter_shape
            problem = family.problem(weights) if is_shaped else f"expected the shape {node.parameter_shape}"
            if problem:
                raise ArgumentError(f"weights: {problem} for {node} of {family}, got {tuple(weights.shape)}")
            self.bank[bank][row] = family.raw(weights.to(self.device, torch.float64)).to(self.dtype)
            return
        if tuple(weights.shape) != node.parameter_shape or bool((weights < 0).any()):
            raise ArgumentError(
                f"weights: expected numbers >= 0 of shape {node.parameter_shape} for {node}, got {tuple(weights.shape)}"
            )
        self.bank[bank][row] = weights.to(self.device, torch.float64).log().to(self.dtype)

    @torch.no_grad()
    def randomize(self, *, seed: int | None = None, generator: torch.Generator | None = None) -> None:
        """Draw all weights, then apply the weights that nodes were given.

        Sums and categorical inputs are drawn from the uniform Dirichlet distribution, others as their family says.

        The draw is made in float32 on the CPU, so one seed gives one circuit on every device and in every dtype.
        """
        if generator is None:
            generator = torch.Generator()
            generator.seed() if seed is None else generator.manual_seed(seed)
        for name, parameter in self.bank.items():
            family = self.families.get(name, _DIRICHLET)
            parameter.copy_(family.initial(parameter.shape, generator))
        for node in self._parameter_address:
            if node.weights is not None:
                self.set_weights(node, node.weights)

    def address(self, node: Node) -> Address:
        """Return where a node of the circuit is evaluated: (layer, row)."""
        try:
            return self._address[node]
        except KeyError:
            raise ArgumentError(f"node: {node} does not belong to {self.circuit}") from None

    def __repr__(self) -> str:
        return f"CompiledCircuit({self.circuit}, {self.circuit.num_parameters} parameters, {self.dtype}, {self.device})"

    def _parameter(self, node: ParametricNode) -> tuple[str, int]:
        owner = parameter_owner(node)
        if owner not in self._parameter_address:
            raise ArgumentError(f"node: {node} does not belong to {self.circuit}")
        return self._parameter_address[owner]

    def _bank_weights(self, name: str, parameter: Tensor) -> Weights:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and parameter.requires_grad):
            return self._read_weights(name, parameter)
        version = None if parameter.is_inference() else parameter._version
        key = (version, parameter.data_ptr(), parameter.dtype, parameter.device)
        cached = self._cache.get(name)
        if cached is not None and cached[0] == key and version is not None:
            return cached[1]
        with torch.inference_mode(False), torch.no_grad():
            weights = self._read_weights(name, parameter.detach())
        self._cache[name] = (key, weights)
        return weights

    def _read_weights(self, name: str, parameter: Tensor) -> Weights:
        if name in self.families:
            log = self.families[name].read(parameter)
            return Weights(log, self.families[name].linear(log))
        log = torch.log_softmax(parameter, -1)
        return Weights(log, log.detach().exp())

    def _build_layer(self, nodes: Sequence[Node], dtype: torch.dtype) -> InputLayer | ProductLayer | SumLayer:
        first = nodes[0]
        children = [[self._address[child] for child in node.children] for node in nodes]
        child_units = [child.num_units for child in first.children]
        if isinstance(first, Product):
            return ProductLayer(children, child_units, first.mode)
        owners = [self._parameter_address[parameter_owner(node)] for node in nodes if isinstance(node, ParametricNode)]
        parameters = ParameterRows(owners[0][0], [row for _, row in owners])
        if isinstance(first, Sum):
            return SumLayer(children, child_units, parameters)
        variables = [node.var for node in nodes if isinstance(node, Input)]
        family = self.families[parameters.bank]
        if isinstance(family, Direct):
            return DirectLayer(variables, parameters, self.circuit.num_vars, family, dtype)
        return TableLayer(variables, parameters, self.circuit.num_vars)


def compile(
    circuit: Circuit,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    backend: Literal["torch", "pyjuice"] = "torch",
) -> CompiledCircuit:
    """Compile a circuit onto tensors, randomly initialised but for the weights that its nodes were given.

    Args:
        circuit: the symbolic circuit.
        device: where the parameters live.
        dtype: torch.float32 or torch.float64.
        seed: for the initial weights; fresh entropy when neither it nor ``generator`` is given.
        generator: a CPU generator, instead of ``seed``.
        backend: "torch", or "pyjuice": PyJuice's CUDA kernels, see :class:`~circuits.interop.backend.JuiceCircuit`.

    Raises:
        ArgumentError: an argument has a wrong type or value, or the backend cannot run here.
    """
    if not isinstance(circuit, Circuit):
        raise ArgumentError(f"circuit: expected ct.Circuit(root), got {type(circuit).__name__}")
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if seed is not None and generator is not None:
        raise ArgumentError("seed: give either seed or generator, not both")
    if backend not in ("torch", "pyjuice"):
        raise ArgumentError(f"backend: expected 'torch' or 'pyjuice', got {backend!r}")
    if backend == "pyjuice":
        from circuits.interop.backend import compile_with_pyjuice

        return compile_with_pyjuice(circuit, device, dtype, seed, generator)
    pc = CompiledCircuit(circuit, dtype=dtype)
    pc.randomize(seed=seed, generator=generator)
    return pc.to(device)


def _fold(circuit: Circuit) -> list[list[Node]]:
    """Group the nodes into layers of equal shape, input layers first, every layer after those of its children."""
    depth: dict[Node, int] = {}
    groups: dict[tuple[int, Hashable], list[Node]] = defaultdict(list)
    for node in circuit.nodes:
        depth[node] = 1 + max((depth[child] for child in node.children), default=-1)
        groups[depth[node], _shape_key(node)].append(node)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _shape_key(node: Node) -> Hashable:
    child_units = tuple(child.num_units for child in node.children)
    if isinstance(node, Input):
        return "input", node.distribution.stored_as, node.parameter_shape
    if isinstance(node, Product):
        return "product", node.mode, child_units
    return "sum", node.num_units, child_units


def _assign_parameters(
    layers: Sequence[Sequence[Node]],
) -> tuple[dict[ParametricNode, tuple[str, int]], dict[str, tuple[int, int, int]], dict[str, Distribution]]:
    """Give every parameter owner a row in the bank of its family and shape, in the order of use.

    Returns:
        (addresses, bank shapes, families of the banks of inputs).
    """
    addresses: dict[ParametricNode, tuple[str, int]] = {}
    families: dict[str, Distribution] = {}
    shapes: dict[str, tuple[int, int, int]] = {}
    for node in _parametric_nodes(layers):
        owner = parameter_owner(node)
        if owner in addresses:
            continue
        rows, columns = owner.parameter_shape
        name = f"sum_{rows}x{columns}"
        if isinstance(owner, Input):
            name = _input_bank(owner.distribution.stored_as, f"{rows}x{columns}", families)
        used = shapes.get(name, (0, rows, columns))[0]
        addresses[owner] = (name, used)
        shapes[name] = (used + 1, rows, columns)
    return addresses, shapes, families


def _input_bank(family: Distribution, size: str, families: dict[str, Distribution]) -> str:
    """Return the bank of a family's parameters, and enter it into ``families``."""
    name = f"input_{size}" if isinstance(family, Categorical) else f"input_{family.family}_{size}"
    base, number = name, 1
    while families.setdefault(name, family) != family:
        number += 1
        name = f"{base}_{number}"
    return name


def _parametric_nodes(layers: Sequence[Sequence[Node]]) -> Iterator[ParametricNode]:
    for nodes in layers:
        for node in nodes:
            if isinstance(node, ParametricNode):
                yield node


def _last_uses(layers: Sequence[Sequence[Node]], address: dict[Node, Address]) -> list[list[int]]:
    """Per layer, the layers whose outputs nobody needs after it."""
    last_user: dict[int, int] = {}
    for position, nodes in enumerate(layers):
        for node in nodes:
            for child in node.children:
                last_user[address[child][0]] = position
    spent: list[list[int]] = [[] for _ in layers]
    for layer, user in last_user.items():
        spent[user].append(layer)
    return spent
