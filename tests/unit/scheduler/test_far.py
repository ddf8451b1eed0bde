"""Two pools: blocks on both sides before a prefill, given back when neither side needs them."""

import random
from collections.abc import Sequence

from diptych.engine.core.config import CacheOptions, SchedulerOptions
from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.messages import (
    ApiUp,
    Assign,
    ChoiceState,
    CommittedBlock,
    Joined,
    Landed,
    Lost,
    PoolDown,
    PoolUp,
    Progress,
    Revoke,
    Send,
    Submit,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import DownCause, Role, pack_ids
from diptych.scheduler.commands import PoolRead, ReadPool, SchedulerInput
from diptych.scheduler.lifecycle import RowState
from diptych.scheduler.scheduler import Scheduler
from tests.unit.scheduler.world import EPOCH, SIZE, make_request

P, D = 0, 1  # workers, and their pools
PROMPT = list(range(100, 150))  # 50 tokens: 3 full blocks and a part of one


class Far:
    """One prefill worker in pool 0, one decode worker in pool 1."""

    def __init__(self, num_blocks: int = 16, options: SchedulerOptions | None = None) -> None:
        options = options or SchedulerOptions(local_prefill_tokens=8)
        self.scheduler = Scheduler(EPOCH, options, CacheOptions(num_blocks=num_blocks))
        self.sent: list[Send] = []
        self.assigned: dict[tuple[int, SeqRef], Assign] = {}
        self.step(ApiUp(0, 1), WorkerUp(P, 1, 0, 100), WorkerUp(D, 1, 1, 0))
        self.step(Joined(EPOCH, P, 1), Joined(EPOCH, D, 1))
        for pool in (0, 1):
            commands = self.step(PoolUp(pool, num_blocks, SIZE))
            assert ReadPool(pool) in commands
            self.step(PoolRead(pool, [0] * num_blocks, []))

    def step(self, *inputs: SchedulerInput) -> list[object]:
        commands = self.scheduler.step(inputs, 0.0)
        self.scheduler.check_integrity()
        self.sent = [command for command in commands if isinstance(command, Send)]
        for send in self.sent:
            if isinstance(send.message, Assign):
                self.assigned[send.to.number, send.message.ref] = send.message
        return list(commands)

    def submit(
        self, name: str, prompt: list[int], attempt: int = 0, max_tokens: int = 16
    ) -> SeqRef:
        request = make_request(name, prompt, max_tokens=max_tokens)
        hashes = extend_chain(request.root, request.prompt_ids, SIZE)
        state = ChoiceState(0, attempt, pack_ids([]), hashes)
        self.step(Submit(0, 1, EPOCH, request, [state], recovering=attempt > 0))
        return SeqRef(name, 0, attempt)

    def progress(self, worker: int, **lists: Sequence[object]) -> None:
        report = Progress(EPOCH, worker, 1, 1, 0.01, 0, 0, [], [], [], [], [])
        fields = {name: list(items) for name, items in lists.items()}
        self.step(Progress(**{f: getattr(report, f) for f in report.__struct_fields__} | fields))

    def full(self, worker: int, ref: SeqRef, count: int) -> list[CommittedBlock]:
        """The first blocks of a table, as full ones."""
        assign = self.assigned[worker, ref]
        rows, parent = [], assign.request.root
        for i in range(count):
            block, generation = assign.block_table[i], assign.generations[i]
            rows.append(CommittedBlock(ref, i, block, generation, assign.hashes[i], parent))
            parent = assign.hashes[i]
        return rows

    def used(self, pool: int) -> int:
        audit = self.scheduler.audit().pools[pool]
        return audit.private + audit.shared

    def cached(self, pool: int) -> int:
        return self.scheduler.audit().pools[pool].cached

    def sent_to(self, worker: int, kind: type) -> list[object]:
        return [
            send.message
            for send in self.sent
            if send.to.kind == "worker" and send.to.number == worker
            if isinstance(send.message, kind)
        ]


def run_to_seal(far: Far, name: str = "a") -> SeqRef:
    ref = far.submit(name, PROMPT)
    far.progress(P, committed=far.full(P, ref, 3), sealed=[ref])
    return ref


def test_both_sides_get_their_blocks_and_each_other() -> None:
    far = Far()
    ref = far.submit("a", PROMPT)
    there, here = far.assigned[P, ref], far.assigned[D, ref]
    assert (there.role, here.role) == (Role.PREFILL, Role.DECODE)
    assert len(there.block_table) == 4, "the prompt's blocks and no headroom"
    assert len(here.block_table) == 5, "all that it can ever need"
    assert there.handoff is not None
    assert here.handoff is not None
    assert (there.handoff.pool, here.handoff.pool) == (1, 0)
    assert here.handoff.first == there.handoff.first == 0
    assert here.handoff.blocks == there.block_table
    assert here.handoff.generations == there.generations
    assert (far.used(0), far.used(1)) == (4, 5)


def test_the_source_is_given_back_once_it_landed_and_sealed_in_either_order() -> None:
    for seal_first in (True, False):
        far = Far()
        ref = far.submit("a", PROMPT)
        far.progress(P, committed=far.full(P, ref, 3))
        if seal_first:
            far.progress(P, sealed=[ref])
            assert far.used(0) == 4
        far.progress(D, committed=far.full(D, ref, 3), landed=[Landed(ref, 4, 0.001)])
        if not seal_first:
            assert far.used(0) == 4
            far.progress(P, sealed=[ref])
        assert (far.used(0), far.cached(0)) == (0, 3), "the full ones stay as a cache"
        far.progress(D, finished=[ref])
        assert (far.used(1), far.cached(1)) == (0, 3)


def test_only_what_the_decode_side_lacks_is_moved() -> None:
    far = Far()
    ref = run_to_seal(far)
    far.progress(D, committed=far.full(D, ref, 2), released=[ref])  # its pull broke after two
    assert [send.message for send in far.sent if isinstance(send.message, Lost)]
    far.scheduler._rows.entries["a"].rows[0].failed_pulls = 0
    second = far.submit("a", PROMPT, attempt=1)
    here, there = far.assigned[D, second], far.assigned[P, second]
    assert there.num_computed == 48
    assert here.num_computed == 32
    assert here.handoff is not None
    assert here.handoff.first == 2
    assert here.handoff.blocks == there.block_table[2:]


def test_what_could_not_be_moved_is_computed_where_it_is_needed() -> None:
    far = Far()
    ref = run_to_seal(far)
    far.progress(D, released=[ref])
    assert (far.used(0), far.used(1)) == (0, 0)
    second = far.submit("a", PROMPT, attempt=1)
    assert far.assigned[D, second].role is Role.LOCAL
    assert far.assigned[D, second].handoff is None


def test_no_prefill_begins_without_room_on_both_sides() -> None:
    far = Far(num_blocks=8)
    first = far.submit("a", PROMPT)
    second = far.submit("b", [9, *PROMPT])
    assert (D, second) not in far.assigned, "the decode side has 8 - 5 blocks"
    assert far.used(0) == 4
    far.progress(P, sealed=[first])
    far.progress(D, landed=[Landed(first, 4, 0.001)], finished=[first])
    assert (D, second) in far.assigned


def test_a_dead_source_loses_the_attempt_and_its_reader_is_revoked() -> None:
    for sealed in (False, True):
        far = Far()
        ref = run_to_seal(far) if sealed else far.submit("a", PROMPT)
        far.step(WorkerDown(P, 1, DownCause.KILLED))
        assert far.sent_to(D, Revoke), f"sealed {sealed}"
        assert far.used(0) == 4, "it may still be read"
        far.progress(D, released=[ref])
        assert (far.used(0), far.used(1)) == (0, 0)
        assert [send.message for send in far.sent if isinstance(send.message, Lost)]


def test_a_dead_reader_gives_both_sides_back() -> None:
    far = Far()
    ref = far.submit("a", PROMPT)
    far.step(WorkerDown(D, 1, DownCause.KILLED))
    assert far.sent_to(P, Revoke)
    far.progress(P, released=[ref])
    assert (far.used(0), far.used(1)) == (0, 0)


def test_without_a_living_prefill_worker_prompts_are_computed_where_they_decode() -> None:
    far = Far()
    far.step(WorkerDown(P, 1, DownCause.KILLED))
    ref = far.submit("a", PROMPT)
    assert far.assigned[D, ref].role is Role.LOCAL


def test_a_slow_wire_makes_it_cheaper_to_compute_where_it_decodes() -> None:
    far = Far()
    ref = run_to_seal(far)
    far.progress(D, landed=[Landed(ref, 4, 4.0)], finished=[ref])
    second = far.submit("b", [9, *PROMPT])
    assert far.assigned[D, second].role is Role.LOCAL
    fast = Far()
    ref = run_to_seal(fast)
    fast.progress(D, landed=[Landed(ref, 4, 0.0001)], finished=[ref])
    second = fast.submit("b", [9, *PROMPT])
    assert fast.assigned[P, second].role is Role.PREFILL


def test_a_pair_that_was_slow_once_is_tried_again() -> None:
    far = Far(num_blocks=512)
    ref = run_to_seal(far)
    far.progress(D, landed=[Landed(ref, 4, 4.0)], finished=[ref])
    for i in range(200):
        ref = far.submit(f"b{i}", [i, *PROMPT])
        if (P, ref) in far.assigned:
            return
        far.progress(D, finished=[ref])
    raise AssertionError("every prompt stays where it decodes, for ever")


def test_a_next_turn_begins_with_what_only_the_decode_side_knows() -> None:
    far = Far(num_blocks=64)
    ref = run_to_seal(far)
    far.progress(D, committed=far.full(D, ref, 3), landed=[Landed(ref, 4, 0.001)], finished=[ref])
    filler = far.submit("filler", [7] * 900)  # evicts the prompt from the prefill side's pool
    far.progress(P, committed=far.full(P, filler, 56), sealed=[filler])
    far.progress(D, landed=[Landed(filler, 57, 0.001)], finished=[filler])
    again = far.submit("filler2", [8] * 900)
    far.progress(P, sealed=[again])
    far.progress(D, landed=[Landed(again, 57, 0.001)], finished=[again])
    second = far.submit("b", [*PROMPT, *range(200, 400)])
    there, here = far.assigned[P, second], far.assigned[D, second]
    assert there.num_computed == 0
    assert here.num_computed == 48
    assert there.prefix is not None
    assert here.prefix is not None
    assert (there.prefix.pool, there.prefix.first) == (1, 0)
    assert there.prefix.blocks == here.block_table[:3]
    assert there.prefix.generations == here.generations[:3]
    assert (here.prefix.pool, here.prefix.first) == (0, 0)
    far.progress(P, landed=[Landed(second, 3, 0.001)])
    assert far.used(0) == 16, "the prefill side's blocks stay"


def test_a_lost_decode_host_takes_nothing_with_it() -> None:
    """Its pool is forgotten, the attempt is lost, and the next one runs where it was prefilled."""
    far = Far()
    ref = far.submit("r", PROMPT)
    assert far.assigned[D, ref].role is Role.DECODE
    sent = far.step(WorkerDown(D, 1, DownCause.KILLED), PoolDown(1))
    assert [s.to.number for s in far.sent if isinstance(s.message, Revoke)] == [P]
    assert sorted(far.scheduler.audit().pools) == [0, 1]  # the prefill side has not let go
    far.progress(P, released=[ref])
    assert any(isinstance(s.message, Lost) for s in far.sent)
    assert sorted(far.scheduler.audit().pools) == [0]
    again = far.submit("r", PROMPT, attempt=1)
    assert far.assigned[P, again].role is Role.LOCAL
    assert sent


def test_a_lost_prefill_host_leaves_a_row_that_has_landed_alone() -> None:
    far = Far()
    ref = far.submit("r", PROMPT)
    far.progress(P, committed=far.full(P, ref, 3))
    far.progress(P, sealed=[ref])
    far.progress(D, landed=[Landed(ref, 4, 0.01)])
    far.progress(D, committed=far.full(D, ref, 3))
    far.step(WorkerDown(P, 1, DownCause.KILLED), PoolDown(0))
    assert not [s for s in far.sent if isinstance(s.message, Revoke | Lost)]
    assert sorted(far.scheduler.audit().pools) == [1]
    other = far.submit("other", PROMPT)
    assert far.assigned[D, other].role is Role.LOCAL
    far.progress(D, finished=[ref])
    assert far.scheduler.audit().rows_by_state[RowState.DONE] == 1


def test_a_pool_that_is_lost_while_it_is_read_stays_lost() -> None:
    far = Far()
    far.step(WorkerUp(2, 1, 2, 0))
    far.step(PoolUp(2, 16, SIZE))
    assert ReadPool(2) in far.step(Joined(EPOCH, 2, 1))
    far.step(PoolDown(2))  # the word of its worker's end was lost
    far.step(PoolRead(2, [0] * 16, []))
    audit = far.scheduler.audit()
    assert sorted(audit.pools) == [0, 1]
    assert audit.ready


def test_a_head_cached_elsewhere_comes_from_there_and_the_rest_is_computed_here() -> None:
    far = Far(num_blocks=80)
    ref = run_to_seal(far)  # 3 blocks of it are cached in pool 0 only
    far.progress(D, landed=[Landed(ref, 4, 0.0001)], finished=[ref])
    far.submit("long", [7] * 900)  # the prefill worker has a queue now, the decode worker has not
    second = far.submit("b", [*PROMPT[:48], *range(200, 240)])
    there, here = far.assigned[P, second], far.assigned[D, second]
    assert (there.role, there.head, there.num_computed) == (Role.PREFILL, 48, 48)
    assert (here.role, here.head, here.num_computed) == (Role.LOCAL, 48, 0)
    assert here.prefix is not None
    assert (here.prefix.pool, here.prefix.first) == (0, 0)
    assert here.prefix.blocks == there.block_table
    assert here.prefix.generations == there.generations
    before = far.used(0)
    far.progress(P, sealed=[second])
    assert far.used(0) == before, "still being read"
    far.progress(D, landed=[Landed(second, 3, 0.0001)])
    assert far.used(0) == before - 3
    far.step(WorkerDown(P, 1, DownCause.KILLED))
    assert not far.sent_to(D, Revoke) or second not in [
        revoke.ref for revoke in far.sent_to(D, Revoke) if isinstance(revoke, Revoke)
    ], "it needs the other side no more"


def test_whoever_waits_for_a_head_hears_of_its_end() -> None:
    far = Far(num_blocks=80)
    ref = run_to_seal(far)
    far.progress(D, landed=[Landed(ref, 4, 0.0001)], finished=[ref])
    far.submit("long", [7] * 900)
    second = far.submit("b", [*PROMPT[:48], *range(200, 240)])
    far.progress(P, sealed=[second])
    far.step(WorkerDown(P, 1, DownCause.KILLED))
    revoked = [r.ref for r in far.sent_to(D, Revoke) if isinstance(r, Revoke)]
    assert second in revoked
    far.progress(D, released=[second])
    assert far.used(0) <= 57


def test_every_choice_is_the_cheapest_of_all() -> None:
    """Against a sum over all possibilities that is written out once more."""
    rng = random.Random(11)
    seen = set()
    for _ in range(200):
        far = Far(num_blocks=160)
        ref = run_to_seal(far)
        far.progress(D, landed=[Landed(ref, 4, 10.0 ** rng.uniform(-5, 0))], finished=[ref])
        prefiller, decoder = far.scheduler._members.workers[P], far.scheduler._members.workers[D]
        for worker in (prefiller, decoder):
            worker.cost.prefill_s = 10.0 ** rng.uniform(-5, -3)
            worker.cost.step_s = 10.0 ** rng.uniform(-4, -2)
        prefiller.backlog_tokens = rng.choice((0, 100, 5000))
        hit, tail = rng.choice((0, 1, 2, 3)), rng.choice((9, 40, 200))
        prompt = [*PROMPT[: hit * SIZE], *range(1000, 1000 + tail)]
        block_s = far.scheduler._members.pair_cost(0, 1).block_s
        p_s, d_s, step_s = prefiller.cost.prefill_s, decoder.cost.prefill_s, decoder.cost.step_s
        blocks, queue_s = -(-len(prompt) // SIZE), prefiller.backlog_tokens * p_s
        compute_s = (len(prompt) - hit * SIZE) * p_s
        head = (len(prompt) - 8) // SIZE
        costs = {
            ("pair", None): queue_s
            + compute_s
            + max(blocks * block_s - compute_s, block_s)
            + step_s,
            ("local", None): 2 * len(prompt) * d_s + step_s,
        }
        if hit:
            rest_s = (len(prompt) - hit * SIZE) * d_s
            costs["head", hit * SIZE] = max(hit * block_s, block_s) + 2 * rest_s + step_s
        if head > hit:
            own_s = queue_s + (head - hit) * SIZE * p_s
            moved_s = max(head * block_s - own_s, block_s)
            rest_s = (len(prompt) - head * SIZE) * d_s
            costs["head", head * SIZE] = own_s + moved_s + 2 * rest_s + step_s
        second = far.submit("b", prompt)
        there, here = far.assigned.get((P, second)), far.assigned[D, second]
        kind = "local" if there is None else "pair" if here.role is Role.DECODE else "head"
        chosen = kind, None if there is None or kind == "pair" else there.head
        assert costs[chosen] <= min(costs.values()) * (1 + 1e-9), (chosen, costs)
        seen.add((kind, there is not None and there.num_computed == there.head))
    assert seen >= {("pair", False), ("local", False), ("head", True)}, seen
