"""Which cores of the host the workers may compute on.

Owns the rules: what the process may use, one logical processor per core, no more than the quota of
its control group; or exactly what the user listed. Nothing is pinned here.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from diptych.engine.core.errors import ConfigError

CORES_MAX: Final = 256  # of one host; kCoresMax of csrc/cpu/pool.h
_CPU: Final = Path("/sys/devices/system/cpu")
_GROUPS: Final = Path("/sys/fs/cgroup")


def parse_list(text: str) -> list[int]:
    """ "0-3,8": numbers, sorted, each once. Raises ConfigError."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--cpu-cores: not a count or a list of cores: {text!r} (say 0-3,8)")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(numbers)


def one_per_core(allowed: Sequence[int], siblings: dict[int, list[int]]) -> list[int]:
    """The first allowed processor of each core; `siblings`: processor -> those of its core."""
    first: dict[int, int] = {}
    for cpu in allowed:
        first.setdefault(min(siblings.get(cpu, [cpu])), cpu)
    return sorted(first.values())


def quota_cores(cpu_max: str) -> int | None:
    """How many cores a control group's `cpu.max` ("200000 100000") gives; None: no limit."""
    words = cpu_max.split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or words[1] == "0":
        return None
    return max(1, -(-int(words[0]) // int(words[1])))


def choose_cores(
    asked: str | None, allowed: Sequence[int], siblings: dict[int, list[int]], quota: int | None
) -> list[int]:
    """`asked`: None for all, a count, or a list such as "0-3,8" ("2-2": core 2 alone).

    Raises ConfigError for more than there is.
    """
    cores = one_per_core(allowed, siblings)
    if asked is None:
        return cores[: quota or CORES_MAX][:CORES_MAX]
    if not re.fullmatch(r"\s*\d+\s*", asked):
        wanted = parse_list(asked)
        missing = sorted(set(wanted) - set(allowed))
        if missing:
            raise ConfigError(f"--cpu-cores {asked}: this process may not use core {missing[0]}")
        if len(wanted) > CORES_MAX:
            raise ConfigError(f"--cpu-cores: at most {CORES_MAX} cores, got {len(wanted)}")
        return wanted
    count = int(asked)
    if not 1 <= count <= min(len(allowed), CORES_MAX):
        raise ConfigError(
            f"--cpu-cores {count}: this process may use 1 to {min(len(allowed), CORES_MAX)}"
        )
    others = [cpu for cpu in allowed if cpu not in cores]  # second threads of the same cores
    return sorted([*cores, *others][:count])


def host_cores(asked: str | None) -> list[int]:
    """`choose_cores` of this machine."""
    allowed = sorted(os.sched_getaffinity(0))
    siblings: dict[int, list[int]] = {}
    for cpu in allowed:
        with suppress(OSError, ConfigError):
            text = (_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text()
            siblings[cpu] = parse_list(text.strip())
    return choose_cores(asked, allowed, siblings, _own_quota())


def _own_quota() -> int | None:
    """The tightest limit on the path from this process's control group to the root."""
    found: list[int] = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                group = _GROUPS / line[4:]
                for folder in [group, *group.parents]:
                    with suppress(OSError):
                        quota = quota_cores((folder / "cpu.max").read_text())
                        found += [] if quota is None else [quota]
                    if folder == _GROUPS:
                        break
    return min(found, default=None)
