"""The worker's machine against a loop that does one sequence at a time."""

import random

import pytest

from diptych.engine.core.config import BatchOptions
from diptych.engine.core.messages import Join, Progress, Revoke, Seal, SetDial, TokenBatch
from diptych.engine.core.plan import Sample, StepResult
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import STEP_SIZES, FinishReason, Role, step_size
from tests.unit.scheduler.batcher_world import (
    BLOCK,
    EPOCH,
    VOCAB,
    WORKER_EPOCH,
    Shell,
    blocks_of,
    check_chain,
    expected_answer,
    hear,
    request_of,
    run_plan,
)

OPTIONS = BatchOptions(max_num_batched_tokens=64)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, VOCAB) for _ in range(length)]


def test_one_local_request_runs_to_its_end() -> None:
    shell = Shell(0, OPTIONS)
    request = request_of("1", prompt_of(random.Random(1), 40), logprobs=0)
    ref = shell.assign(request, blocks_of(0, 80))
    while shell.batcher.has_work:
        shell.step()
    answer, finish = expected_answer(request)
    heard = hear(shell)[ref]
    assert (heard.ids, heard.finish) == (answer, finish)
    assert [entry.token for entry in heard.logprobs] == answer
    assert [ref for progress in shell.progress for ref in progress.finished] == [ref]
    assert shell.batcher.num_sequences == 0
    check_chain(shell, request, answer)


def test_chunks_respect_the_budget_and_only_the_last_samples() -> None:
    shell = Shell(0, BatchOptions(max_num_batched_tokens=48, max_chunk_tokens=32))
    shell.assign(request_of("1", prompt_of(random.Random(2), 100)), blocks_of(0, 160))
    shell.assign(request_of("2", prompt_of(random.Random(3), 20)), blocks_of(20, 60))
    for _ in range(6):
        shell.step()
    rows = [[(row.start, row.length, row.sample) for row in p.rows] for p in shell.plans[:3]]
    assert rows[0] == [(0, 32, False), (0, 16, False)]
    assert rows[1] == [(32, 32, False), (16, 4, True)]
    assert all(plan.num_tokens <= 48 for plan in shell.plans)


def test_prefills_go_by_priority_then_rank() -> None:
    shell = Shell(0, BatchOptions(max_num_batched_tokens=16))
    rng = random.Random(4)
    for name, priority in (("30", 0), ("20", 0), ("10", 1), ("40", -1)):
        request = request_of(name, prompt_of(rng, 16), priority, max_tokens=1)
        shell.assign(request, blocks_of(int(name), 32))
    while shell.batcher.has_work:
        shell.step()
    assert [row.seq.ref.request for plan in shell.plans for row in plan.rows] == [
        "40",
        "20",
        "30",
        "10",
    ]


@pytest.mark.parametrize(("dial", "share"), [(0, 16), (50, 30), (100, 61)])
def test_the_dial_scales_prefill_beside_decodes(dial: int, share: int) -> None:
    shell = Shell(0, OPTIONS, dial)
    for i in range(3):
        prompt = prompt_of(random.Random(i), 5)
        request = request_of(str(i), prompt, max_tokens=50, min_tokens=50)
        shell.assign(request, blocks_of(10 * i, 80))
    shell.step()
    shell.assign(request_of("9", prompt_of(random.Random(5), 200)), blocks_of(50, 256))
    shell.step()
    plan = shell.plans[-1]
    assert plan.num_decodes == 3
    assert plan.rows[3].length == share // BLOCK * BLOCK
    shell.batcher.handle(SetDial(EPOCH, WORKER_EPOCH, 100))
    shell.step()
    assert shell.plans[-1].rows[3].length >= 45


def test_a_prefill_alone_has_the_whole_budget_whatever_the_dial() -> None:
    shell = Shell(0, OPTIONS, dial=0)
    shell.assign(request_of("9", prompt_of(random.Random(5), 200)), blocks_of(50, 256))
    shell.step()
    assert shell.plans[-1].num_tokens == 64


@pytest.mark.parametrize(("budget", "seats"), [(1, 8), (4, 8), (64, 1), (1, 1), (5, 2)])
def test_nothing_starves_in_a_tiny_step(budget: int, seats: int) -> None:
    shell = Shell(0, BatchOptions(max_num_batched_tokens=budget, max_num_seqs=seats))
    requests = {}
    for i in range(6):
        request = request_of(str(i), prompt_of(random.Random(i), 10 + i), max_tokens=8)
        requests[shell.assign(request, blocks_of(10 * i, 64))] = request
    for _ in range(2000):
        if not shell.batcher.has_work:
            break
        shell.step()
        assert shell.plans[-1].num_tokens <= budget
        assert len(shell.plans[-1].rows) <= seats
    heard = hear(shell)
    for ref, request in requests.items():
        assert (heard[ref].ids, heard[ref].finish) == expected_answer(request)


@pytest.mark.parametrize(("budget", "seats"), [(1, 8), (64, 1), (1, 1), (8, 2)])
def test_a_prompt_gets_on_beside_long_answers(budget: int, seats: int) -> None:
    shell = Shell(0, BatchOptions(max_num_batched_tokens=budget, max_num_seqs=seats))
    for i in range(3):
        request = request_of(str(i), [10 + i], max_tokens=200, min_tokens=200)
        shell.assign(request, blocks_of(20 * i, 240))
        while not any(row.seq.ref.request == str(i) for plan in shell.plans for row in plan.rows):
            shell.step()
    late = shell.assign(request_of("9", prompt_of(random.Random(1), 10)), blocks_of(90, 32))
    for _ in range(40):
        shell.step()
    heard = hear(shell)
    assert heard[late].ids, "the prompt was computed"
    counts = [len(heard[SeqRef(str(i), 0, 0)].ids) for i in range(3)]
    assert max(counts) - min(counts) <= 4, "the answers take turns"
    assert min(counts) >= 3


def test_a_stop_token_below_min_tokens_does_not_stop() -> None:
    shell = Shell(0, OPTIONS)
    request = request_of("1", [10], min_tokens=3, max_tokens=9)
    ref = shell.assign(request, blocks_of(0, 16))
    for token in (2, 5, 2):
        plan = shell.batcher.plan()
        shell.drain()
        shell.batcher.commit(plan, StepResult([Sample(token)]))
        shell.drain()
    heard = hear(shell)[ref]
    assert heard.ids == [2, 5, 2]
    assert heard.finish is not None
    assert (heard.finish.reason, heard.finish.stop_reason) == (FinishReason.STOP, None)


def test_handoff_before_and_after_the_assignment() -> None:
    for seal_first in (False, True):
        prefill, decode = Shell(0, OPTIONS), Shell(1, OPTIONS)
        prompt = prompt_of(random.Random(6), 37)
        request = request_of("1", prompt, logprobs=0, min_tokens=3, prompt_logprobs=0)
        table = blocks_of(0, 64)
        ref = prefill.assign(
            request,
            table[:3],
            Role.PREFILL,
            peer=(1, WORKER_EPOCH + 1),
            want_prompt_logprobs=True,
        )
        while prefill.batcher.has_work:
            prefill.step()
        [seal] = prefill.seals()
        assert prefill.progress[-1].sealed == [ref]
        assert prefill.batcher.num_sequences == 0
        if seal_first:
            decode.batcher.handle(seal)
        decode.assign(request, table, Role.DECODE, peer=(0, WORKER_EPOCH))
        decode.drain()
        if not seal_first:
            assert not decode.batcher.has_work
            assert not decode.page, "nothing is touched before the seal"
            decode.batcher.handle(seal)
        while decode.batcher.has_work:
            decode.step()
        answer, finish = expected_answer(request)
        first = decode.batches[0].items[0]
        assert (first.first_index, first.ids[0]) == (0, answer[0])
        assert [entry.token for entry in first.logprobs or []] == answer[:2]
        assert len(first.prompt_logprobs or []) == len(prompt) - 1
        heard = hear(prefill, decode)[ref]
        assert (heard.ids, heard.finish) == (answer, finish)
        assert [entry.token for entry in heard.logprobs] == answer
        assert [entry.token for entry in heard.prompt_logprobs or []] == prompt[1:]
        assert first.prompt_logprobs == prefill.batches[0].items[0].prompt_logprobs
        committed = [b.index for s in (prefill, decode) for p in s.progress for b in p.committed]
        assert committed == list(range((len(prompt) + len(answer) - 1) // BLOCK))


def test_an_answer_of_one_token_is_finished_by_the_prefill_side() -> None:
    shell = Shell(0, OPTIONS)
    request = request_of("1", prompt_of(random.Random(7), 20), max_tokens=1)
    ref = shell.assign(request, blocks_of(0, 20), Role.PREFILL, peer=(1, 8))
    shell.step()
    assert not shell.seals()
    assert shell.progress[-1].finished == [ref]
    assert hear(shell)[ref].finish is not None


def test_a_seal_of_another_peer_epoch_or_ref_changes_nothing() -> None:
    shell = Shell(1, OPTIONS)
    request = request_of("1", prompt_of(random.Random(8), 20))
    ref = shell.assign(request, blocks_of(0, 40), Role.DECODE, peer=(0, 7))
    me = WORKER_EPOCH + 1
    good = Seal(EPOCH, 0, 7, me, ref, 20, 11, None)
    for bad in (
        Seal(EPOCH - 1, 0, 7, me, ref, 20, 11, None),
        Seal(EPOCH, 2, 7, me, ref, 20, 11, None),
        Seal(EPOCH, 0, 6, me, ref, 20, 11, None),
        Seal(EPOCH, 0, 7, me - 1, ref, 20, 11, None),
        Seal(EPOCH, 0, 7, me, SeqRef("1", 0, 1), 20, 11, None),
    ):
        shell.batcher.handle(bad)
        assert not shell.batcher.has_work
    shell.batcher.handle(good)
    assert shell.batcher.has_work
    shell.batcher.handle(good)  # twice is once
    shell.step()
    assert hear(shell)[ref].ids[0] == 11


def test_a_late_grant_sits_out_and_is_reported_once() -> None:
    shell = Shell(0, OPTIONS)
    slow = request_of("1", prompt_of(random.Random(9), 16), min_tokens=20)
    other = request_of("2", prompt_of(random.Random(10), 5), min_tokens=20)
    ref = shell.assign(slow, blocks_of(0, 16))
    shell.assign(other, blocks_of(20, 64))
    for _ in range(4):
        shell.step()
    assert [r for progress in shell.progress for r in progress.starved] == [ref]
    assert hear(shell)[ref].ids == expected_answer(slow)[0][:1]
    shell.grant(ref, 1, [7, 8])
    while shell.batcher.has_work:
        shell.step()
    for request in (slow, other):
        heard = hear(shell)[SeqRef(request.id, 0, 0)]
        assert (heard.ids, heard.finish) == expected_answer(request)


def test_all_starved_is_no_work_but_still_reported() -> None:
    shell = Shell(0, OPTIONS)
    ref = shell.assign(request_of("1", prompt_of(random.Random(9), 40)), blocks_of(0, 32))
    shell.step()
    assert shell.batcher.has_work
    sent = shell.step()
    assert shell.plans[-1].empty
    assert [m.starved for m in sent if isinstance(m, Progress)] == [[ref]]
    work = [shell.batcher.has_work]
    shell.grant(ref, 2, [9])
    assert [*work, shell.batcher.has_work] == [False, True]


def test_a_revoke_is_answered_known_or_not() -> None:
    shell = Shell(0, OPTIONS)
    ref = shell.assign(request_of("1", prompt_of(random.Random(9), 40)), blocks_of(0, 64))
    strange = SeqRef("never", 0, 0)
    for one in (ref, strange):
        shell.batcher.handle(Revoke(EPOCH, WORKER_EPOCH, one))
    [progress] = shell.drain()
    assert isinstance(progress, Progress)
    assert progress.released == [ref, strange]
    assert shell.batcher.num_sequences == 0
    shell.batcher.handle(Revoke(EPOCH - 1, WORKER_EPOCH, ref))
    shell.batcher.handle(Revoke(EPOCH, WORKER_EPOCH - 1, ref))
    assert shell.drain() == []


def test_reports_count_steps_by_size() -> None:
    shell = Shell(0, OPTIONS)
    shell.assign(request_of("1", prompt_of(random.Random(9), 70)), blocks_of(0, 140))
    reports = []
    while shell.batcher.has_work:
        reports += [message for message in shell.step() if isinstance(message, Progress)]
    lengths = [plan.num_tokens for plan in shell.plans if not plan.empty]
    assert lengths[0] > 1
    assert lengths[-1] == 1
    expected = [0] * STEP_SIZES
    for length in lengths:
        expected[step_size(length)] += 1
    found = [sum(column) for column in zip(*(r.step_sizes for r in reports), strict=True)]
    assert found == expected


def test_a_seal_after_the_revoke_is_dropped() -> None:
    shell = Shell(1, OPTIONS)
    request = request_of("1", prompt_of(random.Random(8), 20))
    ref = shell.assign(request, blocks_of(0, 40), Role.DECODE, peer=(0, 7))
    shell.batcher.handle(Revoke(EPOCH, WORKER_EPOCH + 1, ref))
    shell.batcher.handle(Seal(EPOCH, 0, 7, WORKER_EPOCH + 1, ref, 20, 11, None))
    assert not shell.batcher.has_work
    assert shell.batcher.num_sequences == 0


def test_what_arrives_during_a_step_takes_effect_after_it() -> None:
    shell = Shell(0, OPTIONS)
    ref = shell.assign(request_of("1", prompt_of(random.Random(9), 40)), blocks_of(0, 64))
    plan = shell.batcher.plan()
    shell.drain()
    shell.batcher.handle(Revoke(EPOCH, WORKER_EPOCH, ref))
    assert shell.drain() == [], "the step still touches its blocks"
    shell.batcher.commit(plan, run_plan(plan))
    sent = shell.drain()
    [progress] = [message for message in sent if isinstance(message, Progress)]
    assert progress.released == [ref]
    assert len(progress.committed) == 2


def test_a_new_scheduler_drops_everything_and_an_old_one_nothing() -> None:
    shell = Shell(0, OPTIONS)
    request = request_of("1", prompt_of(random.Random(9), 40))
    shell.assign(request, blocks_of(0, 64))
    shell.batcher.handle(Join(EPOCH - 1, WORKER_EPOCH, 0))
    shell.batcher.handle(Join(EPOCH + 1, WORKER_EPOCH + 5, 0))
    assert shell.drain() == []
    assert shell.batcher.has_work
    shell.batcher.handle(Join(EPOCH, WORKER_EPOCH, 0))  # repeated: answered, nothing dropped
    assert len(shell.drain()) == 1
    assert shell.batcher.has_work
    plan = shell.batcher.plan()
    shell.drain()
    shell.batcher.handle(Join(EPOCH + 1, WORKER_EPOCH, 0))
    assert shell.drain() == [], "not before the step is over"
    shell.batcher.commit(plan, run_plan(plan))
    sent = shell.drain()
    assert shell.joined[-1].scheduler_epoch == EPOCH + 1
    assert isinstance(sent[0], TokenBatch)
    assert shell.batcher.num_sequences == 0
    shell.assign(request, blocks_of(0, 64))  # of the old epoch
    assert not shell.batcher.has_work


def test_a_row_that_fails_ends_alone() -> None:
    shell = Shell(0, OPTIONS)
    refs = [
        shell.assign(
            request_of(str(i), prompt_of(random.Random(i), 10), min_tokens=9),
            blocks_of(10 * i, 64),
        )
        for i in range(2)
    ]
    shell.step()
    plan = shell.batcher.plan()
    shell.drain()
    good = run_plan(plan)
    result = StepResult([Sample(-1, None, "NaN in the logits"), good.samples[1]])
    shell.batcher.commit(plan, result)
    shell.drain()
    bad = hear(shell)[refs[0]]
    assert bad.finish is not None
    assert (bad.finish.reason, bad.finish.message) == (FinishReason.ERROR, "NaN in the logits")
    assert len(bad.ids) == 1
    while shell.batcher.has_work:
        shell.step()
    good_one = expected_answer(request_of("1", prompt_of(random.Random(1), 10), min_tokens=9))
    assert (hear(shell)[refs[1]].ids, hear(shell)[refs[1]].finish) == good_one


def test_one_batch_per_api_server_and_step() -> None:
    shell = Shell(0, OPTIONS)
    for i in range(4):
        request = request_of(str(i), prompt_of(random.Random(i), 5), min_tokens=9)
        shell.assign(request, blocks_of(10 * i, 64), api=i % 2)
    shell.step()
    sent = [send for send in shell.out if isinstance(send.message, TokenBatch)]
    assert [(send.to.kind, send.to.number) for send in sent] == [("api", 0), ("api", 1)]
    assert all(len(send.message.items) == 2 for send in sent)  # type: ignore[attr-defined]


def test_quiet_steps_are_summed_up() -> None:
    shell = Shell(0, BatchOptions(max_num_batched_tokens=64))
    request = request_of("1", prompt_of(random.Random(1), 1), min_tokens=200, max_tokens=200)
    shell.assign(request, blocks_of(0, 256))
    while shell.batcher.has_work:
        shell.step()
    assert sum(progress.steps for progress in shell.progress) == 200
    assert sum(progress.decode_tokens for progress in shell.progress) == 199
    assert sum(progress.prefill_tokens for progress in shell.progress) == 1
    assert len(shell.progress) == 200 // BLOCK + 1  # one per full block, and the end
    assert sum(progress.compute_s for progress in shell.progress) == pytest.approx(0.2)


def test_emitted_tokens_count_and_are_not_sent_again() -> None:
    request = request_of("1", prompt_of(random.Random(11), 30), min_tokens=12)
    answer, finish = expected_answer(request)
    shell = Shell(0, OPTIONS)
    ref = shell.assign(
        request,
        blocks_of(0, 64),
        attempt=1,
        emitted=answer[:7],
        num_computed=32,
    )
    while shell.batcher.has_work:
        shell.step()
    assert shell.batches[0].items[0].first_index == 7
    assert shell.batches[0].items[0].num_cached == 30
    ids = [token for batch in shell.batches for token in batch.items[0].ids]
    assert ids == answer[7:]
    assert shell.batches[-1].items[0].finish == finish
    assert ref.attempt == 1
    assert 0 not in shell.page, "cached blocks are never voided"


@pytest.mark.parametrize("seed", range(30))
def test_random_runs_equal_the_loop(seed: int) -> None:
    """Two workers, random roles, late grants, revokes, odd budgets: answers never differ."""
    rng = random.Random(seed)
    options = BatchOptions(
        max_num_batched_tokens=rng.choice([3, 17, 64, 300]),
        max_chunk_tokens=rng.choice([None, 16, 7]),
        max_num_seqs=rng.choice([2, 5, 64]),
    )
    shells = [Shell(i, options, rng.choice([0, 30, 100])) for i in range(2)]
    requests: dict[SeqRef, Request] = {}
    tables: dict[SeqRef, tuple[Shell, int]] = {}
    revoked: set[SeqRef] = set()
    waiting_seals: list[Seal] = []
    free = iter(range(100_000))
    pending = rng.randrange(5, 25)
    for _ in range(20_000):
        busy = any(shell.batcher.num_sequences for shell in shells)
        if not (pending or busy or waiting_seals):
            break
        if pending and rng.random() < 0.2:
            pending -= 1
            length, most = rng.randrange(1, 120), rng.randrange(1, 60)
            request = request_of(
                str(pending),
                prompt_of(rng, length),
                rng.randrange(3),
                max_tokens=most,
                min_tokens=rng.randrange(most + 1),
                ignore_eos=rng.random() < 0.5,
                logprobs=rng.choice([None, 0]),
            )
            blocks = [next(free) for _ in blocks_of(0, length)]
            extra = [next(free) for _ in range(rng.randrange(3))]
            ref = SeqRef(request.id, 0, 0)
            role = rng.choice([Role.LOCAL, Role.PREFILL])
            at = rng.randrange(2)
            requests[ref] = request
            owner = shells[at]
            if role is Role.PREFILL:
                peer = (1 - at, WORKER_EPOCH + 1 - at)
                owner.assign(request, blocks, Role.PREFILL, peer=peer)
                owner = shells[1 - at]
                owner.assign(request, blocks + extra, Role.DECODE, peer=(at, WORKER_EPOCH + at))
            else:
                owner.assign(request, blocks + extra)
            tables[ref] = (owner, len(blocks + extra))
        elif rng.random() < 0.1 and waiting_seals:
            seal = waiting_seals.pop(rng.randrange(len(waiting_seals)))
            shells[seal.peer_epoch - WORKER_EPOCH].batcher.handle(seal)
        elif rng.random() < 0.3 and tables:
            ref = rng.choice(list(tables))
            owner, held = tables[ref]
            owner.grant(ref, held, [next(free)])
            tables[ref] = (owner, held + 1)
            if rng.random() < 0.02:
                del tables[ref]
                revoked.add(ref)
                for i, shell in enumerate(shells):
                    shell.batcher.handle(Revoke(EPOCH, WORKER_EPOCH + i, ref))
        else:
            shell = rng.choice(shells)
            shell.step()
            waiting_seals += [m.message for m in shell.out if isinstance(m.message, Seal)]
            for ref in [r for p in shell.progress for r in p.finished]:
                tables.pop(ref, None)
                for i, other in enumerate(shells):
                    if other is not shell:
                        other.batcher.handle(Revoke(EPOCH, WORKER_EPOCH + i, ref))
            shell.out.clear()
            shell.progress.clear()
        for shell in shells:
            shell.batcher.check_integrity()
    else:
        pytest.fail(f"seed {seed}: never at rest")
    heard = hear(*[shells[0], shells[1]])
    for ref, request in requests.items():
        answer, finish = expected_answer(request)
        if ref in revoked:
            assert heard.get(ref) is None or heard[ref].ids == answer[: len(heard[ref].ids)]
        else:
            assert (heard[ref].ids, heard[ref].finish) == (answer, finish), f"seed {seed}"
