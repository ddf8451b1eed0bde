"""One process of a server over its incarnations, and what its supervisor may be told to do. Pure.

Owns the words of `Fleet` (fleet.py): states, members, commands, and how patient it is. Invariant: a
member is in one state, and only `Fleet` changes it.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from diptych.engine.core.messages import Address, Send, StartTimes

START_S_MAX: Final = 120.0
"""A process that was started and does not answer for so long is killed."""
STILL_S_MAX: Final = 10.0
"""So long a worker or scheduler may show no progress while it starts, fork included."""
FAST_FAULT_S: Final = 10.0
"""A process that lived for less ended fast."""
FAST_FAULTS_FREE: Final = 3
"""So many fast faults in a row are answered by an immediate restart."""
BACKOFF_S: Final = 0.25
BACKOFF_S_MAX: Final = 10.0
CUT_S: Final = 1.0
"""So long after a connection between two processes broke, one of them is known to be dead, or one
is killed, since what was lost on the way will never come."""
HOME: Final = 0
"""The supervisor's own host."""
LEAVE_S_MAX: Final = 5.0
"""A retired worker that has not exited after so long is killed."""


class State(StrEnum):
    DOWN = "down"  # starts at `start_at`
    STARTING = "starting"  # started, has not announced itself
    UP = "up"
    LEAVING = "leaving"  # retired, its own exit is awaited
    FENCING = "fencing"  # killed, its exit is awaited


class Start(msgspec.Struct, frozen=True):
    """Start this incarnation; answered by `ready` and `exited`."""

    address: Address


class Kill(msgspec.Struct, frozen=True):
    """Kill its process group; answered by `exited`."""

    address: Address
    reason: str


class GiveUp(msgspec.Struct, frozen=True):
    """It never came up and will not: the server cannot start."""

    reason: str


class Rest(msgspec.Struct, frozen=True):
    """No worker is wanted: give back what only the next start needs (the loaded weights)."""


class Wake(msgspec.Struct, frozen=True):
    """A worker is wanted again: make ready to start one; answered by `model_ready`."""


class Places(msgspec.Struct, frozen=True):
    """So many hosts of one worker each are wanted, those included that are about to go."""

    count: int


class Dismiss(msgspec.Struct, frozen=True):
    """Nothing of this host is wanted any more: it may go."""

    host: int


FleetCommand = Start | Kill | Send | GiveUp | Rest | Wake | Places | Dismiss


@dataclass(slots=True)
class Member:
    """One process over all its incarnations; `address` is the current one, or the next."""

    address: Address
    host: int = HOME
    external: bool = False  # not ours to start: the caller of start_engine
    wanted: bool = True  # False: a place for one more worker
    state: State = State.DOWN
    since_s: float = 0.0
    start_at_s: float = 0.0
    fast_faults: int = 0  # in a row
    ever_up: bool = False
    announced: bool = False  # this incarnation was up
    hung: bool = False  # killed because it stood still
    beat: int | None = None  # last reading of its progress counter
    beat_at_s: float = 0.0
    ordered_s: float = 0.0  # when this incarnation was ordered
    forked_s: float = 0.0  # when it began to run
    start: StartTimes | None = None


def backoff_s(fast_faults: int) -> float:
    if fast_faults <= FAST_FAULTS_FREE:
        return 0.0
    return min(BACKOFF_S_MAX, BACKOFF_S * 2.0 ** min(fast_faults - FAST_FAULTS_FREE, 10))
