"""The commands of one step, in the order in which they were decided.

Owns nothing but that list, and the scheduler's epoch, which every message carries. Invariant: a
message goes to the incarnation for which it was meant; for a dead one it is dropped here.
"""

from diptych.engine.core.messages import Accepted, Address, Message, Rejected, Revoke, Send
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

    def add(self, command: SchedulerCommand) -> None:
        self._commands.append(command)

    def take(self) -> list[SchedulerCommand]:
        commands, self._commands = self._commands, []
        return commands

    def to_worker(self, worker: Worker, message: Message) -> None:
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
