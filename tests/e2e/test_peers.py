"""`python -m bench.peers`: ours and a peer in turns, with a stand-in for the peer's library."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from bench.models import write_weights
from bench.peers.engines import Setting
from bench.peers.report import Turn, report
from bench.peers.rows import ROWS

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "data" / "fake_openvino"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for size in ("tiny", "bench-tiny"):
        write_weights(folder / size, size)
        (folder / f"{size}-openvino-fp16").symlink_to(folder / size)
    return folder


def test_turns_of_two_servers_end_in_one_result(models: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bench.peers", "http", "arrival", "--model", "tiny"]
    words += ["--models", str(models), "--openvino-python", sys.executable, "--pairs", "1"]
    words += ["--threads", "1", "--logs", str(tmp_path), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(FAKE)}
    subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)

    http = json.loads((tmp_path / "peers_http_bench-tiny_bf16.json").read_text())
    assert [engine["name"] for engine in http["engines"]] == ["diptych bf16 mixed", "openvino bf16"]
    assert str(models) not in json.dumps(http)
    for measured in http["measured"].values():
        assert measured["output_tokens"]["min"] == measured["output_tokens"]["max"] == 64 * 128
    ratios = http["ours_better_by"]["diptych bf16 mixed"]
    assert ratios["output_tok_s"]["best_peer"] == "openvino bf16"
    assert ratios["output_tok_s"]["openvino bf16"]["count"] == 1
    assert any(line.startswith("vllm") for line in http["left_out"])

    arrival = json.loads((tmp_path / "peers_arrival_tiny_bf16.json").read_text())
    assert set(arrival["measured"]) == {
        "diptych bf16 split",
        "diptych bf16 mixed",
        "openvino bf16 chunk 2048",
        "openvino bf16 chunk 256",
    }


def test_ratio_is_of_one_round_and_says_how_much_better_ours_is(models: Path) -> None:
    turns = [
        Turn(engine, pair, {"ready_s": ready_s, "first_token_s": 2 * ready_s})
        for engine, times in (("diptych bf16 mixed", [1.0, 2.0, 4.0]), ("peer", [3.0, 4.0, 2.0]))
        for pair, ready_s in enumerate(times)
    ]
    args = Namespace(models=models, pairs=3, seed=0)
    limits = [{"read_gb_per_s": 1.0}, {"read_gb_per_s": 2.0}]
    setting = Setting("tiny", "bf16", 2048, 16, 2304, 1)
    found = report("start", ROWS["start"], setting, args, turns, limits)
    ratio = found["ours_better_by"]["diptych bf16 mixed"]["ready_s"]  # type: ignore[index]
    assert ratio["peer"] == {"median": 2.0, "min": 0.5, "max": 3.0, "count": 3}
    assert found["limits"] == {"read_gb_per_s": 2.0}


def test_share_is_of_the_limits_beside_the_turn(models: Path) -> None:
    def turns(rates: list[float], limits: list[float]) -> list[Turn]:
        return [
            Turn(
                "diptych bf16 mixed",
                pair,
                {"steady_tok_s": rate, "limit_read_gb_per_s": limit},
            )
            for pair, (rate, limit) in enumerate(zip(rates, limits, strict=True))
        ]

    def share(found: list[Turn]) -> dict[str, float]:
        args = Namespace(models=models, pairs=len(found), seed=0)
        setting = Setting("bench-tiny", "bf16", 2048, 16, 2304, 1)
        made = report("decode", ROWS["decode"], setting, args, found, [{"read_gb_per_s": 1.0}])
        return made["share_of_limit"]["diptych bf16 mixed"]["read_bandwidth"]  # type: ignore[index, no-any-return]

    config = json.loads((models / "bench-tiny" / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = hidden // heads
    values = layers * (
        hidden * dim * 2 * (heads + kv_heads) + 3 * hidden * config["intermediate_size"]
    )
    values += hidden * config["vocab_size"] + 192 * layers * 2 * kv_heads * dim
    one = 2 * values / 1e9  # GB that a token reads
    found = share(turns([10.0, 10.0, 40.0], [20 * one, 10 * one, 80 * one]))
    assert found["count"] == 3
    assert [found[key] for key in ("min", "median", "max")] == pytest.approx([0.5, 0.5, 1.0])
