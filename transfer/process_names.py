"""What the processes are called: in file names, logs and `ps`."""

from pathlib import Path

from diptych.engine.core.messages import Address


def process_name(address: Address) -> str:
    """Of a process over all its incarnations: "worker0", "scheduler0", "api0"."""
    return f"{address.kind}{address.number}"


def name_process(name: str) -> None:
    """What `ps` and `top` show of this process in their command column, at most 15 bytes:
    "dt-worker0". For the main thread."""
    Path("/proc/self/comm").write_text(f"dt-{name}"[:15])
