"""What `diptych status` draws: one reading of /server_info, and the rates since the one before.

Owns no state; everything here is a pure function of two readings and the seconds between them.
"""

from collections.abc import Callable
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_BAR: Final = 24  # cells
_DIAL_BAR: Final = 6
_UNITS: Final = ((1e9, "G"), (1e6, "M"), (1e4, "k"))
_STAGES: Final = (
    ("asked_s", "order"),
    ("import_s", "imports"),
    ("weights_s", "weights"),
    ("fork_s", "fork"),
    ("ready_s", "ready"),
    ("join_s", "join"),
)

Reading = dict[str, Any]
Rate = Callable[[float, float | None], str]  # (now, before) -> shown


def render(info: Reading, before: Reading | None, seconds: float) -> RenderableType:
    """`before` is an earlier reading, `seconds` old, for the rates; None shows none."""
    engine = info["engine"]
    if engine is None:
        return Panel(Text("the scheduler has not reported yet"), title=_title(info))
    old = None if before is None else before["engine"]

    def rate(now: float, then: float | None) -> str:
        if then is None or seconds <= 0 or now < then:
            return "-"
        return _short((now - then) / seconds)

    parts: list[RenderableType] = [
        _facts(info, before, engine, old, rate),
        Text(),
        _pools(engine),
        Text(),
        _workers(engine, old, rate),
    ]
    if engine["pairs"]:
        parts += [Text(), _transfers(engine, old, rate)]
    return Panel(Group(*parts), title=_title(info), title_align="left", padding=(0, 1))


def _title(info: Reading) -> Text:
    model, health = info["model"], info["health"]
    title = Text.assemble(
        (f" {', '.join(info['models'])} ", "bold"),
        f"{model['dtype']}, context {model['max_model_len']}, diptych {info['version']} ",
    )
    if health["ok"]:
        return title.append("● healthy ", "green")
    return title.append(f"● {health['reason']} ", "bold red")


def _facts(
    info: Reading, before: Reading | None, engine: Reading, old: Reading | None, rate: Rate
) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    waiting = (f"{engine['waiting']} waiting", "yellow" if engine["waiting"] else "")
    http = f"{info['in_flight']} HTTP in flight, {engine['rejections']} rejected"
    grid.add_row("requests", Text.assemble(f"{engine['running']} running, ", waiting, f", {http}"))
    generated = rate(
        info["generated_tokens"], None if before is None else before["generated_tokens"]
    )
    prefill = rate(engine["prefill_tokens"], None if old is None else old["prefill_tokens"])
    grid.add_row(
        "tokens/s",
        Text.assemble(
            (generated, "bold"), " answered, ", (prefill, "bold"), " of prompts computed"
        ),
    )
    hits = engine["prefix_hits"] / max(1, engine["prefix_queries"])
    grid.add_row(
        "since start",
        f"{info['generated_tokens']} tokens, prefix hits {hits:.1%}, "
        f"{engine['preemptions']} preemptions, {engine['losses']} losses",
    )
    grid.add_row("adapters", "none")
    if engine["pressure"] is not None:
        grid.add_row("pressure", _pressure(engine))
    if engine["workers_wanted"] is not None:
        grid.add_row("scaling", _scaling(engine))
    return grid


def _pressure(engine: Reading) -> Text:
    """1 is on target: how far prefill and decode are from theirs."""
    text = Text()
    for name, value in zip(("prefill", "decode"), engine["pressure"], strict=True):
        style = "red" if value >= 1.0 else "yellow" if value >= 0.8 else "green"
        text.append(f"{name} ").append(f"{value:.2f}" if value < 1e4 else "∞", style).append("  ")
    return text.append(f"{engine['dial_moves']} moves", "dim")


def _scaling(engine: Reading) -> Text:
    serving = sum(not worker["leaving"] for worker in engine["workers"])
    text = Text(f"{serving} of {engine['workers_wanted']} wanted workers")
    start = engine["cold_start"]
    if start is not None:
        stages = ", ".join(f"{name} {start[field]:.2f}" for field, name in _STAGES)
        text.append(f"; last start {start['total_s']:.2f} s ({stages})", "dim")
    return text


def _bar(share: float, more: float, width: int, style: str) -> Text:
    """Filled to `share`, and fainter to `share + more`."""
    full = min(width, round(share * width))
    rest = min(width - full, round(more * width))
    return Text.assemble(
        ("█" * full, style), ("▒" * rest, "dim"), ("·" * (width - full - rest), "dim")
    )


def _pools(engine: Reading) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name, side in (
        ("pool", "right"),
        ("KV in use", "left"),
        ("used", "right"),
        ("cached", "right"),
        ("blocks", "right"),
    ):
        table.add_column(name, justify="right" if side == "right" else "left", header_style="dim")
    for pool in engine["pools"]:
        total = max(1, pool["blocks_total"])
        used, cached = pool["blocks_used"] / total, pool["blocks_cached"] / total
        style = "red" if used > 0.9 else "green"
        table.add_row(
            str(pool["pool"]),
            _bar(used, cached, _BAR, style),
            f"{used:.1%}",
            f"{cached:.1%}",
            str(pool["blocks_total"]),
        )
    return table


def _workers(engine: Reading, old: Reading | None, rate: Rate) -> Table:
    earlier = {} if old is None else {_name(w): w for w in old["workers"]}
    table = Table(box=None, padding=(0, 1, 0, 0))
    heads = ("worker", "pool", "role", "dial", "", "seqs", "steps/s", "step ms")
    for head in (*heads, "decode/s", "prefill/s"):
        left = head in ("role", "")
        table.add_column(head, justify="left" if left else "right", header_style="dim")
    for row in engine["workers"]:
        then = earlier.get(_name(row), {})
        role = {100: "prefill", 0: "decode"}.get(row["dial"], "both")
        table.add_row(
            f"{row['worker']}.{row['worker_epoch']}",
            str(row["pool"]),
            Text("leaving", "yellow") if row["leaving"] else Text(role),
            str(row["dial"]),
            _bar(row["dial"] / 100.0, 0.0, _DIAL_BAR, "cyan"),
            str(row["running"]),
            rate(row["steps"], then.get("steps")),
            f"{row['step_s'] * 1e3:.2f}",
            rate(row["decode_tokens"], then.get("decode_tokens")),
            rate(row["prefill_tokens"], then.get("prefill_tokens")),
        )
    if not engine["workers"]:
        table.add_row(*["-"] * 2, Text("none; the next request starts one", "dim"))
    return table


def _name(worker: Reading) -> tuple[int, int]:
    return worker["worker"], worker["worker_epoch"]


def _transfers(engine: Reading, old: Reading | None, rate: Rate) -> Table:
    earlier = {} if old is None else {(p["source"], p["pool"]): p["blocks"] for p in old["pairs"]}
    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in ("transfer", "blocks", "blocks/s", "µs/block"):
        table.add_column(head, justify="right", header_style="dim")
    for pair in engine["pairs"]:
        key = (pair["source"], pair["pool"])
        table.add_row(
            f"{key[0]} → {key[1]}",
            str(pair["blocks"]),
            rate(pair["blocks"], earlier.get(key)),
            f"{pair['block_s'] * 1e6:.1f}" if pair["refused"] is None else pair["refused"],
        )
    return table


def _short(value: float) -> str:
    for size, unit in _UNITS:
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
