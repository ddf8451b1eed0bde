"""The lifecycle table: complete, and every state can end."""

import pytest

from diptych.scheduler.lifecycle import HOLDING, TABLE, RowEvent, RowState, advance


def test_every_state_has_a_row_and_every_entry_is_known() -> None:
    assert set(TABLE) == set(RowState)
    for entries in TABLE.values():
        assert set(entries) <= set(RowEvent)
        assert set(entries.values()) <= set(RowState)


def test_a_missing_entry_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="no entry for place in state running"):
        advance(RowState.RUNNING, RowEvent.PLACE)


def test_every_state_is_reached_and_reaches_gone() -> None:
    reached, front = {RowState.QUEUED}, [RowState.QUEUED]
    while front:
        for after in TABLE[front.pop()].values():
            if after not in reached:
                reached.add(after)
                front.append(after)
    assert reached == set(RowState)
    ends = {RowState.GONE}
    while more := {s for s in RowState if set(TABLE[s].values()) & ends} - ends:
        ends |= more
    assert ends == set(RowState)


def test_blocks_are_left_only_by_drain_or_fail() -> None:
    for state in HOLDING:
        for event, after in TABLE[state].items():
            leaves = after not in HOLDING
            assert leaves == (event in (RowEvent.DRAIN, RowEvent.FAIL)), (state, event)
    for state in set(RowState) - set(HOLDING):
        for event, after in TABLE[state].items():
            assert (after in HOLDING) == (event is RowEvent.PLACE), (state, event)


def test_what_others_may_say_at_any_time_has_an_entry() -> None:
    """Abort and close meet every living state; a worker's word, every state with workers."""
    for state in set(RowState) - {RowState.GONE}:
        assert RowEvent.ABORT in TABLE[state]
        assert RowEvent.CLOSE in TABLE[state]
        assert RowEvent.SUBMIT in TABLE[state] or state is RowState.CLOSING
    for state in HOLDING:
        assert RowEvent.DOWN in TABLE[state]
        assert RowEvent.FINISH in TABLE[state] or state is RowState.FINISHING
        assert RowEvent.DRAIN in TABLE[state] or state is RowState.RUNNING
