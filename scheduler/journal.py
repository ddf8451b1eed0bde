"""The API server's log of requests: the only truth about what each client has seen. Pure.

Owns every open request of one API server. Invariants: each token index of a choice is delivered
once and in order; an accepted request ends exactly once, by its answers, by `close` or by its
deadline; whatever is lost behind the API server is submitted again from the log.
"""

from collections import OrderedDict

from diptych.engine.core.errors import (
    DiptychError,
    InvalidRequestError,
    OverloadedError,
    PoisonRequestError,
    RequestTimeoutError,
)
from diptych.engine.core.messages import (
    Abort,
    Accepted,
    Address,
    Closed,
    Failed,
    Lost,
    Message,
    Placed,
    Rejected,
    SchedulerDown,
    SchedulerUp,
    Send,
    Stats,
    Submit,
    TokenBatch,
    Tokens,
)
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import ApiId, Epoch, LossCause, RequestId
from diptych.scheduler.commands import Delivered, Ended, JournalCommand, JournalInput, Refused
from diptych.scheduler.log_row import ChoiceRow, LogRow, row_of

RETRY_FULL_S = 1.0
"""What a client is told to wait when this API server holds as many requests as it may."""


class Journal:
    """Requests from `open` to their end; docs/ARCHITECTURE.md has the contract."""

    def __init__(
        self,
        api: ApiId,
        api_epoch: Epoch,
        *,
        block_size: int,
        max_open: int = 4096,
        window: int = 64,
    ) -> None:
        self._api = api
        self._api_epoch = api_epoch
        self._block_size = block_size
        self._max_open = max_open
        self._window = window
        self._epoch: Epoch | None = None  # of the last scheduler known
        self._up = False
        self._rows: dict[RequestId, LogRow] = {}  # oldest first
        self._backlog: OrderedDict[RequestId, None] = OrderedDict()  # to submit, oldest first
        self._unanswered: set[RequestId] = set()  # of the backlog: submitted, not yet accepted
        self._next_tick = float("inf")  # the earliest deadline or retry
        self._stats: Stats | None = None
        self._commands: list[JournalCommand] = []

    @property
    def stats(self) -> Stats | None:
        """The scheduler's last sums, None while no scheduler is known."""
        return self._stats

    @property
    def num_open(self) -> int:
        return len(self._rows)

    # ---- the client's side ---------------------------------------------------------------------

    def open(self, request: Request, now: float, timeout_s: float | None = None) -> None:
        """Log a request and submit it, or queue it behind a backlog. Raises OverloadedError."""
        assert request.id not in self._rows, "request ids are unique"
        if len(self._rows) >= self._max_open:
            raise OverloadedError(
                f"This server holds {self._max_open} requests already; try again later.",
                retry_after_s=RETRY_FULL_S,
            )
        deadline = None if timeout_s is None else now + timeout_s
        row = self._rows[request.id] = row_of(request, now, deadline, self._block_size)
        if deadline is not None:
            self._next_tick = min(self._next_tick, deadline)
        if self._up and not self._backlog:
            self._submit(row)
        else:
            self._backlog[request.id] = None

    def stop(self, request: RequestId, choice: int) -> None:
        """The client has all it needs of this choice. Idempotent."""
        row = self._rows.get(request)
        if row is None or row.choices[choice].done:
            return
        if self._known(row):
            assert self._epoch is not None
            self._send(Abort(self._api, self._epoch, request, choice))
        row.choices[choice].done = True
        self._end_choice(row)

    def close(self, request: RequestId) -> None:
        """The client is gone. Idempotent; nothing more is said about this request."""
        row = self._rows.get(request)
        if row is not None:
            self._forget(row)

    def tick(self, now: float) -> None:
        """End what is past its deadline; try again what was turned away after acceptance."""
        if now < self._next_tick:
            return
        for row in list(self._rows.values()):
            if row.deadline is not None and row.deadline <= now:
                self._refuse(row, RequestTimeoutError("The request's deadline passed."))
            elif row.retry_at is not None and row.retry_at <= now:
                row.retry_at = None
                if self._known(row):
                    self._submit(row)
        times = [t for row in self._rows.values() for t in (row.deadline, row.retry_at)]
        self._next_tick = min((t for t in times if t is not None), default=float("inf"))

    # ---- the engine's side ---------------------------------------------------------------------

    def handle(self, message: JournalInput, now: float) -> None:
        """Take in a message; one of an older scheduler or attempt changes nothing."""
        if isinstance(message, SchedulerUp):
            self._scheduler_up(message.scheduler_epoch)
        elif message.scheduler_epoch != self._epoch:
            return
        elif isinstance(message, TokenBatch):
            for item in message.items:
                self._tokens(item)
        elif isinstance(message, SchedulerDown):
            self._up = False
            self._stats = None
        elif isinstance(message, Stats):
            self._stats = message
        elif isinstance(message, Lost):
            self._again(message)
        elif isinstance(message, Failed):
            self._failed(message)
        elif isinstance(message, Placed):
            self._placed(message, now)
        else:
            self._answered(message, now)
        self._pump()

    def _scheduler_up(self, epoch: Epoch) -> None:
        """A new scheduler knows nothing: submit everything unfinished again, oldest first."""
        if self._epoch is not None and epoch <= self._epoch:
            return
        self._epoch = epoch
        self._up = True
        self._unanswered.clear()
        self._backlog = OrderedDict.fromkeys(self._rows)
        for row in self._rows.values():
            row.retry_at = None

    def _tokens(self, item: Tokens) -> None:
        row, choice = self._current(item.ref)
        if row is None or choice is None:
            return
        row.accepted = True
        if item.first_index > len(choice.emitted):
            self._submit(row, choice)
            return
        new = choice.accept(item)
        if new is None:
            return
        self._commands.append(Delivered(row.request.id, new, row.queued_s, row.preemptions))
        if choice.done:
            self._end_choice(row)

    def _placed(self, message: Placed, now: float) -> None:
        row, _ = self._current(message.ref)
        if row is not None and row.queued_s is None:
            row.queued_s = now - row.opened_at

    def _again(self, lost: Lost) -> None:
        """The attempt was taken away: the next one starts from the log."""
        row, choice = self._current(lost.ref)
        if row is not None:
            row.accepted = True
            row.preemptions += lost.cause is LossCause.PREEMPTED
            self._submit(row, choice)

    def _failed(self, failed: Failed) -> None:
        row, _ = self._current(failed.ref)
        if row is not None:
            self._refuse(row, PoisonRequestError(failed.reason))

    def _answered(self, message: Accepted | Rejected, now: float) -> None:
        row = self._rows.get(message.request)
        if row is None or not self._known(row):
            return
        self._unanswered.discard(message.request)
        if isinstance(message, Accepted):
            row.accepted = True
            row.retry_at = None
        elif row.accepted:
            row.retry_at = now + (message.retry_after_s or RETRY_FULL_S)
            self._next_tick = min(self._next_tick, row.retry_at)
        elif message.retry_after_s is None:
            self._refuse(row, InvalidRequestError(message.reason))
        else:
            self._refuse(row, OverloadedError(message.reason, retry_after_s=message.retry_after_s))

    # ---- rows ----------------------------------------------------------------------------------

    def _current(self, ref: SeqRef) -> tuple[LogRow, ChoiceRow] | tuple[None, None]:
        """The row and choice if `ref` is the attempt that counts."""
        row = self._rows.get(ref.request)
        if row is None or not self._known(row):
            return None, None
        choice = row.choices[ref.choice]
        if choice.done or choice.attempt != ref.attempt:
            return None, None
        return row, choice

    def _known(self, row: LogRow) -> bool:
        """Whether the present scheduler was told of this row."""
        return row.epoch is not None and row.epoch == self._epoch

    def _pump(self) -> None:
        """Submit the backlog, a window of unanswered requests at a time."""
        while self._up and self._backlog and len(self._unanswered) < self._window:
            request, _ = self._backlog.popitem(last=False)
            self._unanswered.add(request)
            self._submit(self._rows[request])

    def _submit(self, row: LogRow, only: ChoiceRow | None = None) -> None:
        """Ask for the next attempt of one choice, or of all that are open."""
        if not self._up:
            return  # the next scheduler is asked for everything
        assert self._epoch is not None
        choices = [only] if only is not None else [c for c in row.choices if not c.done]
        for choice in choices:
            choice.attempt += 1
        row.epoch = self._epoch
        states = [choice.state(row.request, self._block_size) for choice in choices]
        self._send(
            Submit(self._api, self._api_epoch, self._epoch, row.request, states, row.accepted)
        )

    def _end_choice(self, row: LogRow) -> None:
        row.num_open -= 1
        if row.num_open == 0:
            self._forget(row)
            self._commands.append(Ended(row.request.id))

    def _refuse(self, row: LogRow, error: DiptychError) -> None:
        self._forget(row)
        self._commands.append(Refused(row.request.id, error))

    def _forget(self, row: LogRow) -> None:
        """The row is over; the scheduler, if it was told of it, hears so."""
        request = row.request.id
        del self._rows[request]
        self._backlog.pop(request, None)
        self._unanswered.discard(request)
        if self._known(row):
            assert self._epoch is not None
            self._send(Closed(self._api, self._epoch, request))
        self._pump()

    def _send(self, message: Message) -> None:
        if self._up:
            assert self._epoch is not None
            self._commands.append(Send(Address("scheduler", 0, self._epoch), message))

    # ---- output --------------------------------------------------------------------------------

    def take(self) -> list[JournalCommand]:
        """What the shell has to do now, in this order."""
        commands, self._commands = self._commands, []
        return commands

    def check_integrity(self) -> None:
        """Assert that rows, backlog and window agree. For tests and idle servers."""
        assert len(self._rows) <= self._max_open
        assert self._backlog.keys() <= self._rows.keys()
        assert self._unanswered <= self._rows.keys()
        assert not self._unanswered & self._backlog.keys()
        assert len(self._unanswered) <= self._window
        assert not self._up or not self._backlog or len(self._unanswered) == self._window
        for request, row in self._rows.items():
            assert row.request.id == request
            assert row.num_open == sum(not choice.done for choice in row.choices)
            assert row.num_open > 0, "a request ends with its last choice"
            assert not self._up or (request in self._backlog) != self._known(row)
            for time in (row.deadline, row.retry_at):
                assert time is None or time >= self._next_tick
