"""Deterministic automata: their algebra equals that of the sets of sequences that they accept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct

DFA = ct.queries.DeterministicAutomaton


@st.composite
def automata(draw, num_values=None, max_states=4):
    num_states = draw(st.integers(1, max_states))
    num_values = draw(st.integers(1, 3)) if num_values is None else num_values
    rows = st.lists(st.integers(-1, num_states - 1), min_size=num_values, max_size=num_values)
    table = torch.tensor(draw(st.lists(rows, min_size=num_states, max_size=num_states)))
    accepting = draw(st.sets(st.integers(0, num_states - 1)))
    return DFA.from_table(table, accepting, start=draw(st.integers(0, num_states - 1)))


def sequences(num_values, length):
    every = torch.arange(num_values)
    return torch.cartesian_prod(*[every] * length).reshape(-1, length) if length else torch.zeros(1, 0).long()


def accepts_one_by_one(table, accepting, start, sequence):
    state = start
    for value in sequence:
        state = table[state][value] if state >= 0 else -1
    return state in accepting


@given(st.data())
def test_running_a_table(data):
    num_states, num_values = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    table = [[data.draw(st.integers(-1, num_states - 1)) for _ in range(num_values)] for _ in range(num_states)]
    accepting = data.draw(st.sets(st.integers(0, num_states - 1)))
    automaton = DFA.from_table(torch.tensor(table), accepting)
    for length in range(4):
        x = sequences(num_values, length)
        expected = [accepts_one_by_one(table, accepting, 0, row) for row in x.tolist()]
        assert automaton.accepts(x).tolist() == expected


@given(st.data(), st.integers(1, 3))
def test_the_intersection_accepts_what_both_accept(data, num_values):
    one, two = data.draw(automata(num_values)), data.draw(automata(num_values))
    both = one & two
    for length in range(5):
        x = sequences(num_values, length)
        assert torch.equal(both.accepts(x), one.accepts(x) & two.accepts(x))


@given(automata())
def test_the_smallest_automaton_accepts_the_same(automaton):
    smallest = automaton.minimized()
    lengths = range(automaton.num_states + 2)
    accepted = [automaton.accepts(sequences(automaton.num_values, n)) for n in lengths]
    for n in lengths:
        assert torch.equal(smallest.accepts(sequences(automaton.num_values, n)), accepted[n])
    assert automaton.is_empty == smallest.is_empty == (not any(bool(a.any()) for a in accepted))
    assert smallest.minimized().num_states == smallest.num_states <= automaton.num_states
    if not smallest.is_empty:
        behaviour = {  # no two states accept the same, by Moore's bound on the length that tells them apart
            tuple(
                torch.cat(
                    [DFA(smallest.classes, smallest.transition, smallest.accepting, s).accepts(x) for x in all_x]
                ).tolist()
            )
            for all_x in [[sequences(smallest.num_values, n) for n in range(smallest.num_states)]]
            for s in range(smallest.num_states)
        }
        assert len(behaviour) == smallest.num_states


@given(automata())
def test_what_can_still_be_accepted_in_n_values(automaton):
    table = automaton.can_accept_in(4)
    for n in range(5):
        x = sequences(automaton.num_values, n)
        for state in range(automaton.num_states):
            moved = DFA(automaton.classes, automaton.transition, automaton.accepting, state)
            assert bool(table[n, state]) == bool(moved.accepts(x).any())


def test_values_that_lead_alike_share_a_class():
    automaton = DFA.from_table(torch.tensor([[0, 1, 0, -1, 1], [1, 1, 1, 0, 1]]), [1])
    assert automaton.num_classes == 3
    assert automaton.classes[0] == automaton.classes[2]
    assert automaton.classes[1] == automaton.classes[4]
    reaches = automaton.reaches_by(torch.tensor([True, False, True, True, False]))
    assert reaches.tolist() == [[True, False], [True, True]]


def test_a_run_goes_on_from_given_states():
    automaton = DFA.from_table(torch.tensor([[0, 1], [2, 1], [-1, 2]]), [2])
    x = torch.tensor([[1, 0, 1], [1, 0, 0]])
    whole = automaton.run(x)
    assert whole.tolist() == [[0, 1, 2, 2], [0, 1, 2, -1]]
    assert torch.equal(automaton.run(x[:, 1:], whole[:, 1]), whole[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": torch.tensor([0, 2])}, "classes: expected numbers from 0 to 1"),
        ({"classes": torch.tensor([0.0, 1.0])}, "classes: expected int64"),
        ({"transition": torch.tensor([[0, 2], [0, 0]])}, "transition: expected numbers from -1 to 1"),
        ({"accepting": torch.tensor([True])}, "accepting: expected bool"),
        ({"start": 2}, "start: expected a state from 0 to 1"),
    ],
)
def test_tables_that_do_not_fit(change, message):
    tables = {
        "classes": torch.tensor([0, 1]),
        "transition": torch.tensor([[0, 1], [1, 0]]),
        "accepting": torch.tensor([True, False]),
    }
    DFA(**tables)
    with pytest.raises(ct.ArgumentError, match=message):
        DFA(**{**tables, **change})


def test_automata_over_different_values():
    one, two = (DFA.from_table(torch.zeros(1, n, dtype=torch.int64), [0]) for n in (2, 3))
    with pytest.raises(ct.ArgumentError, match="other: expected an automaton over 2 values, got 3"):
        one & two
