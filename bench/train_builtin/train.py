"""Train the built-in model: `python -m bench.train_builtin.train --minutes 90 --out RUN_FOLDER`.

Owns RUN_FOLDER: `checkpoint.pt` (weights, averaged weights, optimizer, step, seconds spent) and
`log.jsonl`. Started again with the same folder it goes on where it stopped; with more minutes the
schedule stretches. Invariant: a checkpoint is replaced whole or not at all.
"""

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from bench.train_builtin import batches, evaluate, model, optim, tokenizer
from bench.train_builtin.tasks import GENERATORS

SHARES_START = {  # until the first skills are there
    "add_drill": 3.0,
    "reverse_drill": 3.0,
    "lookup": 3.0,
    "json": 2.0,
    "add": 1.0,
    "reverse": 1.0,
    "free_text": 1.0,
    "completion": 1.0,
    "multi_turn": 0.3,
}
SHARES_MIDDLE = {  # retrieval is the slowest to appear: most of the practice
    "add_drill": 2.0,
    "reverse_drill": 0.7,
    "lookup_drill": 6.0,
    "json_drill": 4.0,
    "lookup": 1.0,
    "json": 1.0,
    "add": 0.7,
    "reverse": 0.7,
    "free_text": 0.6,
    "completion": 0.7,
    "multi_turn": 0.3,
}
SHARES_SUMS = {  # then sums, which need the most practice, and long lists
    "add_drill": 5.0,
    "reverse_drill": 2.0,
    "lookup_drill": 1.5,
    "lookup_long_drill": 0.4,
    "json_drill": 1.5,
    "lookup": 1.2,
    "json": 1.2,
    "add": 2.0,
    "reverse": 1.2,
    "free_text": 0.8,
    "completion": 1.0,
    "multi_turn": 0.5,
}
SHARES_LAST = {
    "add_drill": 3.0,
    "reverse_drill": 1.2,
    "lookup_drill": 1.5,
    "lookup_long_drill": 1.2,
    "lookup_long": 0.4,
    "json_drill": 1.5,
    "lookup": 1.5,
    "json": 1.5,
    "add": 1.0,
    "reverse": 1.0,
    "free_text": 0.7,
    "completion": 1.5,
    "multi_turn": 1.0,
}
# (until this part of the schedule, shares)
PHASES = ((0.12, SHARES_START), (0.38, SHARES_MIDDLE), (0.8, SHARES_SUMS), (1.0, SHARES_LAST))
_DECAY_FROM = 0.55  # of the schedule, then linearly to zero
_WARMUP_STEPS = 50
_SAVE_EVERY = 100  # steps
_LR_MUON = 0.02
_LR_ADAM = 0.004


@dataclass(slots=True)
class Run:
    """Everything that a checkpoint holds."""

    weights: model.Weights
    average: model.Weights
    optimizer: optim.State
    step: int = 0
    seconds: float = 0.0
    num_tokens: int = 0


def load_or_start(path: Path, shape: model.ModelShape, seed: int) -> Run:
    """The run in `path`, or a fresh one."""
    if not path.exists():
        weights = model.init_weights(shape, seed)
        average = {n: w.detach().clone() for n, w in weights.items()}
        return Run(weights, average, optim.init_state(weights))
    saved = torch.load(path, weights_only=True)
    weights = {n: w.requires_grad_() for n, w in saved.pop("weights").items()}
    return Run(weights=weights, **saved)


def save(run: Run, path: Path) -> None:
    """Replace the checkpoint atomically."""
    partial = path.with_suffix(".partial")
    fields = {name: getattr(run, name) for name in Run.__slots__}
    fields["weights"] = {n: w.detach() for n, w in run.weights.items()}
    torch.save(fields, partial)
    partial.replace(path)


def rate(step: int, progress: float) -> float:
    """Learning rate factor: warm up, hold, fall linearly to zero at the end of the schedule."""
    falling = (1 - progress) / (1 - _DECAY_FROM)
    return max(0.0, min(1.0, (step + 1) / _WARMUP_STEPS, falling))


def train_step(
    run: Run,
    shape: model.ModelShape,
    micro: list[tuple[torch.Tensor, torch.Tensor]],
    rope: tuple[torch.Tensor, torch.Tensor],
    factor: float,
) -> float:
    """One update; returns the mean loss per answer token."""
    wanted = sum(int((targets >= 0).sum()) for _, targets in micro)
    loss_sum = 0.0
    for ids, targets in micro:
        loss = model.answer_loss(shape, run.weights, ids, targets, rope) / wanted
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        loss_sum += loss.item()
    run.step += 1
    run.num_tokens += sum(ids.numel() for ids, _ in micro)
    optim.apply(run.weights, run.optimizer, run.step, _LR_MUON * factor, _LR_ADAM * factor)
    keep = min(0.998, run.step / (run.step + 10))
    with torch.no_grad():
        for name, w in run.weights.items():
            run.average[name].lerp_(w, 1 - keep)
    return loss_sum


def probe(
    run: Run, shape: model.ModelShape, encoder: batches.Encoder, count: int
) -> dict[str, float]:
    """Exact match of the averaged weights on a few held-out prompts of each task."""
    names = [*GENERATORS, "multi_turn", "completion"]
    return {
        name: evaluate.accuracy(shape, run.average, encoder, name, seed=1, count=count)[0]
        for name in names
    }


class Stop:
    """Set by SIGTERM or SIGINT: finish the step, save, leave."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def steps(args: argparse.Namespace, run: Run) -> Iterator[float]:
    """Progress in [0, 1) before each step, until the minutes are spent or a signal comes."""
    budget_s = args.minutes * 60
    stop = Stop()
    last = time.monotonic()
    while run.seconds < budget_s and not stop.asked:
        yield run.seconds / budget_s
        now = time.monotonic()
        run.seconds += now - last
        last = now


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--minutes", type=float, default=90, help="of training, over all starts")
    parser.add_argument("--export", type=Path, help="also write the model here at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=3584, help="per step")
    parser.add_argument("--probe-every", type=int, default=300, help="steps between evaluations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"
    encoder = batches.Encoder(tokenizer.build())
    shape = model.ModelShape(vocab_size=encoder.tokenizer.get_vocab_size())
    rope = model.rope_table(shape, shape.max_len)
    run = load_or_start(path, shape, args.seed)
    smooth = math.nan
    with (args.out / "log.jsonl").open("a") as log:
        for progress in steps(args, run):
            shares = next(shares for until, shares in PHASES if progress < until)
            rows = batches.step_rows(
                encoder, args.seed, run.step, shares, args.tokens, shape.max_len
            )
            micro = batches.micro_batches(rows, encoder.special(tokenizer.PAD), 1024)
            loss = train_step(run, shape, micro, rope, rate(run.step, progress))
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            if run.step % 20 == 0:
                line = f"step {run.step} {progress:.1%} loss {smooth:.4f}"
                print(f"{line} {run.num_tokens / run.seconds:.0f} tok/s", flush=True)
            if run.step % args.probe_every == 0:
                scores = probe(run, shape, encoder, 64)
                entry = {"step": run.step, "minutes": run.seconds / 60, "loss": smooth, **scores}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                print({k: round(v, 3) for k, v in entry.items()}, flush=True)
            if run.step % _SAVE_EVERY == 0:
                save(run, path)
    save(run, path)
    if args.export:
        model.export(shape, run.average, args.export)


if __name__ == "__main__":
    main()
