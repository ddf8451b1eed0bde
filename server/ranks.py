"""The processes of one worker: rank 0 forks the others, and they live and die together.

Owns how they are tied. Whichever ends, all end: rank 0's end reaches the others through the kernel,
another's end reaches rank 0 through a thread that waits for it, and the supervisor sees one worker
end and fences the process group that they all are in. So nobody waits for ever in a collective for
one that died, and the whole worker is one unit of fencing. Invariant: a fault of any rank is the
worker's fault, so that a request that crashes it is found out.
"""

import logging
import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Final, NoReturn

from diptych.engine.collectives import Collectives
from diptych.engine.core.config import WorkerSpec
from diptych.engine.core.types import DownCause, Epoch, blocks_for
from diptych.engine.follower import step_numbers_max
from diptych.engine.pool import KVPool
from diptych.engine.runner import CoreShare, LoadedModel, exchange_floats_max, follow_steps
from diptych.engine.shm_collectives import RankMemory, ShmCollectives
from diptych.kernels import library
from diptych.server.boot import HostBoot
from diptych.server.lifeline import (
    EXIT_FAULT,
    cause_of,
    describe_exit,
    die_by_kernel,
)
from diptych.server.logs import configure_logs
from diptych.transfer.core_table import rank_slots
from diptych.transfer.processes import die_with_parent, name_process

_LOOPBACK: Final = "127.0.0.1"

_log = logging.getLogger("diptych")


def start_ranks(
    boot: HostBoot,
    spec: WorkerSpec,
    epoch: Epoch,
    model: LoadedModel,
    pool: KVPool,
    threads: int,
) -> Collectives | None:
    """Returns in rank 0 only; None where it is the only one. Call it while there is one thread."""
    if spec.num_ranks == 1:
        return None
    memory = _memory(boot, model, pool)
    store = Path(boot.run_dir) / f"worker{spec.worker}.{epoch}.ranks"

    def collectives(rank: int) -> Collectives:
        num_shards = len(model.weights.shards)
        if memory is not None:
            return ShmCollectives(memory, rank, spec.num_ranks, num_shards)
        return _gloo(store, rank, spec.num_ranks, num_shards)

    parent = os.getpid()
    others: dict[int, int] = {}  # pidfd -> pid
    for rank in range(1, spec.num_ranks):
        pid = os.fork()
        if pid == 0:
            status = EXIT_FAULT
            try:
                die_with_parent(parent)
                die_by_kernel(boot.lifeline_fd)
                name = f"worker{spec.worker}.{rank}"
                configure_logs(f"{name}.{epoch}", boot.log_level)
                name_process(name)
                share = share_of_cores(boot, spec, rank)
                follow_steps(model, pool, threads, share, collectives(rank))
            except BaseException:
                _log.exception("rank %d of worker %d ends by an exception", rank, spec.worker)
            finally:
                sys.stderr.flush()
                os._exit(status)
        others[os.pidfd_open(pid)] = pid
    threading.Thread(target=_end_with, args=(others,), name="ranks", daemon=True).start()
    return collectives(0)


def share_of_cores(boot: HostBoot, spec: WorkerSpec, rank: int) -> CoreShare:
    layout, options = boot.layout, boot.options
    slot = rank_slots(layout.workers)[layout.slot(spec.worker)][rank]
    return CoreShare(layout.map_cores(), slot, layout.cores, options.prefill_core_share)


def _memory(boot: HostBoot, model: LoadedModel, pool: KVPool) -> RankMemory | None:
    """None: the ranks speak over gloo, as asked for or because there are no C++ kernels."""
    link = boot.options.rank_link
    if link == "gloo" or (link == "auto" and library.find() is None):
        return None
    batch = boot.options.batch
    tokens_max = batch.max_num_batched_tokens
    most = min(pool.num_blocks, blocks_for(model.config.max_model_len, pool.block_size))
    numbers = step_numbers_max(tokens_max, batch.max_num_seqs, most)
    return RankMemory(exchange_floats_max(model, tokens_max), numbers)


def _gloo(path: Path, rank: int, num_ranks: int, num_shards: int) -> Collectives:
    from diptych.engine.gloo_collectives import GlooCollectives, store_on_host  # load much

    store = store_on_host(path, num_ranks)
    return GlooCollectives(store, rank, num_ranks, num_shards, _LOOPBACK)


def _end_with(others: dict[int, int]) -> NoReturn:
    """Waits for the first of the other ranks that ends, and ends this process as that one did."""
    poll = select.poll()
    for pidfd in others:
        poll.register(pidfd, select.POLLIN)
    pidfd, _ = poll.poll()[0]
    _, status = os.waitpid(others[pidfd], 0)
    _log.error("a rank of this worker ended: %s", describe_exit(status))
    if cause_of(status) is DownCause.FAULT:
        os._exit(EXIT_FAULT)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive after SIGKILL")
