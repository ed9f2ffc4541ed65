"""Potentials on the circuit's latents that depend on the context, read from the denoiser's hidden states.

The evidence that a prediction gives is about tokens. What the denoiser knows about the plan behind them, and a static
circuit has as latents, is in its hidden states h. So the coupled product gets factors on named latents too,

    log f_n(z_n) = (A h_i(n) + a r + c)_{z_n},

with i(n) the position of latent n and r the share of the block that is masked: soft evidence on latent variables,
linear in the denoiser's last layer like its own output. With ``hidden`` units a small network takes the place of the
linear map, ``A gelu(B [h_i, r, i] + b) + c``, and reads the position too. At A = a = c = 0, as at first, it is the
plain product. (Latent-space conditioning of Li et al. 2026, arXiv 2603.00045, appendix E.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from circuits import CompiledCircuit, Input, Node, Sum
from circuits.arguments import checked_count
from diffusion.blocks import check_circuit
from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.conditioners.context import check_sizes, network, read_context, transitions_of
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction


@register("latent_potentials")
class LatentPotentials(Conditioner):
    """Log-factors on named latents from the features of a position and the mask ratio; one map for all.

    Args:
        positions: by the name of each sum node: the position whose features its factors are read from, from 0.
        num_units: N, the states of the latents.
        num_features: H.
        hidden: units of a hidden layer, which reads the position too; None: a linear map, which does not.
        seed: of the hidden layer's first weights.
        units: by the name of a sum node, which state each of its child units is, from 0; -1: none. The child units of
            nodes that are not named are all N states, in order.

    Attributes:
        linear: A, a and c: from features and mask ratio, (H + 1), to factors, (N); zero at first. With ``hidden``: a
            network from features, mask ratio and position, (H + 2), whose last layer is zero at first.
    """

    needs_features = True
    needs_observed = False

    def __init__(
        self,
        positions: Mapping[str, int],
        num_units: int,
        num_features: int,
        *,
        hidden: int | None = None,
        seed: int = 0,
        units: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(positions, Mapping) or not positions:
            raise ArgumentError(f"positions: expected positions by the name of a sum node, got {positions!r:.60}")
        for name, position in positions.items():
            checked_count(f"positions[{name!r}]", position, 0)
        check_sizes(num_units=num_units, num_features=num_features, hidden=hidden, seed=seed)
        self.positions = dict(positions)
        self.units = {name: list(states) for name, states in (units or {}).items()}
        for name, states in self.units.items():
            if name not in self.positions or not all(-1 <= state < num_units for state in states):
                raise ArgumentError(
                    f"units: expected states from -1 to {num_units - 1} of nodes that have a position, got {name!r}"
                )
        self._index = {name: torch.tensor(states) for name, states in self.units.items()}
        self.num_units, self.num_features, self.hidden, self.seed = num_units, num_features, hidden, seed
        self.linear = network(num_features + (1 if hidden is None else 2), num_units, hidden, seed=seed, is_zero=True)

    @classmethod
    def for_hmm(cls, pc: CompiledCircuit, num_features: int, *, prefix: str = "", **options: Any) -> LatentPotentials:
        """Build the potentials on the hidden state of every step of a circuit of :func:`circuits.structures.hmm`.

        Its root ``initial`` mixes the states of step 0, and ``transition{t}`` those of step t + 1.

        Args:
            pc: the circuit.
            num_features: H.
            prefix: of the names of its nodes, where it is a component of another.
            **options: ``hidden`` and ``seed``.

        Raises:
            ArgumentError: the circuit has no nodes of these names.
        """
        places = transitions_of(pc, prefix)
        positions = {f"{prefix}initial": 0, **{name: right for name, (_, right) in places.items()}}
        made = cls(positions, pc.sum_node(f"{prefix}initial").parameter_shape[1], num_features, **options)
        made.check(pc)
        return made

    @classmethod
    def for_tree(cls, pc: CompiledCircuit, num_features: int, *, prefix: str = "", **options: Any) -> LatentPotentials:
        """Build the potentials on the hidden variables of :func:`circuits.structures.latent_tree`, or ``hclt``.

        Its root ``root`` mixes the states of the hidden variable at the top, ``transition{i}`` those of variable i;
        leaves of the tree have none of their own.

        Args:
            pc: the circuit, whose hidden variables emit the positions that they are named after.
            num_features: H.
            prefix: of the names of its nodes, where it is a component of another.
            **options: ``hidden`` and ``seed``.

        Raises:
            ArgumentError: the circuit has no nodes of these names.
        """
        check_circuit(pc)
        top = pc.sum_node(f"{prefix}root")
        positions = {f"{prefix}root": _leaf_of(top.children[0]).var}
        for node in pc.circuit.sums:
            number = (node.name or "").removeprefix(f"{prefix}transition")
            if number.isdecimal():
                positions[f"{prefix}transition{number}"] = int(number)
        made = cls(positions, top.parameter_shape[1], num_features, **options)
        made.check(pc)
        return made

    @classmethod
    def for_block_sparse_hmm(
        cls, pc: CompiledCircuit, num_features: int, *, prefix: str = "", **options: Any
    ) -> LatentPotentials:
        """Build the potentials on the hidden state of every step of :func:`circuits.structures.block_sparse_hmm`.

        Those of :func:`circuits.structures.monarch_hmm` are groups of states too.

        Args:
            pc: the circuit, with or without a rank.
            num_features: H.
            prefix: of the names of its nodes, where it is a component of another.
            **options: ``hidden`` and ``seed``.

        Raises:
            ArgumentError: the circuit has no nodes of these names.
        """
        check_circuit(pc)
        root = pc.sum_node(f"{prefix}initial")
        groups, positions, units = dict[str, list[int]](), {f"{prefix}initial": 0}, dict[str, list[int]]()
        for child in root.children:
            leaf, first = _leaf_of(child), sum(map(len, groups.values()))
            groups[_group_of(leaf)] = list(range(first, first + leaf.num_units))
        for node in pc.circuit.sums:
            found = re.fullmatch(f"{re.escape(prefix)}(?:transition|factor)([0-9]+)(?:_[0-9]+)?", node.name or "")
            if found is not None:
                positions[found[0]], units[found[0]] = int(found[1]) + 1, []
                for child in node.children:  # the states of a group, or what all groups share
                    states = [-1] * child.num_units
                    if not isinstance(child, Sum):
                        states = groups[_group_of(_leaf_of(child))]
                    units[found[0]] += states if node.unit is None else states[node.unit : node.unit + 1]
        made = cls(positions, root.parameter_shape[1], num_features, units=units, **options)
        made.check(pc)
        return made

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction as it is, with the log-factors (B, N) of every latent.

        Raises:
            ArgumentError: the prediction has no features, or of another number.
        """
        at = sorted(set(self.positions.values()))
        places = {str(position): [position] for position in at}
        like, has_position = next(self.linear.parameters()), self.hidden is not None
        context = read_context(places, self.num_features, prediction, masked, like, has_position=has_position)
        factors = dict(zip(at, nn.functional.pad(self.linear(context), (0, 1)).unbind(1), strict=True))  # -1: none
        return Conditioned(
            prediction,
            {
                name: factors[position][:, self._index[name]] if name in self.units else factors[position][:, :-1]
                for name, position in self.positions.items()
            },
        )

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "positions": self.positions,
            "num_units": self.num_units,
            "num_features": self.num_features,
            **({} if self.hidden is None else {"hidden": self.hidden, "seed": self.seed}),
            **({"units": self.units} if self.units else {}),
        }

    def check(self, pc: CompiledCircuit) -> None:
        """Raise ArgumentError unless the circuit has these nodes, with as many child units, and these positions."""
        for name, position in self.positions.items():
            num_children = pc.sum_node(name).parameter_shape[1]
            if num_children != len(self.units.get(name, range(self.num_units))) or position >= pc.circuit.num_vars:
                raise ArgumentError(
                    f"conditioners: the potentials of {name!r} are for {self.num_units} units at position "
                    f"{position}, and in {pc.circuit} it has {num_children} child units"
                )


def _leaf_of(node: Node) -> Input:
    """Return the input node of a state: the node itself, or the first that it multiplies."""
    return next(one for one in (node, *node.children) if isinstance(one, Input))


def _group_of(leaf: Input) -> str:
    return str(leaf.name).rpartition("_")[2]
