"""From a symbolic :class:`~circuits.symbolic.Circuit` to tensors: the module that evaluates its layers.

Each layer is one tensor operation over nodes with the same kind and shapes, and each *bank* is one parameter (P, O, I)
with all weights of a shape, of which the layers select rows; see :mod:`circuits.engine.folding` for how nodes are
assigned.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from circuits.arguments import checked_device, checked_dtype, checked_seed
from circuits.digests import same_bits
from circuits.engine.folding import Folding, fold
from circuits.engine.gathering import Address, ParameterRows
from circuits.engine.input_layers import DirectLayer, InputLayer, TableLayer
from circuits.engine.layers import ProductLayer, SumLayer
from circuits.engine.question import Question
from circuits.engine.schedule import schedule_of
from circuits.engine.weights import CircuitWeights, Weights
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Categorical, Direct
from circuits.precision import own_precision
from circuits.symbolic import Circuit, Input, Node, ParametricNode, Product, Sum, num_free_parameters, parameter_owner
from circuits.weights.forms import Form, Own
from circuits.weights.given import ExternalWeights, checked_form, joined_by_layer

_ROWS = 4096
"""Of a table that is set: copies are made of so many at a time."""
_MANY_LAYERS = 1000
"""From so many on, the layers of chains are made when they are first asked for."""
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
        self._folding = folding = fold(circuit)
        self.families = folding.families
        self.bank = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in folding.bank_shapes.items()}
        )
        self.sum_banks = [name for name in folding.bank_shapes if name not in folding.families]
        num_inputs = sum(isinstance(nodes[0], Input) for nodes in folding.layers)
        inputs = [_input_layer(folding, nodes, circuit.num_vars, dtype) for nodes in folding.layers[:num_inputs]]
        self.input_layers: Sequence[InputLayer] = cast(Any, nn.ModuleList(inputs))
        self.layer_sizes = folding.layer_sizes
        self.last_uses = folding.last_uses
        self.sum_layers = {at: len(nodes) for at, nodes in enumerate(folding.layers) if isinstance(nodes[0], Sum)}
        self.schedule = schedule_of(folding, num_inputs, functools.partial(_inner_layer, folding))
        if len(folding.layers) < _MANY_LAYERS:
            _ = self.inner_layers  # made now: tracing compilers find them as they are
        real = {node.var for node in circuit.inputs if not node.distribution.is_discrete}
        counts = [count or -(var not in real) for var, count in enumerate(circuit.num_categories)]
        self.register_buffer("num_categories", torch.tensor(counts), persistent=False)  # as Evidence.check takes them
        # by bank: the parameters, what they were read as, and how often that had been written into
        self._cache: dict[str, tuple[Tensor, Weights, int]] = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.bank.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return next(iter(self.bank.values())).dtype

    @functools.cached_property
    def inner_layers(self) -> Sequence[ProductLayer | SumLayer]:
        """All layers above the inputs, in order."""
        return [layer for _, layer in sorted(made for step in self.schedule for made in step.layers)]

    @property
    def num_free_parameters(self) -> int:
        """How many numbers the distribution depends on, as AIC and BIC count them; weights of 0 stay 0: not counted."""
        owners = self._folding.bank_addresses
        return sum(num_free_parameters(owner, self.bank_row(owner)) for owner in owners)

    def forward(self, x: Tensor | Evidence, *, weights: CircuitWeights | None = None) -> Tensor:
        """Return ``log p(x)`` of assignments, (B, D), see :meth:`Evidence.observe`, or log Z of any evidence: (B,).

        A circuit with R classes returns (B, R), log p(x | class), unless the evidence names the class.

        Raises:
            ArgumentError: a wrong shape or dtype, or a value outside its variable's categories.
        """
        return self.log_partition(x if isinstance(x, Evidence) else Evidence.observe(x), weights)

    @own_precision
    def log_partition(self, evidence: Evidence, weights: CircuitWeights | None = None) -> Tensor:
        """Return ``log Z(e) = log sum_x p(x) prod_i e_i(x_i)``, shape (B,), differentiable in factors and weights.

        A circuit with R classes returns (B, R), one log Z per class, unless the evidence names the class.

        Args:
            evidence: for B queries.
            weights: to use in place of this module's own, see :meth:`weights`.
        """
        return Question(self, evidence, weights).log_z

    @own_precision
    def weights(
        self, *, external: Mapping[ParametricNode | str, Tensor | Form] | None = None, normalize: bool = True
    ) -> CircuitWeights:
        """Return the normalised weights of every bank, with those given to single nodes at run time in place.

        Without gradients the own weights are computed once and kept as long as the parameters are what they were: they
        are compared bit by bit with a copy, so every change is seen, however it was made. A loop of many queries saves
        the comparison by asking once and passing the result on as ``weights=``.

        Args:
            external: log-weights by node or name (neural conditioning), for this node alone, not for nodes tied to it:
                sums (K, I) or (B, K, I), inputs of finite families (C, K) or (B, C, K). Sums also take a form that
                needs no table per query: :class:`ct.weights.Gates`, :class:`ct.weights.LowRank`. Every query takes the
                result as ``weights=``, and is differentiable in the given tensors.
            normalize: whether a log-softmax makes each unit's external weights sum to 1 (along I, or C). If not, they
                are used as they are, and log Z is that of the unnormalised circuit.

        Raises:
            ArgumentError: a name or node that does not belong to the circuit, a wrong shape, batch sizes that differ,
                NaN or +inf, or, with ``normalize``, a unit whose weights are all -inf.
        """
        own = self.own_weights()
        return CircuitWeights(own, {} if external is None else self._external_weights(external, own, normalize))

    def own_weights(self) -> dict[str, Weights]:
        """Return the normalised weights of every bank, by name."""
        return {name: self._bank_weights(name, parameter) for name, parameter in self.bank.items()}

    @own_precision
    def log_weights(self, node: ParametricNode | str, weights: CircuitWeights | None = None) -> Tensor:
        """Return the normalised log-weights of a node's parameters: sums (K, I), finite families (C, K)."""
        bank, row = self.bank_address(node)
        if isinstance(self.families.get(bank), Direct):
            raise ArgumentError(f"node: a {self.families[bank]} has no table of weights; use pc.parameters_of(node)")
        return (self.weights() if weights is None else weights).own[bank].log[row]

    @own_precision
    def parameters_of(self, node: ParametricNode | str) -> Tensor:
        """Return the parameters of one node as its family defines them, for instance rates (1, K); sums (K, I)."""
        family = self.families.get(self.bank_address(node)[0])
        return self.log_weights(node).exp() if family is None else family.parameters(self.bank_row(node))

    def bank_row(self, node: ParametricNode | str) -> Tensor:
        """Return the unconstrained parameters of one node: sums (K, I), inputs as their family defines them."""
        bank, row = self.bank_address(node)
        return self.bank[bank][row]

    @torch.no_grad()
    def set_weights(self, node: ParametricNode | str, weights: Tensor) -> None:
        """Set the weights of one node, and of all nodes tied to it: sums (K, I), inputs (C, K), each >= 0.

        Inputs of other families than categorical take parameters as :meth:`parameters_of` returns them.
        """
        bank, row = self.bank_address(node)
        shape = self._owner_of(node).parameter_shape
        if not isinstance(weights, Tensor):
            got = type(weights).__name__
            raise ArgumentError(f"weights: expected a tensor {shape}, got {got}; wrap it in torch.as_tensor")
        family = self.families.get(bank)
        if family is not None and not isinstance(family, Categorical):
            problem = family.problem(weights) if tuple(weights.shape) == shape else f"expected the shape {shape}"
            if problem:
                raise ArgumentError(f"weights: {problem} for {node} of {family}, got {tuple(weights.shape)}")
            self.bank[bank][row] = family.raw(weights.to(self.device, torch.float64)).to(self.dtype)
            return
        if tuple(weights.shape) != shape or bool((weights < 0).any()):
            raise ArgumentError(f"weights: expected {shape} numbers >= 0 for {node}, got {tuple(weights.shape)}")
        for own, given in zip(self.bank[bank][row].split(_ROWS), weights.split(_ROWS), strict=True):
            own.copy_(given.to(self.device, torch.float64).log())

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
        for node in self._folding.bank_addresses:
            if node.weights is not None:
                self.set_weights(node, node.weights)

    def sum_node(self, key: Node | str) -> Sum:
        """Return the sum node of that name, or the node itself, if it belongs to the circuit."""
        node = self._node_of("node", key)
        if not isinstance(node, Sum):
            raise ArgumentError(f"node: expected a sum node, got {node}")
        return node

    def address(self, node: Node | str) -> Address:
        """Return where a node of the circuit, or the one of that name, is evaluated: (layer, row)."""
        return self._folding.addresses[self._node_of("node", node)]

    def bank_address(self, node: ParametricNode | str) -> tuple[str, int]:
        """Return where the parameters of a node are: (bank, row); nodes that share them have one address."""
        return self._folding.bank_addresses[self._owner_of(node)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        checked_dtype("dtype", dtype)  # before anything is converted
        self._cache.clear()
        for step in self.schedule:
            step.move(fn)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return f"CompiledCircuit({self.circuit}, {self.circuit.num_parameters} parameters, {self.dtype}, {self.device})"

    def _node_of(self, argument: str, key: Node | str) -> Node:
        if isinstance(key, str):
            return self.circuit.node(key)
        if key not in self._folding.addresses:
            raise ArgumentError(f"{argument}: expected a node of {self.circuit}, or its name, got {key!r}")
        return key

    def _owner_of(self, key: ParametricNode | str) -> ParametricNode:
        if isinstance(key, ParametricNode) and key in self._folding.bank_addresses:  # perhaps outside of the circuit
            return key
        node = self._node_of("node", key)
        if not isinstance(node, ParametricNode):
            raise ArgumentError(f"node: expected a sum or an input node, which have weights, got {node}")
        return parameter_owner(node)

    def _external_weights(
        self, external: Mapping[ParametricNode | str, Tensor | Form], own: Mapping[str, Weights], normalize: bool
    ) -> dict[int, ExternalWeights]:
        if not isinstance(external, Mapping):
            raise ArgumentError(f"external: expected weights by node or name, got {type(external).__name__}")
        by_layer: dict[int, dict[int, Form]] = defaultdict(dict)
        for key, given in external.items():
            node = self._node_of("external", key)
            layer, row = self.address(node)
            if row in by_layer[layer]:
                raise ArgumentError(f"external: {node} is given twice, by name and by node; give it once")
            by_layer[layer][row] = checked_form(given, node)
        of_layers = {}
        for layer in by_layer:
            rows = [self.bank_address(node) for node in self._folding.layers[layer] if isinstance(node, ParametricNode)]
            of_layers[layer] = Own(rows[0][0], own[rows[0][0]].log, tuple(row for _, row in rows))
        return joined_by_layer(by_layer, of_layers, len(self.input_layers), normalize=normalize)

    def _bank_weights(self, name: str, parameter: Tensor) -> Weights:
        if torch.compiler.is_compiling():
            return self._read_weights(name, parameter)
        if torch.is_grad_enabled() and parameter.requires_grad:
            self._cache.pop(name, None)  # a step of an optimizer is likely to follow: free the memory
            return self._read_weights(name, parameter)
        with torch.inference_mode(False), torch.no_grad():
            raw = parameter.detach()
            cached = self._cache.get(name)
            if cached is not None and same_bits(cached[0], raw) and _num_writes(cached[1]) == cached[2]:
                return cached[1]
            weights = self._read_weights(name, raw)
            self._cache[name] = (raw.clone(), weights, _num_writes(weights))
        return weights

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and files: it would triple their size."""
        return {**vars(self), "_cache": {}}

    def _read_weights(self, name: str, parameter: Tensor) -> Weights:
        family = self.families.get(name)
        if family is not None:
            log = family.read(parameter)
            return Weights(log, family.linear(log) if isinstance(family, Direct) else None)
        return Weights(torch.log_softmax(parameter, -1))


def _inner_layer(folding: Folding, position: int) -> ProductLayer | SumLayer:
    """Return the layer of product or sum nodes that are evaluated together."""
    nodes = folding.layers[position]
    children = [[folding.addresses[child] for child in node.children] for node in nodes]
    child_units = [child.num_units for child in nodes[0].children]
    if isinstance(nodes[0], Product):
        return ProductLayer(children, child_units, nodes[0].mode, nodes)
    sums = [node for node in nodes if isinstance(node, Sum)]
    num_siblings = len(sums) // len({(node.children, node.unit) for node in sums})
    units = [node.unit for node in sums if node.unit is not None]
    return SumLayer(children, child_units, _parameter_rows(folding, nodes), num_siblings, units)


def _input_layer(folding: Folding, nodes: Sequence[Node], num_vars: int, dtype: torch.dtype) -> InputLayer:
    """Return the layer of input nodes that are evaluated together."""
    parameters = _parameter_rows(folding, nodes)
    variables = [node.var for node in nodes if isinstance(node, Input)]
    family = folding.families[parameters.bank]
    if isinstance(family, Direct):
        return DirectLayer(variables, parameters, num_vars, family, dtype)
    return TableLayer(variables, parameters, num_vars)


def _parameter_rows(folding: Folding, nodes: Sequence[Node]) -> ParameterRows:
    owners = [folding.bank_addresses[parameter_owner(node)] for node in nodes if isinstance(node, ParametricNode)]
    return ParameterRows(owners[0][0], [row for _, row in owners])


def _num_writes(weights: Weights) -> int:
    """Return how often somebody has written into the tensors in place."""
    return sum(tensor._version for tensor in vars(weights).values())


def compile(
    circuit: Circuit,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> CompiledCircuit:
    """Compile a circuit onto tensors, randomly initialised but for the weights that its nodes were given.

    Args:
        circuit: the symbolic circuit.
        device: where the parameters live.
        dtype: torch.float32 or torch.float64.
        seed: for the initial weights; fresh entropy when neither it nor ``generator`` is given.
        generator: a CPU generator, instead of ``seed``.

    Raises:
        ArgumentError: an argument has a wrong type or value, or the device is not here.
    """
    if not isinstance(circuit, Circuit):
        raise ArgumentError(f"circuit: expected ct.Circuit(root), got {type(circuit).__name__}")
    checked_dtype("dtype", dtype)
    if seed is not None and generator is not None:
        raise ArgumentError("seed: give either seed or generator, not both")
    checked_seed("seed", seed)
    target = checked_device("device", device)
    pc = CompiledCircuit(circuit, dtype=dtype)
    pc.randomize(seed=seed, generator=generator)
    return pc if target == pc.device else pc.to(target)
