"""The commands of one step, in the order in which they were decided.

Owns nothing but that list, the grants that still gather in one message per worker, and the
scheduler's epoch, which every message carries. Invariants: a message goes to the incarnation for
which it was meant; for a dead one it is dropped here. No message to a worker overtakes a grant.
"""

from diptych.engine.core.messages import (
    Accepted,
    Address,
    Grant,
    Grants,
    Message,
    Rejected,
    Revoke,
    Send,
)
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import Epoch, RequestId
from diptych.scheduler.commands import SchedulerCommand
from diptych.scheduler.members import Members, Worker
from diptych.scheduler.rows import Entry


class Outbox:
    def __init__(self, epoch: Epoch, members: Members) -> None:
        self.epoch = epoch
        self._members = members
        self._commands: list[SchedulerCommand] = []
        self._granted: list[Worker] = []  # their grants are not sent yet

    def add(self, command: SchedulerCommand) -> None:
        self._commands.append(command)

    def take(self) -> list[SchedulerCommand]:
        self._send_grants()
        commands, self._commands = self._commands, []
        return commands

    def grant(self, worker: Worker, grant: Grant) -> None:
        """All grants of a step are one message per worker, unless something else goes between."""
        if not worker.grants:
            self._granted.append(worker)
        worker.grants.append(grant)

    def _send_grants(self) -> None:
        for worker in self._granted:
            grants, worker.grants = worker.grants, []
            self._commands.append(Send(worker.address, Grants(self.epoch, worker.epoch, grants)))
        self._granted.clear()

    def to_worker(self, worker: Worker, message: Message) -> None:
        if self._granted:
            self._send_grants()
        self._commands.append(Send(worker.address, message))

    def to_owner(self, entry: Entry, message: Message) -> None:
        """To the API server that owns the request, if it still lives."""
        address = self._members.apis.get(entry.api)
        if address is not None and address.epoch == entry.api_epoch:
            self._commands.append(Send(address, message))

    def revoke(self, worker: Worker, ref: SeqRef) -> None:
        self.to_worker(worker, Revoke(self.epoch, worker.epoch, ref))

    def accept(self, api: Address, request: RequestId) -> None:
        self._commands.append(Send(api, Accepted(self.epoch, request)))

    def reject(
        self, api: Address, request: RequestId, reason: str, retry_after_s: float | None
    ) -> None:
        self._commands.append(Send(api, Rejected(self.epoch, request, reason, retry_after_s)))
