"""The life of one row (request, choice) as a table; a missing entry is a bug of ours.

Owns the states, the events and nothing else. Invariants: blocks are held exactly in the states of
`HOLDING`; a row leaves one of those only by DRAIN or FAIL, that is after every worker that could
touch its blocks let go or was fenced. Abort and finish may cross in either order.
"""

from enum import StrEnum
from typing import Final


class RowState(StrEnum):
    QUEUED = "queued"  # waits for a place
    RUNNING = "running"  # on one worker, or on a pair
    FINISHING = "finishing"  # ended by itself; the other worker has not let go yet
    PREEMPTING = "preempting"  # revoked to make room
    LOSING = "losing"  # a worker of it was fenced; the other one is revoked
    RESTARTING = "restarting"  # a newer attempt came; the old one is revoked
    ABORTING = "aborting"  # the client needs no more; revoked
    CLOSING = "closing"  # the request is over; revoked
    LOST = "lost"  # the API server was told, and will submit the next attempt
    DONE = "done"  # ended; holds its admission until Closed
    GONE = "gone"  # removed


class RowEvent(StrEnum):
    PLACE = "place"  # scheduler: assigned to a worker or a pair
    SUBMIT = "submit"  # API server: a newer attempt
    ABORT = "abort"  # API server: this choice is not needed any more
    CLOSE = "close"  # API server: the request is over (or the API server itself)
    FINISH = "finish"  # worker: the sequence ended by itself
    PREEMPT = "preempt"  # scheduler: its blocks are needed
    DOWN = "down"  # supervisor: a worker it needs, or its last tokens came from, was fenced
    DRAIN = "drain"  # every worker let go; the blocks are released
    FAIL = "fail"  # scheduler: it can never be computed


HOLDING: Final = (
    RowState.RUNNING,
    RowState.FINISHING,
    RowState.PREEMPTING,
    RowState.LOSING,
    RowState.RESTARTING,
    RowState.ABORTING,
    RowState.CLOSING,
)
"""The states in which a row is on workers and holds blocks."""

TABLE: Final[dict[RowState, dict[RowEvent, RowState]]] = {
    RowState.QUEUED: {
        RowEvent.PLACE: RowState.RUNNING,
        RowEvent.SUBMIT: RowState.QUEUED,
        RowEvent.ABORT: RowState.DONE,
        RowEvent.CLOSE: RowState.GONE,
        RowEvent.FAIL: RowState.DONE,
    },
    RowState.RUNNING: {
        RowEvent.SUBMIT: RowState.RESTARTING,
        RowEvent.ABORT: RowState.ABORTING,
        RowEvent.CLOSE: RowState.CLOSING,
        RowEvent.FINISH: RowState.FINISHING,
        RowEvent.PREEMPT: RowState.PREEMPTING,
        RowEvent.DOWN: RowState.LOSING,
    },
    RowState.FINISHING: {
        RowEvent.SUBMIT: RowState.RESTARTING,
        RowEvent.ABORT: RowState.FINISHING,
        RowEvent.CLOSE: RowState.CLOSING,
        RowEvent.DOWN: RowState.LOSING,
        RowEvent.DRAIN: RowState.DONE,
    },
    RowState.PREEMPTING: {
        RowEvent.SUBMIT: RowState.RESTARTING,
        RowEvent.ABORT: RowState.ABORTING,
        RowEvent.CLOSE: RowState.CLOSING,
        RowEvent.FINISH: RowState.FINISHING,
        RowEvent.DOWN: RowState.LOSING,
        RowEvent.DRAIN: RowState.LOST,
    },
    RowState.LOSING: {
        RowEvent.SUBMIT: RowState.RESTARTING,
        RowEvent.ABORT: RowState.ABORTING,
        RowEvent.CLOSE: RowState.CLOSING,
        RowEvent.FINISH: RowState.FINISHING,
        RowEvent.DOWN: RowState.LOSING,
        RowEvent.DRAIN: RowState.LOST,
        RowEvent.FAIL: RowState.DONE,
    },
    RowState.RESTARTING: {
        RowEvent.SUBMIT: RowState.RESTARTING,
        RowEvent.ABORT: RowState.ABORTING,
        RowEvent.CLOSE: RowState.CLOSING,
        RowEvent.FINISH: RowState.RESTARTING,
        RowEvent.DOWN: RowState.RESTARTING,
        RowEvent.DRAIN: RowState.QUEUED,
        RowEvent.FAIL: RowState.DONE,
    },
    RowState.ABORTING: {
        RowEvent.SUBMIT: RowState.RESTARTING,
        RowEvent.ABORT: RowState.ABORTING,
        RowEvent.CLOSE: RowState.CLOSING,
        RowEvent.FINISH: RowState.ABORTING,
        RowEvent.DOWN: RowState.ABORTING,
        RowEvent.DRAIN: RowState.DONE,
    },
    RowState.CLOSING: {
        RowEvent.ABORT: RowState.CLOSING,
        RowEvent.CLOSE: RowState.CLOSING,
        RowEvent.FINISH: RowState.CLOSING,
        RowEvent.DOWN: RowState.CLOSING,
        RowEvent.DRAIN: RowState.GONE,
    },
    RowState.LOST: {
        RowEvent.SUBMIT: RowState.QUEUED,
        RowEvent.ABORT: RowState.DONE,
        RowEvent.CLOSE: RowState.GONE,
    },
    RowState.DONE: {
        RowEvent.SUBMIT: RowState.QUEUED,
        RowEvent.ABORT: RowState.DONE,
        RowEvent.CLOSE: RowState.GONE,
        RowEvent.DOWN: RowState.LOST,
    },
    RowState.GONE: {},
}


def advance(state: RowState, event: RowEvent) -> RowState:
    """The state after `event`. Asserts that the table has an entry."""
    after = TABLE[state].get(event)
    assert after is not None, f"no entry for {event} in state {state}"
    return after
