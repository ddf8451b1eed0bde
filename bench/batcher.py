"""Cost of the batcher in one decode step: plan, commit and the commands, without a model.

Run: python -m bench.batcher [--out FILE]. A step is uneventful when no sequence fills a block or
ends. In real traffic one decode step in 16 of each sequence fills a block: that is `spread`. Beside
it, what the step's tokens cost as a message: encoded by the worker, decoded by the API server.
"""

import argparse
import statistics
from pathlib import Path
from time import perf_counter

import msgspec

from bench.record import write
from diptych.engine.core.config import BatchOptions
from diptych.engine.core.hashing import hash_root
from diptych.engine.core.messages import AnyMessage, Assign, Join, Send, TokenBatch
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import Sample, StepResult
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import Role, pack_ids
from diptych.scheduler.batcher import Batcher
from diptych.server.collector import calm_collector

BLOCK = 16
TABLE_BLOCKS = 64
SIZES = (64, 256, 1024)


def batcher_of(num_running: int, *, spread: bool) -> Batcher:
    """A batcher whose sequences all decode, their places within a block equal or spread evenly."""
    batcher = Batcher(
        0,
        1,
        BatchOptions(max_num_batched_tokens=num_running * BLOCK * 2, max_num_seqs=num_running),
        block_size=BLOCK,
        eos_token_ids=frozenset({2}),
        max_model_len=TABLE_BLOCKS * BLOCK,
    )
    batcher.handle(Join(1, 1, 100))
    params = SamplingParams(max_tokens=None, seed=0)
    for i in range(num_running):
        prompt = pack_ids(range(100, 101 + (i % BLOCK if spread else 0)))
        request = Request(f"0-{i}-bench", prompt, params, i, 0, hash_root("bench"))
        table = list(range(i * TABLE_BLOCKS, (i + 1) * TABLE_BLOCKS))
        batcher.handle(
            Assign(
                scheduler_epoch=1,
                worker_epoch=1,
                ref=SeqRef(request.id, 0, 0),
                request=request,
                role=Role.LOCAL,
                emitted=b"",
                hashes=[],
                block_table=table,
                generations=[1] * TABLE_BLOCKS,
                num_computed=0,
                api=0,
                api_epoch=1,
                peer=None,
                want_prompt_logprobs=False,
            )
        )
    return batcher


def steps_us(batcher: Batcher, num_steps: int) -> list[float]:
    """Microseconds of each step, the made-up samples excluded."""
    times = []
    for _ in range(num_steps):
        start = perf_counter()
        plan = batcher.plan()
        batcher.take()
        planned = perf_counter()
        result = StepResult([Sample(7) if row.sample else None for row in plan.rows])
        ran = perf_counter()
        batcher.commit(plan, result)
        batcher.take()
        times.append((perf_counter() - ran + planned - start) * 1e6)
    return times


def measure(num_running: int) -> dict[str, float]:
    """Medians with all blocks filling in one step of 16 (the other 15 are quiet), and spread."""
    lockstep = batcher_of(num_running, spread=False)
    steps_us(lockstep, 2)  # the prompts, and warm
    quiet = steps_us(lockstep, 20 * BLOCK)
    spread = batcher_of(num_running, spread=True)
    steps_us(spread, 2)
    return {
        "running": num_running,
        "uneventful_us_p50": round(statistics.median(quiet), 1),
        "spread_us_p50": round(statistics.median(steps_us(spread, 20 * BLOCK)), 1),
    }


def message_us(num_running: int) -> dict[str, float]:
    """Medians of one uneventful step's `TokenBatch` as msgpack."""
    batcher = batcher_of(num_running, spread=False)
    steps_us(batcher, 3)
    plan = batcher.plan()
    batcher.take()
    batcher.commit(plan, StepResult([Sample(7) for _ in plan.rows]))
    sends = [command for command in batcher.take() if isinstance(command, Send)]
    [batch] = [send.message for send in sends if isinstance(send.message, TokenBatch)]
    assert len(batch.items) == num_running
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(AnyMessage)
    encodes, decodes = [], []
    for _ in range(200):
        start = perf_counter()
        frame = encoder.encode(batch)
        encoded = perf_counter()
        again = decoder.decode(frame)
        decodes.append((perf_counter() - encoded) * 1e6)
        encodes.append((encoded - start) * 1e6)
    assert again == batch
    return {
        "tokens_encode_us_p50": round(statistics.median(encodes), 1),
        "tokens_decode_us_p50": round(statistics.median(decodes), 1),
        "tokens_bytes": len(frame),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    out: Path | None = parser.parse_args().out
    calm_collector()  # as a worker does
    write(out, {"rows": [measure(size) | message_us(size) for size in SIZES]})


if __name__ == "__main__":
    main()
