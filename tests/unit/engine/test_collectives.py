"""Collectives of both kinds, in processes of their own; and the form in which a step travels."""

import subprocess
import sys

import pytest
import torch

from bench.drive import Driver
from diptych.engine.batch import build_input
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.follower import decode_step, encode_step, step_numbers_max
from diptych.engine.head_calls import head_calls
from tests.unit.engine.models import BACKEND, tiny_model

RANKS = """
import os, random, sys
from pathlib import Path
import torch
from diptych.engine.gloo_collectives import GlooCollectives, store_on_host
from diptych.engine.shm_collectives import RankMemory, ShmCollectives

torch.set_num_threads(1)
kind, num_ranks, num_shards = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
memory = RankMemory(num_shards * 5000, 900)

def part(turn, shard, size):
    return torch.arange(size, dtype=torch.float32) + 1000.0 * shard + 0.125 * turn

def live(rank):
    if kind == "shm":
        ranks = ShmCollectives(memory, rank, num_ranks, num_shards)
    else:
        store = store_on_host(Path(sys.argv[4]) / "store", num_ranks)
        ranks = GlooCollectives(store, rank, num_ranks, num_shards, "127.0.0.1")
    plan, own = random.Random(1), random.Random(rank)
    for turn in range(400):
        size, what = plan.randrange(1, 5000), plan.randrange(4)
        for _ in range(own.randrange(3000) if own.random() < 0.1 else 0):
            pass
        if what == 0:
            numbers = torch.arange(plan.randrange(900), dtype=torch.int32) + turn
            if rank == 0:
                ranks.share(numbers)
            else:
                assert torch.equal(ranks.receive(), numbers), turn
            continue
        for shard, mine in zip(ranks.shards, ranks.parts(size), strict=True):
            mine.copy_(part(turn, shard, size))
        everything = ranks.gather() if what < 3 else ranks.collect()
        assert (everything is None) == (what == 3 and rank > 0)
        if everything is not None:
            wanted = torch.stack([part(turn, shard, size) for shard in range(num_shards)])
            assert torch.equal(everything, wanted), turn

others = []
for rank in range(1, num_ranks):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            live(rank)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    others.append(pid)
live(0)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in others)
print("met")
"""


@pytest.mark.skipif(BACKEND == "reference", reason="the C++ library is not built")
@pytest.mark.parametrize("kind", ["shm", "gloo"])
@pytest.mark.parametrize(("num_ranks", "num_shards"), [(2, 2), (2, 4), (3, 3)])
def test_every_rank_gets_every_part_in_order(
    tmp_path: object, kind: str, num_ranks: int, num_shards: int
) -> None:
    words = [kind, str(num_ranks), str(num_shards), str(tmp_path)]
    command = [sys.executable, "-W", "ignore", "-c", RANKS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "met\n", done.stderr


def test_a_step_travels_whole() -> None:
    driver = Driver(tiny_model("llama2"))
    seqs = [driver.add(list(range(n)), 4, prompt_logprobs=p) for n, p in ((50, None), (37, 1))]
    rows = [StepRow(seqs[0], 49, 1, True), StepRow(seqs[1], 0, 37, True)]
    plan = StepPlan(rows, 38, 1)
    inputs = build_input(plan, 16)
    calls = head_calls(rows, 10)
    numbers = encode_step(inputs, [call.hidden for call in calls])
    assert numbers.numel() <= step_numbers_max(38, 2, 4)
    got, heads = decode_step(numbers)
    for name in ("ids", "positions", "slot_mapping", "qo_indptr", "kv_indptr", "kv_indices"):
        assert torch.equal(getattr(got, name), getattr(inputs, name)), name
    assert torch.equal(got.kv_len, inputs.kv_len)
    assert [head.tolist() for head in heads] == [call.hidden.tolist() for call in calls]
    # Row 0 of the hidden states is the decode's; row 1 + t is token t of the prompt.
    assert [(call.hidden.tolist(), call.rows, call.prompt) for call in calls] == [
        ([0, 37], [0, 1], None),
        (list(range(1, 11)), [1], (0, 10)),
        (list(range(11, 21)), [1], (10, 20)),
        (list(range(21, 31)), [1], (20, 30)),
        (list(range(31, 37)), [1], (30, 36)),
    ]
