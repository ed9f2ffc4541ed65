"""A small circuit as the mixture that it is: one component per latent configuration."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

import circuits as ct
from diffusion.errors import ArgumentError, ImpossibleEvidenceError

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Bools = NDArray[np.bool_]

_MAX_COMPONENTS = 1 << 14

_Configuration = tuple[float, dict[int, Floats]]
"""A weight, and the distribution (V,) of each variable."""


@dataclass(frozen=True, eq=False)
class Components:
    """A mixture of factorized distributions, ``p(x) = sum_z p(z) prod_i p(x_i | z)``.

    Attributes:
        weights: p(z), (Z,).
        leaves: p(x_i = v | z), (Z, L, V).
    """

    weights: Floats
    leaves: Floats

    @classmethod
    def of(cls, pc: ct.CompiledCircuit) -> Components:
        """Enumerate a circuit's latent configurations, those with weight; raises ArgumentError for more than 2**14."""
        units: dict[ct.Node, list[list[_Configuration]]] = {}
        for node in pc.circuit.nodes:
            children = [units[child] for child in node.children]
            if isinstance(node, ct.Input):
                table = pc.log_weights(node).detach().double().exp().cpu().numpy()  # (V, K)
                units[node] = [[(1.0, {node.var: table[:, unit]})] for unit in range(node.num_units)]
            elif isinstance(node, ct.Product):
                parts = zip(*children, strict=True) if node.mode == "elementwise" else itertools.product(*children)
                units[node] = [_multiplied(part) for part in parts]
            elif isinstance(node, ct.Sum):
                weights = pc.log_weights(node).detach().double().exp().tolist()
                below = [unit for child in children for unit in (child if node.unit is None else [child[node.unit]])]
                units[node] = [_added(row, below) for row in weights]
        (root,) = units[pc.circuit.root]
        variables = range(pc.circuit.num_vars)
        leaves = np.array([[tables[var] for var in variables] for _, tables in root])
        return cls(np.array([weight for weight, _ in root]), leaves)

    def coupled(self, q: Floats, tokens: Ids, masked: Bools, normalization: str) -> Components:
        """Return the coupled distribution of one text: these times q at open positions, given the other tokens.

        Args:
            q: the prediction, (L, V).
            tokens: (L,).
            masked: bool (L,).
            normalization: "global": the latents' posterior sees q; "local": it sees the observed tokens only.

        Raises:
            ImpossibleEvidenceError: circuit and prediction rule out every text.
        """
        factors = np.where(masked[:, None], q, np.eye(q.shape[1])[tokens])
        products = self.leaves * factors
        normalisers = products.sum(2)  # (Z, L)
        seen = normalisers if normalization == "global" else np.where(masked, normalisers > 0, normalisers)
        weights = self.weights * seen.prod(1)
        if not weights.sum() > 0:
            raise ImpossibleEvidenceError("logits: circuit and denoiser rule out every text")
        possible = weights > 0
        given = products[possible] / normalisers[possible, :, None]
        return Components(weights[possible] / weights.sum(), given)

    def given(self, tokens: Ids, observed: Bools) -> Components:
        """Return the mixture given tokens, (L,), where ``observed``, bool (L,), is True.

        Raises ImpossibleEvidenceError if they are impossible.
        """
        likelihood = np.where(observed, self.leaves[:, np.arange(len(tokens)), np.where(observed, tokens, 0)], 1.0)
        weights = self.weights * likelihood.prod(1)
        if not weights.sum() > 0:
            raise ImpossibleEvidenceError("tokens: no component has them")
        possible, known = weights > 0, np.eye(self.leaves.shape[2])[np.where(observed, tokens, 0)]
        leaves = np.where(observed[:, None], known, self.leaves[possible])
        return Components(weights[possible] / weights.sum(), leaves)

    @cached_property
    def marginals(self) -> Floats:
        """``p(x_i = v)``, (L, V)."""
        return np.asarray(np.tensordot(self.weights, self.leaves, 1))

    def mutual_information(self, num_candidates: int = 4) -> Floats:
        """Return the mutual information of all pairs of positions, (L, L), in nats.

        A position tells so many candidates, its most probable tokens, apart; all others are one.
        """
        length, num_tokens = self.marginals.shape
        order = np.argsort(-np.round(self.marginals, 12), 1, kind="stable")
        cell = np.empty_like(order)
        np.put_along_axis(cell, order, np.minimum(np.arange(num_tokens), num_candidates)[None].repeat(length, 0), 1)
        sorts = np.arange(min(num_candidates + 1, num_tokens))
        told = np.einsum("zlv,lvc->zlc", self.leaves, (cell[:, :, None] == sorts).astype(float))
        pairs = np.einsum("z,zic,zjd->ijcd", self.weights, told, told)
        apart = pairs.sum(3, keepdims=True) * pairs.sum(2, keepdims=True)
        ratio = np.where(pairs > 0, pairs / np.where(apart > 0, apart, 1.0), 1.0)
        information = (pairs * np.log(ratio)).sum((2, 3))
        np.fill_diagonal(information, 0.0)
        return np.asarray(information)

    def prob(self, texts: Ids) -> Floats:
        """Return the probabilities (S,) of texts (S, L)."""
        total = np.zeros(len(texts))
        for weight, leaves in zip(self.weights, self.leaves, strict=True):
            total += weight * leaves[np.arange(texts.shape[1]), texts].prod(1)
        return total


def _multiplied(parts: tuple[list[_Configuration], ...]) -> list[_Configuration]:
    _check(math.prod(len(part) for part in parts))
    combined = []
    for chosen in itertools.product(*parts):
        tables = {var: table for _, part in chosen for var, table in part.items()}
        combined.append((math.prod(weight for weight, _ in chosen), tables))
    return combined


def _added(weights: list[float], units: list[list[_Configuration]]) -> list[_Configuration]:
    mixed = [(weight, unit) for weight, unit in zip(weights, units, strict=True) if weight > 0]
    _check(sum(len(unit) for _, unit in mixed))
    return [(weight * inner, tables) for weight, unit in mixed for inner, tables in unit]


def _check(count: int) -> None:
    if count > _MAX_COMPONENTS:
        raise ArgumentError(f"pc: expected at most {_MAX_COMPONENTS} latent configurations; use a smaller circuit")
