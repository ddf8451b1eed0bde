"""From turns to a result: medians with spread, ratios of pairs, shares of the machine's limits.

Owns nothing. Every ratio is of two turns of one round and says how many times better ours is; the
best peer is the one with the best median.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.peers.engines import Setting
from bench.peers.rows import Row, lower_is_better
from bench.peers.workloads import Metrics
from bench.record import spread

_WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "w8a8": 1.0, "int4": 0.5, "w4a8": 0.5}


@dataclass(frozen=True)
class Turn:
    engine: str
    pair: int
    metrics: Metrics


def report(
    name: str,
    row: Row,
    setting: Setting,
    args: argparse.Namespace,
    turns: list[Turn],
    bounds: list[dict[str, float]],
) -> dict[str, object]:
    names = list(dict.fromkeys(turn.engine for turn in turns))
    measured = {
        engine: {key: spread(_values(turns, engine, key)) for key in _keys(turns, engine)}
        for engine in names
    }
    ours = [engine for engine in names if engine.startswith("diptych")]
    peers = [engine for engine in names if engine not in ours]
    limits = {key: max(bound[key] for bound in bounds) for key in bounds[0]}
    return {
        "row": name,
        "what": row.help,
        "model": setting.model,
        "width": setting.width,
        "threads": setting.threads,
        "pairs": args.pairs,
        "seed": args.seed,
        "limits": limits,
        "limits_each_time": bounds,
        "measured": measured,
        "ours_better_by": {
            engine: {figure: _ratios(turns, engine, peers, figure) for figure in row.figures}
            for engine in ours
        },
        "share_of_limit": {
            engine: _shares(args.models / setting.model, engine, turns) for engine in ours
        },
    }


def _keys(turns: list[Turn], engine: str) -> list[str]:
    return next(list(turn.metrics) for turn in turns if turn.engine == engine)


def _values(turns: list[Turn], engine: str, figure: str) -> list[float]:
    """In the order of the pairs."""
    found = [turn for turn in turns if turn.engine == engine]
    return [turn.metrics[figure] for turn in sorted(found, key=lambda turn: turn.pair)]


def _ratios(turns: list[Turn], engine: str, peers: list[str], figure: str) -> dict[str, object]:
    lower = lower_is_better(figure)
    mine = _values(turns, engine, figure)
    ratios: dict[str, object] = {}
    medians: dict[str, float] = {}
    for peer in peers:
        theirs = _values(turns, peer, figure)
        medians[peer] = median(theirs)
        pairs = zip(mine, theirs, strict=True)
        ratios[peer] = spread([b / a if lower else a / b for a, b in pairs])
    if medians:
        ratios["best_peer"] = (min if lower else max)(medians, key=lambda peer: medians[peer])
    return ratios


def _shares(folder: Path, engine: str, turns: list[Turn]) -> dict[str, dict[str, float]]:
    """Of the read bandwidth for a decoded token, of the bf16 FLOP/s for a prompt's: each turn's
    share of the limits beside it (`limit_*`)."""
    config = json.loads((folder / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = hidden // heads
    layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    scheme = engine.split()[1].split("-")[0]

    def share(figure: str, work: float, limit: str) -> dict[str, float]:
        rates, limits = (_values(turns, engine, key) for key in (figure, f"limit_{limit}"))
        return spread([rate * work / 1e9 / most for rate, most in zip(rates, limits, strict=True)])

    shares = {}
    if "steady_tok_s" in _keys(turns, engine):
        head_bytes = 2.0 * hidden * config["vocab_size"]
        token_bytes = layers * layer * _WEIGHT_BYTES[scheme] + head_bytes
        token_bytes += 192 * layers * 2 * kv_heads * dim * 2.0  # KV in the middle of the answer
        shares["read_bandwidth"] = share("steady_tok_s", token_bytes, "read_gb_per_s")
    if "prefill_tok_s" in _keys(turns, engine):
        rate = median(_values(turns, engine, "prefill_tok_s"))
        length = rate * median(_values(turns, engine, "ttft_ms")) / 1e3
        flop = layers * (2.0 * layer + 4.0 * length / 2 * heads * dim)
        shares["bf16_flop_s"] = share("prefill_tok_s", flop, "bf16_dot_gflop_per_s")
    return shares
