"""The processes of a running engine, as the kernel sees them; for the commands that kill them.

Owns nothing. A process of ours shows its name in `comm`: "dt-worker0", "dt-scheduler0", ...
"""

from contextlib import suppress
from pathlib import Path

PREFIX = "dt-"


def _parents() -> dict[int, tuple[int, str]]:
    """pid -> (parent pid, comm)."""
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        comm, rest = stat[stat.index("(") + 1 :].rsplit(")", 1)
        state, parent = rest.split()[:2]
        if state not in "ZX":
            found[int(entry.name)] = int(parent), comm
    return found


def descendants(root: int) -> dict[int, str]:
    """pid -> comm of every living process below `root`, without it."""
    table = _parents()
    below: dict[int, str] = {}
    for pid, (_, comm) in table.items():
        above = pid
        while above in table and above != root:
            above = table[above][0]
        if above == root and pid != root:
            below[pid] = comm
    return below


def engine_processes(supervisor: int) -> dict[str, int]:
    """Name ("worker0", "scheduler0") -> pid; of several processes of one name, one."""
    return {name: pid for pid, name in engine_pids(supervisor).items()}


def engine_pids(supervisor: int) -> dict[int, str]:
    """pid -> name of every process of ours below a supervisor, NIXL's included."""
    return {
        pid: comm.removeprefix(PREFIX)
        for pid, comm in descendants(supervisor).items()
        if comm.startswith(PREFIX)
    }


def processes_with(variable: str, value: str) -> dict[int, str]:
    """pid -> comm of every living process in whose environment the variable has this value; some
    outlive their parents."""
    wanted = f"{variable}={value}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it ended just now
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


def shared_segments() -> set[str]:
    """Names in /dev/shm: an engine must leave none behind."""
    return {entry.name for entry in Path("/dev/shm").iterdir()}
