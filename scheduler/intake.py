"""What API servers ask: submit, abort, close; and what becomes of a row once it is off its workers.

Owns admission. Invariants: every Submit is answered (accepted, or rejected with its reason); what
was accepted once is never rejected; after Closed nothing of a request is left once its workers let
go.
"""

from diptych.engine.core.config import CacheOptions
from diptych.engine.core.messages import (
    Abort,
    Address,
    ChoiceState,
    Closed,
    Failed,
    Lost,
    Submit,
)
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import ApiId, LossCause, RequestId, blocks_for
from diptych.scheduler.lifecycle import RowEvent, RowState
from diptych.scheduler.members import Members
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.rows import Entry, Row, RowTable
from diptych.scheduler.runs import Runs


class Intake:
    def __init__(
        self,
        cache: CacheOptions,
        members: Members,
        rows: RowTable,
        room: WaitingRoom,
        runs: Runs,
        outbox: Outbox,
    ) -> None:
        self.rejections = 0
        self.losses = 0
        self._cache = cache
        self._members = members
        self._rows = rows
        self._room = room
        self._runs = runs
        self._outbox = outbox
        self._owned: dict[ApiId, dict[RequestId, Entry]] = {}

    # ---- messages ------------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Of a living API server (the caller checked)."""
        api, request = self._members.apis[message.api], message.request
        entry = self._rows.entries.get(request.id)
        if entry is None:
            if not self._admits(message, api):
                return
            entry = self._rows.open(request, message.api, message.api_epoch)
            self._owned.setdefault(message.api, {})[request.id] = entry
        elif entry.closing or (entry.api, entry.api_epoch) != (message.api, message.api_epoch):
            self._reject(api, request.id, f"request id {request.id} is in use", None)
            return
        for wanted in message.choices:
            row = entry.rows.get(wanted.choice)
            if row is None:
                row = self._rows.add(entry, wanted)
                row.backlog = message.recovering
                self._room.enter(row)
            elif wanted.attempt > row.wanted.attempt:
                self._resubmit(row, wanted)
        self._outbox.accept(api, request.id)

    def abort(self, message: Abort) -> None:
        entry = self._rows.entries.get(message.request)
        row = entry.rows.get(message.choice) if entry is not None else None
        if row is None or row.entry.api != message.api or row.entry.closing:
            return
        self._end(row, RowEvent.ABORT)

    def closed(self, message: Closed) -> None:
        entry = self._rows.entries.get(message.request)
        if entry is not None and entry.api == message.api:
            self._close(entry)

    def api_down(self, api: ApiId) -> None:
        for entry in list(self._owned.get(api, {}).values()):
            self._close(entry)

    # ---- off the workers -----------------------------------------------------------------------

    def drained(self, row: Row) -> None:
        """The row's blocks were released: it moves on to what it was taken back for."""
        if row.poison and row.state in (RowState.LOSING, RowState.RESTARTING):
            self._fail(row)
            for other in row.entry.rows.values():  # each would take a worker with it
                if other.state is RowState.QUEUED:
                    self._room.leave(other)
                    self._fail(other)
            return
        state = self._rows.move(row, RowEvent.DRAIN)
        if state is RowState.LOST:
            self._tell_lost(row)
        elif state is RowState.QUEUED:
            self._room.enter(row)
        elif state is RowState.GONE:
            self._remove(row)

    def _fail(self, row: Row) -> None:
        """The request fails as a whole as soon as its API server hears of one choice."""
        self._rows.move(row, RowEvent.FAIL)
        ref = SeqRef(row.key[0], row.key[1], row.wanted.attempt)
        reason = f"request {row.key[0]} crashed a worker while it ran alone on it"
        self._outbox.to_owner(row.entry, Failed(self._outbox.epoch, ref, reason))

    def doubt(self, row: Row) -> None:
        """The worker on which it ended was fenced; its last tokens may never have left."""
        row.finished_on, row.cause = None, LossCause.WORKER
        if self._rows.move(row, RowEvent.DOWN) is RowState.LOST:
            self._tell_lost(row)

    def _tell_lost(self, row: Row) -> None:
        assert row.ref is not None
        self.losses += row.cause not in (LossCause.PREEMPTED, LossCause.MOVED)
        self._outbox.to_owner(row.entry, Lost(self._outbox.epoch, row.ref, row.cause))

    # ---- rows ----------------------------------------------------------------------------------

    def _admits(self, message: Submit, api: Address) -> bool:
        """False: it was rejected."""
        request, room = message.request, self._room
        if not message.choices:
            self._reject(api, request.id, "the request names no choice", None)
            return False
        if message.recovering:
            return True
        if request.params.max_tokens is None or request.num_prompt < 1:
            self._reject(api, request.id, "the request has no prompt or no max_tokens", None)
            return False
        tokens = sum(request.num_prompt + len(c.emitted) // 4 for c in message.choices)
        never = self._never_fits(request, len(message.choices), tokens)
        if never is not None:
            self._reject(api, request.id, never, None)
            return False
        if room.num_backlog or not room.has_room(len(message.choices), tokens):
            recovery = "requests from before a restart are placed first"
            reason = recovery if room.num_backlog else "too many requests wait"
            self._reject(api, request.id, reason, room.retry_after_s())
            return False
        return True

    def _never_fits(self, request: Request, num_choices: int, num_tokens: int) -> str | None:
        """Why the request could not be served even if it were the only one."""
        if not self._room.could_hold(num_choices, num_tokens):
            return (
                f"{num_choices} choices with {num_tokens} prompt tokens together are more than"
                " may wait at once: ask for fewer choices"
            )
        most, size = self._members.largest_pool(), self._cache.block_size
        need = blocks_for(request.num_prompt + (request.params.max_tokens or 1) - 1, size)
        if most is None or need <= most:
            return None
        return (
            f"the prompt of {request.num_prompt} tokens and max_tokens"
            f" {request.params.max_tokens} need {need} KV blocks of {size} tokens; a pool has"
            f" {most}: shorten the prompt or lower max_tokens"
        )

    def _reject(
        self, api: Address, request: RequestId, reason: str, retry_after_s: float | None
    ) -> None:
        self.rejections += 1
        self._outbox.reject(api, request, reason, retry_after_s)

    def _resubmit(self, row: Row, wanted: ChoiceState) -> None:
        """A newer attempt replaces what waits, or takes back what runs."""
        before, backlog = row.state, row.backlog
        if before is RowState.QUEUED:
            self._room.leave(row)
        self._forget_finish(row)
        row.wanted = wanted
        after = self._rows.move(row, RowEvent.SUBMIT)
        if before is RowState.RUNNING:
            self._runs.take_back(row)
        if after is RowState.QUEUED:
            row.backlog = backlog
            self._room.enter(row)

    def _close(self, entry: Entry) -> None:
        if entry.closing:
            return
        entry.closing = True
        for row in list(entry.rows.values()):
            self._end(row, RowEvent.CLOSE)

    def _end(self, row: Row, event: RowEvent) -> None:
        """The API server needs no more of it."""
        before = row.state
        if before is RowState.QUEUED:
            self._room.leave(row)
        self._forget_finish(row)
        after = self._rows.move(row, event)
        if before is RowState.RUNNING:
            self._runs.take_back(row)
        elif after is RowState.GONE:
            self._remove(row)

    def _remove(self, row: Row) -> None:
        entry = row.entry
        self._rows.remove(row)
        if not entry.rows:
            owned = self._owned[entry.api]
            del owned[entry.request.id]
            if not owned:
                del self._owned[entry.api]

    def _forget_finish(self, row: Row) -> None:
        """Nobody asks any more whether its last tokens arrived."""
        if row.finished_on is not None:
            worker = self._members.workers.get(row.finished_on)
            if worker is not None:
                worker.finished.pop(row.key, None)
            row.finished_on = None
