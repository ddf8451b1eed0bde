"""Scenarios: a seed becomes a configuration, a workload and faults.

Invariant: `generate` is a pure function of its arguments, and every part that a failure can be
shrunk by (requests, faults) is a list whose entries stand alone.
"""

from dataclasses import dataclass, replace
from random import Random
from typing import Final

import msgspec

from diptych.engine.core.config import BatchOptions, SchedulerOptions, WorkerSpec
from tests.sim.model import STOP, Oracle, RequestSpec

FEATURES: Final = (
    "tiny_pool",
    "small_caps",
    "worker_crash",
    "scheduler_crash",
    "api_crash",
    "hang",
    "poison",
    "disconnect",
    "stop",
    "deadline",
    "burst",
    "priority",
    "choices",
    "prefix",
    "prompt_logprobs",
    "nan",
    "clog",
    "mid_step",
    "two_pools",
    "no_cache",
    "token_loss",
    "minimal_pool",
    "crowd",
    "crash_loop",
    "far",
    "transfer_loss",
    "transfer_faults",
    "dials",
    "autoscale",
    "partition",
    "slow_peer",
    "zombie",
    "lost_host",
    "refusal",
)
RARE: Final = ("minimal_pool", "crowd", "crash_loop")

_COMMON: Final = ("any", "any", "send")
LABELS: Final = {  # of the places where a process may die, by its kind
    "w": (
        *_COMMON,
        *("handle", "plan", "planned", "write", "commit", "committed"),
        *("clear", "page_hash", "page_commit"),
        *("sent_Progress", "sent_Progress", "sent_Progress", "sent_Seal", "sent_Joined"),
    ),
    "s": (*_COMMON, "step", "stepped", "sent_Accepted", "sent_Assign", "sent_Grant", "sent_Join"),
    "a": (*_COMMON, "handle", "sent_Submit", "sent_Closed", "sent_Abort"),
}


@dataclass(slots=True, frozen=True)
class Timing:
    """Virtual seconds."""

    delay_s: float = 0.0005  # typical network delay
    spike_chance: float = 0.01
    spike_s: float = 0.05
    step_s: float = 0.01
    token_s: float = 0.0002
    detect_s: float = 0.1
    restart_s: float = 0.2
    hang_s: float = 0.5
    tick_s: float = 0.25
    api_tick_s: float = 0.05


@dataclass(slots=True, frozen=True)
class Fault:
    """`slot` dies (or hangs) at its `nth` operation with this label."""

    kind: str  # crash | hang
    slot: str  # w0, s, a0
    label: str
    nth: int


@dataclass(slots=True, frozen=True)
class Partition:
    """For a while nothing about blocks gets from one worker to another; the way back is open."""

    source: int
    to: int
    at: float
    until: float


SILENT_S: Final = 0.6
"""Virtual seconds without a word after which a host is given up."""


@dataclass(slots=True, frozen=True)
class HostLoss:
    """All of a host is gone at once, or nothing gets to it or from it for a while."""

    place: int
    at: float
    dies: bool
    silent_s: float  # if it lives
    back_s: float | None  # so long after it was given up the machine joins again, with nothing


@dataclass(slots=True, frozen=True)
class Scenario:
    seed: int
    features: tuple[str, ...]
    num_blocks: int
    block_size: int
    pools: int
    apis: int
    workers: tuple[WorkerSpec, ...]
    num_started: int  # of these, from the start; the others when they are asked for
    token_loss: float  # chance that a batch of tokens is dropped on its way
    transfer_loss: float  # chance that a message about blocks is dropped, or comes twice
    transfer_faults: float  # chance that a read fails, is stale, or brings a wrong bit
    partitions: tuple[Partition, ...]
    places: tuple[int, ...]  # pools that are on hosts of their own, at the start
    losses: tuple[HostLoss, ...]
    refusing: tuple[int, int] | None  # two pools that never read each other
    slow_peers: tuple[int, ...]  # workers from which reads take very long
    zombies: bool  # what a worker had sent turns up once more after it was fenced
    reads_outlive_source: bool  # as through memory; else a read ends with the source's process
    scheduler: SchedulerOptions
    batch: BatchOptions
    prefix_caching: bool
    max_model_len: int
    max_open: int
    window: int
    timing: Timing
    requests: tuple[RequestSpec, ...]
    faults: tuple[Fault, ...]

    def keep(self, requests: set[int] | None, faults: set[int] | None) -> "Scenario":
        """The scenario with only these requests (by index) and faults (by place)."""
        specs = tuple(r for r in self.requests if requests is None or r.index in requests)
        kept = tuple(f for i, f in enumerate(self.faults) if faults is None or i in faults)
        return replace(self, requests=specs, faults=kept)


def generate(seed: int, features: frozenset[str] | None = None) -> Scenario:
    """The scenario of a seed; `features` given: exactly these, instead of a random subset."""
    rng = Random(f"scenario-{seed}")
    draw = Random(f"features-{seed}")  # its own: a new feature leaves the others' scenarios alone
    chance = draw.choice((0.15, 0.3, 0.5))
    drawn = tuple(f for f in FEATURES if draw.random() < chance * (f not in RARE or 0.3))
    chosen = drawn if features is None else tuple(f for f in FEATURES if f in features)
    has = frozenset(chosen)
    block_size = 32 if rng.random() < 0.1 else 16
    num_blocks = rng.randint(6, 12) if "tiny_pool" in has else rng.randint(12, 64)
    if "minimal_pool" in has:
        num_blocks = rng.randint(2, 5)
    pools = 2 if "two_pools" in has else 1
    if "far" in has:
        pools = rng.choice((2, 2, 3))
    hosts = Random(f"hosts-{seed}")
    if "lost_host" in has:
        pools = max(2, pools)
    places = tuple(range(1, pools)) if "lost_host" in has else ()
    apis = rng.choice((1, 1, 2))
    max_model_len = min(160, (num_blocks - 1) * block_size)
    scheduler, batch = _options(rng, has)
    workers = _workers(rng, pools, has)
    num_started = len(workers)
    if "autoscale" in has and not places:
        num_started = rng.randint(1, len(workers))
        limits = (rng.choice((0, 0, 1)), len(workers))
        scheduler = msgspec.structs.replace(
            scheduler,
            autoscale=limits,
            idle_s=rng.choice((0.05, 0.2, 1.0)),
            leave_s=rng.choice((0.0, 0.05, 0.5)),
            steer_s=rng.choice((0.02, 0.1, 0.25)),
        )
    scenario = Scenario(
        seed=seed,
        features=chosen,
        num_blocks=num_blocks,
        block_size=block_size,
        pools=pools,
        apis=apis,
        workers=workers,
        num_started=num_started,
        token_loss=0.03 if "token_loss" in has else 0.0,
        transfer_loss=0.2 if "transfer_loss" in has else 0.0,
        transfer_faults=rng.choice((0.02, 0.1, 0.3)) if "transfer_faults" in has else 0.0,
        partitions=_partitions(rng, len(workers)) if "partition" in has else (),
        places=places,
        losses=_losses(hosts, places),
        refusing=(0, hosts.randrange(1, pools)) if "refusal" in has and pools > 1 else None,
        slow_peers=(rng.randrange(len(workers)),) if "slow_peer" in has else (),
        zombies="zombie" in has,
        reads_outlive_source=rng.random() < 0.5 and not places,
        scheduler=scheduler,
        batch=batch,
        prefix_caching="no_cache" not in has,
        max_model_len=max_model_len,
        max_open=rng.randint(2, 6) if "small_caps" in has else 4096,
        window=rng.choice((1, 2, 8, 64)),
        timing=_timing(rng, has),
        requests=(),
        faults=_faults(rng, has, apis),
    )
    return replace(scenario, requests=_requests(rng, has, scenario))


_FAR: Final = (
    ((100,), (100,), (100, 100), (100, 50)),  # of the first pool
    ((0,), (0,), (0, 0), (0, 50), (50,)),  # of the second
    ((0,), (50,), (100,), (100, 0)),  # of the third
)


def _workers(rng: Random, pools: int, has: frozenset[str]) -> tuple[WorkerSpec, ...]:
    workers: list[WorkerSpec] = []
    shape: tuple[int, ...]
    for pool in range(pools):
        shape = rng.choice(
            (
                (100, 0),
                (100, 0),
                (100, 0, 0),
                (100, 100, 0),
                (50,),
                (50, 50),
                (100, 50),
                (100, 0, 50),
            )
        )
        if "far" in has:  # prompts are computed in one memory domain and decoded in another
            shape = rng.choice(_FAR[pool])
        elif "crowd" in has:
            shape = rng.choice(((100, 100, 0, 0), (100, 0, 0, 0), (50, 50, 50), (100, 30, 0, 70)))
        workers += [WorkerSpec(len(workers) + i, pool, dial) for i, dial in enumerate(shape)]
    return tuple(workers)


def _options(rng: Random, has: frozenset[str]) -> tuple[SchedulerOptions, BatchOptions]:
    small = "small_caps" in has
    scheduler = SchedulerOptions(
        max_num_seqs=rng.randint(1, 3) if small else rng.choice((4, 8, 256)),
        max_waiting=rng.randint(2, 5) if small else 1024,
        max_waiting_tokens=rng.randint(150, 400) if small else 4_194_304,
        headroom_blocks=rng.randint(1, 3),
        preemptions_max=rng.randint(0, 3),
        local_prefill_tokens=rng.choice((0, 0, 8) if "far" in has else (0, 8, 32, 64)),
    )
    if "dials" in has:
        scheduler = msgspec.structs.replace(
            scheduler,
            ttft_slo_s=rng.choice((None, 0.02, 0.1, 0.5)),
            itl_slo_s=rng.choice((0.005, 0.02, 0.1)),
            steer_s=rng.choice((0.02, 0.1, 0.25)),
        )
    batch = BatchOptions(
        itl_slo_s=scheduler.pace_s,
        max_num_batched_tokens=rng.choice((8, 16, 24, 64, 256)),
        max_chunk_tokens=rng.choice((None, None, 7, 16, 32)),
        prefill_batch_tokens=(1, 16, None)[scheduler.headroom_blocks - 1],
        max_num_seqs=scheduler.max_num_seqs,
    )
    return scheduler, batch


def _timing(rng: Random, has: frozenset[str]) -> Timing:
    clog = "clog" in has
    return Timing(
        delay_s=rng.choice((0.0001, 0.0005, 0.003)),
        spike_chance=0.1 if clog else 0.01,
        spike_s=rng.choice((0.2, 1.0)) if clog else 0.03,
        step_s=rng.choice((0.002, 0.01, 0.03)),
        detect_s=rng.choice((0.01, 0.1, 0.4)),
        restart_s=rng.choice((0.01, 0.2, 1.0)),
    )


def _faults(rng: Random, has: frozenset[str], apis: int) -> tuple[Fault, ...]:
    faults: list[Fault] = []

    def crash(slot: str) -> None:
        label = rng.choice(LABELS[slot[0]])
        most = 1000 if label == "any" else 100
        nth = int(most ** rng.random())
        faults.append(Fault("crash", slot, label, nth))

    if "worker_crash" in has:
        for _ in range(rng.randint(2, 8)):
            crash(f"w{rng.choice((0, 0, 1, 2))}")
    if "crash_loop" in has:
        for _ in range(rng.randint(5, 25)):
            crash(rng.choice(("w0", "w0", "w1", "s")))
    if "scheduler_crash" in has:
        for _ in range(rng.randint(1, 3)):
            crash("s")
    if "api_crash" in has:
        crash(f"a{rng.randrange(apis)}")
    if "hang" in has:
        for _ in range(rng.randint(1, 2)):
            faults.append(Fault("hang", f"w{rng.randint(0, 2)}", "stepping", rng.randint(1, 40)))
    return tuple(faults)


def _partitions(rng: Random, num_workers: int) -> tuple[Partition, ...]:
    found: list[Partition] = []
    for _ in range(rng.randint(1, 4)):
        at = rng.random() * 2.0
        source, to = rng.randrange(num_workers), rng.randrange(num_workers)
        found.append(Partition(source, to, at, at + rng.choice((0.1, 0.5, 2.0))))
    return tuple(found)


def _losses(rng: Random, places: tuple[int, ...]) -> tuple[HostLoss, ...]:
    found: list[HostLoss] = []
    for _ in range(rng.randint(1, 3) if places else 0):
        silent_s = rng.choice((SILENT_S * rng.random(), SILENT_S + 1.5 * rng.random()))
        back_s = rng.choice((None, rng.random() * 0.2, rng.random() * 1.5))
        dies = rng.random() < 0.4
        at = rng.choice((0.3, 1.0, 2.0)) * rng.random()
        found.append(HostLoss(rng.choice(places), at, dies, silent_s, back_s))
    return tuple(sorted(found, key=lambda loss: loss.at))


def _requests(rng: Random, has: frozenset[str], s: Scenario) -> tuple[RequestSpec, ...]:
    oracle = Oracle(s.block_size, s.max_model_len)
    documents = [_tokens(rng, rng.randint(16, 100)) for _ in range(3)]
    gap = 0.0 if "burst" in has else rng.choice((0.002, 0.01, 0.05, 0.1))
    specs: list[RequestSpec] = []
    at = 0.0
    for index in range(rng.randint(60, 200) if "crowd" in has else rng.randint(4, 32)):
        at += rng.expovariate(1.0 / gap) if gap else rng.choice((0.0, 0.0, 0.0, 0.3))
        lengths = (1, 15, 17, 30) if "tiny_pool" in has else (1, 15, 16, 17, 33, 70, 110)
        prompt = _tokens(rng, int(rng.choice(lengths) * rng.uniform(0.5, 1)))
        if "prefix" in has and rng.random() < 0.8:
            document = rng.choice(documents)
            cut = rng.choice((len(document), 16, 32, 48))
            prompt = document[:cut] + prompt[: rng.choice((0, 1, 5, 40))]
            if specs and rng.random() < 0.4:  # a next turn: an earlier answer stands in the prompt
                earlier = rng.choice(specs)
                prompt = earlier.prompt + oracle.answer(earlier, 0).tokens + prompt[:5]
        spec = _request(rng, has, s, index, at, prompt or [FIRST])
        specs.append(spec)
    return tuple(specs)


FIRST: Final = 11


def _tokens(rng: Random, count: int) -> list[int]:
    return [rng.randint(10, 1 << 29) for _ in range(max(1, count))]


def _request(
    rng: Random, has: frozenset[str], s: Scenario, index: int, at: float, prompt: list[int]
) -> RequestSpec:
    tiny = "tiny_pool" in has  # long answers to short prompts: sequences outgrow the pool
    max_tokens = rng.choice((5, 40, 70, 100) if tiny else (1, 2, 5, 16, 17, 40, 70))
    prompt = prompt[: s.max_model_len - 1]
    if rng.random() < 0.9:
        max_tokens = max(1, min(max_tokens, s.max_model_len - len(prompt)))
    n = rng.randint(2, 4) if "choices" in has and rng.random() < 0.4 else 1
    ends = rng.random()
    return RequestSpec(
        index=index,
        api=rng.randrange(s.apis),
        at=at,
        prompt=prompt,
        seed=rng.getrandbits(40),
        max_tokens=max_tokens,
        n=n,
        min_tokens=rng.choice((0, 0, 0, min(4, max_tokens))),
        ignore_eos=rng.random() < (0.7 if tiny else 0.3),
        stop_ids=[STOP] if rng.random() < 0.3 else [],
        logprobs=rng.random() < 0.2,
        prompt_logprobs="prompt_logprobs" in has and rng.random() < 0.5,
        priority=rng.randint(-1, 2) if "priority" in has else 0,
        salt=rng.randint(0, 1) if rng.random() < 0.1 else 0,
        timeout_s=rng.choice((0.05, 0.3, 1.5))
        if "deadline" in has and rng.random() < 0.5
        else None,
        close_after_tokens=rng.randint(1, 10) if "disconnect" in has and ends < 0.25 else None,
        close_after_s=rng.random() ** 2 if "disconnect" in has and 0.25 < ends < 0.5 else None,
        stops={rng.randrange(n): rng.randint(1, 12)} if "stop" in has and ends > 0.5 else {},
        poison_at=rng.randint(0, len(prompt) + 8) if "poison" in has and ends > 0.9 else None,
        nan_at=rng.randint(0, 8) if "nan" in has and 0.8 < ends < 0.9 else None,
    )
