"""Packed weights, served: by `diptych pack`, and by the cache that a server keeps."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.models import write_tokenizer
from bench.oracle import make_checkpoint
from bench.serving import Serving
from diptych.server import cli
from diptych.server.spawn import python_environment
from tests.support.processes import wait_for

BODY = {"model": "m", "prompt": [9, 8, 7, 6, 5], "max_tokens": 12, "temperature": 0}


def answer(folder: Path, log: Path, *flags: str) -> list[int]:
    body = BODY | {"return_token_ids": True, "ignore_eos": True}
    with Serving(folder, "--served-model-name", "m", *flags, log=log) as server:
        status, reply = server.post("/v1/completions", body)
        assert status == 200, reply
        if "--packed-cache" in flags:
            cache = Path(flags[flags.index("--packed-cache") + 1])
            wait_for("the cache is written", lambda: any(cache.glob("*.diptych")))
        ids: list[int] = reply["choices"][0]["token_ids"]
        return ids


def test_a_packed_model_is_served_with_the_same_tokens(tmp_path: Path) -> None:
    """Twice from the checkpoint, which fills and then uses the cache, and once from the packed
    folder, which needs no safetensors and no flag."""
    folder, out, cache = tmp_path / "model", tmp_path / "packed", tmp_path / "cache"
    make_checkpoint(folder, "llama3", torch.bfloat16)
    write_tokenizer(folder)
    command = [sys.executable, "-P", "-m", "diptych.server.cli", "pack", str(folder), str(out)]
    done = subprocess.run(
        [*command, "--quantization", "int8"],
        capture_output=True,
        text=True,
        check=True,
        env=python_environment(),
    )
    assert re.search(r"packed: [0-9.]+ MB for \w+; diptych serve", done.stdout)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights.diptych",
    ]
    log = tmp_path / "log"
    flags = ("--quantization", "int8", "--packed-cache", str(cache))
    first = answer(folder, log, *flags)
    assert len(first) == 12
    assert "packed weights are kept in" in log.read_text()
    kept = list(cache.iterdir())
    assert answer(folder, log, *flags) == first
    assert list(cache.iterdir()) == kept
    assert answer(out, log) == first


def test_mistakes_of_pack(tmp_path: Path, capsys: object) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    make_checkpoint(tmp_path / "model", "llama2", torch.float32)
    assert cli.main(["pack", str(tmp_path / "no"), str(tmp_path / "out")]) == 2
    assert cli.main(["pack", str(tmp_path / "model"), str(tmp_path / "full")]) == 2
    assert not (tmp_path / "out").exists()
