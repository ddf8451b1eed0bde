"""From the start of `diptych serve` to its first token, by stages, files cached.

A checkpoint of random weights is served from its safetensors and, packed, from a packed file, in
turn. Stages are seconds since the process was started: weights loaded, engine up (all from the
server's own log), ready (/health answers 200), first token (a request sent at once when ready).
Also: what a second worker costs in memory, read from the kernel's own accounts.
"""

import argparse
import re
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Final

from bench.models import SIZES, write_model
from bench.procs import engine_processes
from bench.record import spread, write
from bench.serving import Serving
from diptych.server import cli

_STAGES: Final = {
    "loaded_s": re.compile(r"^(\S+) .* model loaded:"),
    "engine_up_s": re.compile(r"^(\S+) .* engine up:"),
    "served_s": re.compile(r"^(\S+) .* is served at "),
}


def make_checkpoint(folder: Path, size: str) -> None:
    """Random weights as one safetensors file."""
    from safetensors.torch import save_file

    from diptych.engine.core.model_config import load_model_config
    from diptych.engine.loader import DummyWeights

    write_model(folder, size)
    config = load_model_config(str(folder))
    weights = DummyWeights(config, 0)
    tensors = {name: weights.get(name) for name in config.weight_shapes()}
    save_file(tensors, str(folder / "model.safetensors"))


def read_all(folder: Path) -> None:
    """Its files are cached from now on."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def stages(log: Path, started_at: float) -> dict[str, float]:
    found: dict[str, float] = {}
    day = datetime.fromtimestamp(started_at).date()
    for line in log.read_text().splitlines():
        for name, pattern in _STAGES.items():
            match = pattern.search(line)
            if match is not None and name not in found:
                at = datetime.combine(day, datetime.strptime(match[1], "%H:%M:%S.%f").time())
                found[name] = at.timestamp() - started_at
    return found


def memory_kb(pid: int) -> dict[str, int]:
    """Of one process: proportional, private and shared resident memory."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()

    def total(*names: str) -> int:
        return sum(int(re.findall(rf"^{name}: +(\d+)", rollup, re.MULTILINE)[0]) for name in names)

    return {
        "pss_kb": total("Pss"),
        "private_kb": total("Private_Clean", "Private_Dirty"),
        "shared_kb": total("Shared_Clean", "Shared_Dirty"),
        "huge_kb": total("AnonHugePages", "FilePmdMapped"),
    }


def start_once(
    folder: Path, log: Path, flags: list[str]
) -> tuple[dict[str, float], dict[str, object]]:
    log.unlink(missing_ok=True)
    started_at, start = time.time(), time.perf_counter()
    with Serving(folder, "--served-model-name", "m", *flags, log=log) as server:
        ready = time.perf_counter() - start
        body = {"model": "m", "prompt": [5, 6, 7, 8], "max_tokens": 1, "temperature": 0}
        status, _ = server.post("/v1/completions", body)
        first = time.perf_counter() - start
        assert status == 200
        body |= {"prompt": list(range(3, 200)), "max_tokens": 8}
        assert server.post("/v1/completions", body)[0] == 200  # both workers have read all weights
        processes = engine_processes(server.process.pid)
        memory = {
            name: memory_kb(pid) for name, pid in processes.items() if "scheduler" not in name
        }
    return {**stages(log, started_at), "ready_s": ready, "first_token_s": first}, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="bench-1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, kept and reused")
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = args.folder or Path(temporary)
        plain, packed = base / args.size, base / f"{args.size}-packed"
        if not plain.is_dir():
            make_checkpoint(plain, args.size)
        if not packed.is_dir():
            assert cli.main(["pack", str(plain), str(packed)]) == 0
        rows: dict[str, list[dict[str, float]]] = {"safetensors": [], "packed": []}
        memory: dict[str, object] = {}
        for _ in range(args.rounds):
            for name, folder in (("safetensors", plain), ("packed", packed)):
                read_all(folder)
                row, memory[name] = start_once(folder, Path(temporary) / "log", flags)
                rows[name].append(row)
        result: dict[str, object] = {"size": args.size, "rounds": args.rounds, "flags": flags}
        for name, found in rows.items():
            stages_s = {stage: spread([row[stage] for row in found]) for stage in found[0]}
            result[name] = {**stages_s, "memory": memory[name]}
        write(args.out, result)


if __name__ == "__main__":
    main()
