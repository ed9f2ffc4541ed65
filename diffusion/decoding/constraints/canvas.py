"""A constraint on a canvas that is half filled: where its automaton can be, and what can still be accepted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.queries import DeterministicAutomaton
from diffusion.decoding.constraints.vocabulary import with_end
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction


class Reach(NamedTuple):
    """In which of the automaton's S states each place of a canvas of T positions can be; place t is before position t.

    A canvas can be completed exactly if ``forward[:, t] & backward[:, t]`` has a state, at one place t or at every one.
    """

    forward: Tensor
    """Which states what stands before a place can lead to, masked positions holding anything: bool (B, T + 1, S)."""
    backward: Tensor
    """From which states what stands after a place can be accepted: bool (B, T + 1, S)."""

    @property
    def is_feasible(self) -> Tensor:
        """Which rows can be completed, bool (B,)."""
        return (self.forward[:, -1] & self.backward[:, -1]).any(-1)

    def ends(
        self,
        rows: Tensor,  # shape: (n,)
        start: Tensor,  # shape: (n,)
        stop: Tensor,  # shape: (n,)
    ) -> tuple[Tensor, Tensor]:
        """Return in which states n windows may begin and end, bool (n, S) each.

        Whatever is written between them along a path from one of the former to one of the latter leaves the row
        feasible.

        Args:
            rows: int64 (n,), the row of each window.
            start: its first position.
            stop: the position after its last.
        """
        return self.forward[rows, start], self.backward[rows, stop]


@dataclass(frozen=True, eq=False)
class Constraint:
    """An automaton over tokens, and which tokens may be written at masked positions.

    Attributes:
        automaton: over the V tokens.
        can_write: bool (V,).
    """

    automaton: DeterministicAutomaton
    can_write: Tensor

    @classmethod
    def of(
        cls,
        automaton: DeterministicAutomaton,
        spec: DenoiserSpec,
        device: torch.device | str = "cpu",
        *,
        ends: bool = False,
    ) -> Constraint:
        """Return a constraint for the tokens of a denoiser, which writes all but its forbidden ones.

        Args:
            automaton: over its V tokens.
            spec: of the denoiser.
            device: of the canvas.
            ends: whether texts end at an end-of-text token and padding follows, whatever the automaton makes of it. It
                then has to accept what stands before that token, or up to and with it.

        Raises:
            ArgumentError: the automaton is over another number of tokens.
        """
        if not isinstance(automaton, DeterministicAutomaton):
            raise ArgumentError(
                f"constraint: expected what df.constraints returns, got {type(automaton).__name__}; "
                "df.constraints.automaton converts automata"
            )
        if automaton.num_values != spec.vocab_size:
            raise ArgumentError(
                f"constraint: expected one over the denoiser's {spec.vocab_size} tokens, got {automaton.num_values}; "
                "build it with df.constraints.vocabulary(tokenizer, vocab_size=...)"
            )
        if ends:
            after_eos = automaton.transition[:, automaton.classes[list(spec.eos_ids)]]  # (S, n)
            can_end = automaton.accepting.unsqueeze(1) | (
                (after_eos >= 0) & automaton.accepting[after_eos.clamp_min(0)]
            )
            automaton = with_end(automaton, can_end, spec.eos_ids, spec.pad_id)
        can_write = torch.ones(spec.vocab_size, dtype=torch.bool, device=device)
        can_write[torch.tensor(spec.forbidden_ids, device=device)] = False
        return cls(automaton.to(device), can_write)

    def reach(
        self,
        tokens: Tensor,  # shape: (B, T)
        masked: Tensor,  # shape: (B, T)
        reads: Tensor | None = None,  # shape: (B, T)
        *,
        start: Tensor | None = None,  # shape: (B, S)
        accept: Tensor | None = None,  # shape: (B, S)
    ) -> Reach:
        """Return where the automaton can be at every place of a canvas, or of a window of it.

        Args:
            tokens: int64 (B, T); entries at masked positions are ignored.
            masked: bool (B, T), where any token that can be written may come.
            reads: bool (B, T), which positions belong to the constrained text, such as those after the prompt that are
                no padding at the left; None: all.
            start: in which states it may begin, bool (B, S); None: in its own start.
            accept: in which states it may end; None: in its own accepting states.
        """
        automaton, (num_rows, num_positions) = self.automaton, tokens.shape
        if start is None:
            start = (torch.arange(automaton.num_states, device=tokens.device) == automaton.start).expand(num_rows, -1)
        if accept is None:
            accept = automaton.accepting.expand(num_rows, -1)
        reads = torch.ones_like(masked) if reads is None else reads
        matrices, move = self._moves(tokens, masked, reads)
        is_read = reads.any(0).tolist()
        forward, backward = [start.float().unsqueeze(1)], [accept.float().unsqueeze(1)]  # (B, 1, S) each
        for t in range(num_positions):
            before = forward[-1]
            forward.append((before @ matrices[move[:, t]]).clamp_max_(1) if is_read[t] else before)
        for t in reversed(range(num_positions)):
            after = backward[-1]
            backward.append((after @ matrices[move[:, t]].mT).clamp_max_(1) if is_read[t] else after)
        return Reach(torch.cat(forward, 1) > 0, torch.cat(backward[::-1], 1) > 0)

    def check(self, tokens: Tensor, masked: Tensor, reads: Tensor | None = None) -> Reach:
        """Return :meth:`reach` of a canvas; raises ArgumentError if it cannot be completed, for which row, and why."""
        reach = self.reach(tokens, masked, reads)
        infeasible = (~reach.is_feasible).nonzero().flatten().tolist()
        if not infeasible:
            return reach
        row = infeasible[0]
        raise ArgumentError(
            f"constraint: expected a canvas that some text fits into, got {len(infeasible)} of {len(tokens)} rows "
            f"without one; row {row}: {self._reason(reach, tokens, masked, reads, row)}"
        )

    def _reason(self, reach: Reach, tokens: Tensor, masked: Tensor, reads: Tensor | None, row: int) -> str:
        if self.automaton.is_empty:
            return "no text of any length satisfies it"
        is_read = torch.ones_like(masked[row]) if reads is None else reads[row]
        num_read = int(is_read.sum())
        accepted_in = self._can_accept_in(num_read + self.automaton.num_states)  # (n + 1, S)
        lengths = accepted_in[:, self.automaton.start].nonzero().flatten().tolist()
        if not lengths:
            return "every text that satisfies it needs tokens that the denoiser may not write"
        if num_read not in lengths:
            nearest = min(lengths, key=lambda n: abs(n - num_read))
            return f"no text of exactly {num_read} tokens, its end included, satisfies it, one of {nearest} could"
        num_left = num_read - torch.nn.functional.pad(is_read.cumsum(0), (1, 0))
        can_go_on = (reach.forward[row] & accepted_in[num_left]).any(-1)  # with all that follows masked
        last = int((~can_go_on).nonzero().flatten()[0]) - 1
        return (
            f"the fixed tokens contradict it: after token {int(tokens[row, last])} at position {last} nothing is "
            "accepted any more; mask more positions, or loosen the constraint"
        )

    def _can_accept_in(self, num_tokens: int) -> Tensor:
        table = [self.automaton.accepting]
        for _ in range(num_tokens):
            table.append((self._reaches @ table[-1].float()) > 0)
        return torch.stack(table)

    def commit(
        self,
        proposed: Tensor,  # shape: (B, L)
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        ranked: Tensor,  # shape: (B, n)
        *,
        reads: Tensor | None = None,  # shape: (B, L)
        start: Tensor | None = None,  # shape: (B, S)
        accept: Tensor | None = None,  # shape: (B, S)
    ) -> Tensor:  # shape: (B, L)
        """Return which of some positions can take tokens that were proposed one by one: bool (B, L).

        One position after the other is committed, unless what is committed before leaves no way to complete the canvas
        with it. Of proposals out of :class:`circuits.ConstrainedDistribution`, the first is always committed.

        Args:
            proposed: int64 (B, L).
            tokens: the canvas, or a window of it.
            masked: bool (B, L).
            ranked: positions to commit, int64 (B, n), the most reliable first; -1: none.
            reads: as for :meth:`reach`, like ``start`` and ``accept``.
            start: in which states it may begin.
            accept: in which states it may end.
        """
        committed = torch.zeros_like(masked)
        place = torch.arange(masked.shape[1], device=masked.device)
        for position in ranked.unbind(1):
            further = committed | ((place == position.unsqueeze(1)) & masked)
            held = torch.where(further, proposed, tokens)
            reach = self.reach(held, masked & ~further, reads, start=start, accept=accept)
            committed = torch.where(reach.is_feasible.unsqueeze(1), further, committed)
        return committed

    def best_of_classes(
        self,
        log_q: Tensor,  # shape: (..., V)
    ) -> Tensor:  # shape: (..., K)
        """Return the most probable token of every class that the automaton tells apart, int64.

        A list of candidates that holds these rules out no path of the automaton, however few others it holds.
        """
        columns = []
        for c in range(self.automaton.num_classes):
            members = ((self.automaton.classes == c) & self.can_write).nonzero().flatten()
            if len(members) and bool((self.automaton.transition[:, c] >= 0).any()):
                columns.append(members[log_q[..., members].argmax(-1)])
        return torch.stack(columns, -1)

    def listed(self, prediction: Prediction, top_k: int) -> Prediction:
        """List the k most probable tokens of each position, and the best of every class that the automaton tells apart.

        Args:
            prediction: of all V tokens.
            top_k: k, see :meth:`~diffusion.prediction.Prediction.listed`.
        """
        if prediction.values is not None:
            raise ArgumentError("prediction: expected one of all tokens, got a list; leave top_k out when asking")
        best = self.best_of_classes(prediction.log_q)
        kept = prediction.listed(top_k)
        if kept.values is None:
            return kept
        ordered = kept.values.sort().values
        place = torch.searchsorted(ordered, best).clamp_max(top_k - 1)
        extra = prediction.log_q.gather(2, best).masked_fill(ordered.gather(2, place) == best, -torch.inf)
        return replace(prediction, log_q=torch.cat([kept.log_q, extra], -1), values=torch.cat([kept.values, best], -1))

    @cached_property
    def _reaches(self) -> Tensor:
        """Whether a token that can be written leads from one state to another, as numbers 0 and 1, (S, S)."""
        return self.automaton.reaches_by(self.can_write).float()

    def _moves(self, tokens: Tensor, masked: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
        """Return matrices that say which state leads to which, 0 or 1, (n, S, S), and which of them at each position.

        The last but one is for masked positions, the last for those that are not read.
        """
        states = torch.arange(self.automaton.num_states, device=tokens.device)
        read = self.automaton.classes[tokens.masked_fill(masked, 0)]
        used, move = read.unique(return_inverse=True)
        by_class = self.automaton.transition[:, used].t().unsqueeze(2) == states
        others = torch.stack([self._reaches, torch.eye(len(states), device=tokens.device)])
        move = torch.where(masked, len(used), move).masked_fill(~reads, len(used) + 1)
        return torch.cat([by_class.float(), others]), move
