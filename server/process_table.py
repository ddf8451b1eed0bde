"""Who runs, as a file in the run directory: for people, tests and tools that ask from outside.

Owns `processes.json`. Invariant: it is replaced in one piece, and only when something changed.
"""

import time
from pathlib import Path
from typing import Final

import msgspec

from diptych.engine.core.messages import Address
from diptych.server.fleet_members import State
from diptych.transfer.processes import process_name

FILE_NAME: Final = "processes.json"


class ProcessRow(msgspec.Struct, frozen=True):
    """`changed_ns`: when the supervisor saw it enter this state, on the host's monotonic clock."""

    name: str
    epoch: int
    state: str
    pid: int | None
    changed_ns: int


class ProcessTable:
    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._pids: dict[Address, int] = {}
        self._rows: dict[str, ProcessRow] = {}

    def started(self, address: Address, pid: int) -> None:
        self._pids[address] = pid

    def exited(self, address: Address) -> None:
        self._pids.pop(address, None)

    def update(self, states: list[tuple[Address, State]], others: dict[str, int]) -> None:
        now_ns = time.monotonic_ns()
        rows = [
            ProcessRow(process_name(a), a.epoch, state.value, self._pids.get(a), now_ns)
            for a, state in states
        ]
        rows += [ProcessRow(name, 0, "up", pid, now_ns) for name, pid in others.items()]
        fresh = {row.name: row for row in rows}
        kept = {name: self._kept(row) for name, row in fresh.items()}
        if kept != self._rows:
            self._rows = kept
            partial = self._path.with_suffix(".partial")
            partial.write_bytes(msgspec.json.encode(list(kept.values())))
            partial.replace(self._path)

    def _kept(self, row: ProcessRow) -> ProcessRow:
        """The earlier row when only the clock differs."""
        earlier = self._rows.get(row.name)
        if earlier is None:
            return row
        same = msgspec.structs.replace(row, changed_ns=earlier.changed_ns)
        return earlier if same == earlier else row


def read_processes(run_dir: Path) -> dict[str, ProcessRow]:
    """Name -> row; empty while the file does not exist yet or no longer."""
    try:
        data = (run_dir / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return {}
    return {row.name: row for row in msgspec.json.decode(data, type=list[ProcessRow])}
