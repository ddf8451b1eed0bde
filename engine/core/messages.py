"""Every message between processes: frozen, tagged, msgpack; no pickle on any wire.

Owns the wire format. Invariants: a message of an older scheduler epoch, worker epoch or attempt
changes nothing at its receiver; a sequence is named by (request, choice, attempt). Who sends what
to whom is in the section headings of its parts, which nobody but this file imports from;
docs/PROTOCOL.md prints the table generated from them.
"""

from typing import Final

from diptych.engine.core.client_messages import (
    Abort,
    Accepted,
    ChoiceState,
    Closed,
    ColdStart,
    Failed,
    Lost,
    PairStats,
    Placed,
    PoolStats,
    Rejected,
    Stats,
    Submit,
    TokenBatch,
    Tokens,
    WorkerStats,
)
from diptych.engine.core.envelope import (
    Address,
    Message,
    Send,
)
from diptych.engine.core.fleet_messages import (
    ApiDown,
    ApiUp,
    AskPage,
    Cut,
    Drain,
    Grow,
    PageRows,
    Peers,
    PoolDown,
    PoolUp,
    Ready,
    Retire,
    SchedulerDown,
    SchedulerUp,
    StartTimes,
    Stuck,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.worker_messages import (
    AskPublish,
    Assign,
    CommittedBlock,
    Grant,
    Grants,
    Handoff,
    Join,
    Joined,
    Landed,
    Progress,
    Publish,
    PullOver,
    Refused,
    Revoke,
    Seal,
    SetDial,
)

__all__ = [
    "PROTOCOL_VERSION",
    "Abort",
    "Accepted",
    "Address",
    "AnyMessage",
    "ApiDown",
    "ApiUp",
    "AskPage",
    "AskPublish",
    "Assign",
    "ChoiceState",
    "Closed",
    "ColdStart",
    "CommittedBlock",
    "Cut",
    "Drain",
    "Failed",
    "Grant",
    "Grants",
    "Grow",
    "Handoff",
    "Join",
    "Joined",
    "Landed",
    "Lost",
    "Message",
    "PageRows",
    "PairStats",
    "Peers",
    "Placed",
    "PoolDown",
    "PoolStats",
    "PoolUp",
    "Progress",
    "Publish",
    "PullOver",
    "Ready",
    "Refused",
    "Rejected",
    "Retire",
    "Revoke",
    "SchedulerDown",
    "SchedulerUp",
    "Seal",
    "Send",
    "SetDial",
    "StartTimes",
    "Stats",
    "Stuck",
    "Submit",
    "TokenBatch",
    "Tokens",
    "WorkerDown",
    "WorkerStats",
    "WorkerUp",
]

PROTOCOL_VERSION: Final = 1

AnyMessage = (
    Submit
    | Abort
    | Closed
    | Accepted
    | Rejected
    | Placed
    | Lost
    | Failed
    | Stats
    | Join
    | Assign
    | Grants
    | Revoke
    | SetDial
    | Seal
    | Publish
    | AskPublish
    | PullOver
    | Joined
    | Progress
    | AskPage
    | PageRows
    | Grow
    | Retire
    | TokenBatch
    | WorkerUp
    | WorkerDown
    | PoolUp
    | PoolDown
    | ApiUp
    | ApiDown
    | SchedulerUp
    | SchedulerDown
    | Drain
    | Peers
    | Ready
    | Stuck
    | Cut
)
