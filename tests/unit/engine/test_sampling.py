"""The sampler against a slow version of one row; its frequencies; rows in any company."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import Sample
from diptych.engine.core.request import Request, SeqRef, Sequence
from diptych.engine.core.types import Role, pack_ids
from diptych.engine.sampling import EDITS_KEPT_MAX, NOT_FINITE, NOTHING_ALLOWED, Sampler
from diptych.kernels.philox import uniforms
from diptych.kernels.reference import ReferenceKernels

VOCAB = 40
EOS = frozenset({1})


def seq_of(
    params: SamplingParams,
    prompt: list[int] | None = None,
    emitted: list[int] | None = None,
    *,
    name: str = "a",
    choice: int = 0,
) -> Sequence:
    prompt = prompt or [3]
    tokens = prompt + (emitted or [])
    return Sequence(
        ref=SeqRef(name, choice, 0),
        request=Request(name, pack_ids(prompt), params, 0),
        role=Role.LOCAL,
        tokens=tokens,
        num_computed=len(tokens) - 1,
        block_table=[],
        generations=[],
        hashes=[],
        num_committed=0,
        num_cached=0,
    )


def sampler_of(vocab: int = VOCAB) -> Sampler:
    return Sampler(ReferenceKernels(), vocab, EOS)


def one(logits: list[float] | Tensor, seq: Sequence) -> Sample:
    row = torch.as_tensor(logits, dtype=torch.float32)[None]  # [1, V]
    [sample] = sampler_of(row.shape[1]).sample(row, [seq])
    return sample


# ---- the slow version --------------------------------------------------------------------------


def slow_edited(logits: list[float], seq: Sequence) -> list[float]:
    """Token by token, in fp32 as the contract says."""
    f, p = np.float32, seq.request.params
    emitted = seq.tokens[seq.num_prompt :]
    out = []
    for token in range(len(logits)):
        x = f(logits[token])
        banned = p.allowed_token_ids is not None and token not in p.allowed_token_ids
        for word in p.bad_word_ids:
            prefix = word[:-1]
            matches = not prefix or emitted[-len(prefix) :] == prefix
            banned |= token == word[-1] and matches and len(emitted) >= len(prefix)
        banned |= len(emitted) < p.min_tokens and token in {*EOS, *p.stop_token_ids}
        if banned:
            x = f(-math.inf)
        x = x + f((p.logit_bias or {}).get(token, 0.0))
        count = emitted.count(token)
        if token in seq.tokens and p.repetition_penalty != 1.0:
            x = x / f(p.repetition_penalty) if x > 0 else x * f(p.repetition_penalty)
        x = x - f(p.frequency_penalty) * f(count)
        x = x - f(p.presence_penalty) * f(count > 0)
        out.append(float(x))
    return out


def slow_kept(x: list[float], p: SamplingParams) -> dict[int, float]:
    """Token -> weight (1 for the best) of the tokens that may be drawn."""
    best = max(x)
    weights = {i: float(np.exp(np.float64((v - best) / p.temperature))) for i, v in enumerate(x)}
    kept = {i: w for i, w in weights.items() if w > 0 and w >= p.min_p}
    if 0 < p.top_k < len(x):
        least = sorted(x, reverse=True)[p.top_k - 1]
        kept = {i: w for i, w in kept.items() if x[i] >= least}
    if p.top_p < 1.0:
        whole, sofar = 0.0, 0.0
        for w in kept.values():
            whole += w
        small = {}
        for i in sorted(kept, key=lambda i: (-kept[i], i)):
            small[i] = kept[i]
            sofar += kept[i]
            if sofar >= p.top_p * whole:
                break
        kept = {i: w for i, w in kept.items() if i in small}
    return kept


def slow_token(logits: list[float], seq: Sequence) -> int:
    p = seq.request.params
    x = slow_edited(logits, seq)
    if p.temperature == 0:
        return x.index(max(x))
    kept = slow_kept(x, p)
    whole = 0.0
    for weight in kept.values():
        whole += weight
    assert p.seed is not None
    target = float(uniforms([p.seed], [seq.ref.choice], [seq.num_emitted])[0]) * whole
    sofar = 0.0
    for token, weight in kept.items():
        sofar += weight
        if sofar > target:
            return token
    raise AssertionError("no token reached")


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    def ids(most: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randrange(1, most))]

    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7, 100.0, 1e-6]),
        top_p=rng.choice([1.0, 0.9, 0.5, 0.01]),
        top_k=rng.choice([0, -1, 1, 5, vocab + 3]),
        min_p=rng.choice([0.0, 0.0, 0.1, 1.0]),
        frequency_penalty=rng.choice([0.0, 0.7, -1.3]),
        presence_penalty=rng.choice([0.0, 0.4, -2.0]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.5]),
        logit_bias=rng.choice([None, {i: rng.uniform(-5, 5) for i in ids(5)}]),
        allowed_token_ids=rng.choice([None, None, ids(20)]),
        bad_word_ids=rng.choice([[], [[rng.randrange(4)], [0, 2], [1, 0, 3], [vocab + 1]]]),
        stop_token_ids=rng.choice([[], ids(4)]),
        min_tokens=rng.choice([0, 0, 5]),
        logprobs=rng.choice([None, 0, 3]),
        seed=rng.randrange(-(2**63), 2**63),
    )


def random_row(rng: random.Random, vocab: int) -> list[float]:
    """Logits with ties and a few impossible tokens."""
    row = [float(np.float32(round(rng.gauss(0, 3), 1))) for _ in range(vocab)]
    for _ in range(rng.randrange(3)):
        row[rng.randrange(vocab)] = -math.inf
    return row


def random_seq(rng: random.Random, name: str) -> Sequence:
    prompt = [rng.randrange(6) for _ in range(rng.randrange(1, 8))]
    emitted = [rng.randrange(4) for _ in range(rng.randrange(8))]
    params = random_params(rng, VOCAB)
    return seq_of(params, prompt, emitted, name=name, choice=rng.randrange(3))


@pytest.mark.parametrize("seed", range(20))
def test_every_row_equals_the_slow_version(seed: int) -> None:
    rng = random.Random(seed)
    sampler = sampler_of()
    seqs = [random_seq(rng, str(i)) for i in range(24)]
    for step in range(6):
        rows = [random_row(rng, VOCAB) for _ in seqs]
        logits = torch.tensor(rows, dtype=torch.float32)  # [R, V]
        before = logits.clone()
        samples = sampler.sample(logits, seqs)
        assert torch.equal(logits, before)
        for seq, row, sample in zip(seqs, rows, samples, strict=True):
            note = f"seed {seed}, step {step}, {seq.request.params}"
            if max(slow_edited(row, seq)) == -math.inf:
                assert sample.error == NOTHING_ALLOWED, note
                seq.tokens.append(0)
                continue
            assert sample.token == slow_token(row, seq), note
            wanted = seq.request.params.logprobs
            assert (sample.logprobs is None) == (wanted is None), note
            if sample.logprobs is not None:
                raw = torch.log_softmax(torch.tensor(row, dtype=torch.float64), 0).tolist()
                order = sorted(range(VOCAB), key=lambda i: (-raw[i], i))
                assert sample.logprobs.rank == order.index(sample.token) + 1, note
                assert [token for token, _ in sample.logprobs.top] == order[: wanted or 0], note
                assert sample.logprobs.logprob == pytest.approx(raw[sample.token], rel=1e-5)
            seq.tokens.append(sample.token)


@pytest.mark.parametrize("seed", range(5))
def test_a_row_is_the_same_in_any_company(seed: int) -> None:
    rng = random.Random(seed)
    seqs = [random_seq(rng, str(i)) for i in range(16)]
    logits = torch.tensor([random_row(rng, VOCAB) for _ in seqs], dtype=torch.float32)
    whole = sampler_of().sample(logits, seqs)
    shared = sampler_of()
    for _ in range(6):
        rows = rng.sample(range(len(seqs)), rng.randrange(1, len(seqs)))
        part = shared.sample(logits[rows], [seqs[r] for r in rows])
        assert part == [whole[r] for r in rows], f"seed {seed}"


def test_counts_follow_the_tokens_not_the_calls() -> None:
    """An attempt that starts over with the same name, or sits out steps, is counted anew."""
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, min_tokens=0)
    sampler = sampler_of(4)
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    first = seq_of(params, [0], [1])
    assert sampler.sample(logits, [first])[0].token == 2
    again = seq_of(params, [0], [2])
    assert sampler.sample(logits, [again])[0].token == 1
    first.tokens += [1, 2, 2]
    assert sampler.sample(logits, [first])[0].token == 3


def test_the_kept_edits_are_bounded() -> None:
    sampler = sampler_of(4)
    params = SamplingParams(temperature=0.0, logit_bias={2: 9.0})
    logits = torch.zeros(1, 4)
    for i in range(EDITS_KEPT_MAX + 10):
        assert sampler.sample(logits, [seq_of(params, name=str(i))])[0].token == 2


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 5}],
)
def test_frequencies(options: dict[str, float]) -> None:
    """Chi-square of 20,000 draws at one seed against the exact distribution."""
    rng = random.Random(11)
    row = [rng.gauss(0, 1.5) for _ in range(12)]
    params = SamplingParams(seed=99, **options)  # type: ignore[arg-type]  # by name
    count = 20_000
    seqs = [seq_of(params) for _ in range(count)]
    for i, seq in enumerate(seqs):
        seq.tokens = range(i + 1)  # type: ignore[assignment]  # only its length is looked at
    logits = torch.tensor([row], dtype=torch.float32).expand(count, -1)
    drawn = Counter(sample.token for sample in sampler_of(12).sample(logits, seqs))
    kept = slow_kept([float(np.float32(x)) for x in row], params)
    assert set(drawn) <= set(kept)
    whole = sum(kept.values())
    expected = {token: count * weight / whole for token, weight in kept.items()}
    chi = sum((drawn[token] - wanted) ** 2 / wanted for token, wanted in expected.items())
    # Mean + 4.5 standard deviations of a chi-square with len - 1 degrees of freedom.
    degrees = len(kept) - 1
    assert chi < degrees + 4.5 * math.sqrt(2 * degrees) + 1e-9, (options, drawn, expected)


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.tensor(
        [[0.0, math.nan, 1.0], [0.0, 1.0, 2.0], [0.0, math.inf, 1.0], [-math.inf] * 3]
    )
    for params in (SamplingParams(temperature=0.0), SamplingParams(seed=1, top_k=1)):
        samples = sampler_of(3).sample(logits, [seq_of(params) for _ in range(4)])
        assert [sample.error for sample in samples] == [NOT_FINITE, None, NOT_FINITE, NOT_FINITE]
        assert samples[1].token == 2


def test_greedy_ties_go_to_the_lower_id_on_both_paths() -> None:
    row = [0.0, 2.0, 2.0, 1.0]
    plain = one(row, seq_of(SamplingParams(temperature=0.0, logprobs=0)))
    edited = one(row, seq_of(SamplingParams(temperature=0.0, logprobs=0, logit_bias={3: -1.0})))
    assert plain == edited
    assert plain.token == 1


def test_bad_words_look_at_emitted_tokens_only() -> None:
    params = SamplingParams(temperature=0.0, bad_word_ids=[[3, 4, 1]])
    row = [0.0, 9.0, 8.0, 1.0, 0.0]
    for prompt, emitted, token in (
        ([3, 4], [], 1),
        ([3], [4], 1),
        ([0], [3, 4], 2),
        ([0], [3, 4, 4], 1),
    ):
        assert one(row, seq_of(params, prompt, emitted)).token == token


def test_min_tokens_masks_eos_and_stops_until_reached() -> None:
    row = [0.0, 9.0, 8.0, 1.0]
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[2], ignore_eos=False)
    for emitted, token in (([], 3), ([3], 3), ([3, 3], 1)):
        assert one(row, seq_of(params, [0], emitted)).token == token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_that_stays_is_looked_at_again_as_it_grows(temperature: float) -> None:
    row = [0.0, 9.0, 8.0, 1.0]
    late = SamplingParams(temperature=temperature, min_tokens=2, seed=4)
    seqs = [seq_of(SamplingParams(temperature=0.0), [0]), seq_of(late, [0])]
    logits, sampler = torch.tensor([row, row]), sampler_of(4)
    for emitted in range(4):
        assert sampler.takes_best(seqs) == (emitted >= 2 and temperature == 0.0)
        samples = sampler.sample(logits, seqs)
        assert samples == sampler_of(4).sample(logits, list(seqs))
        assert (samples[1].token == 1) <= (emitted >= 2)
        for seq, sample in zip(seqs, samples, strict=True):
            seq.tokens.append(sample.token)
    assert 1 in seqs[1].tokens[3:]
    seqs = [*seqs, seq_of(SamplingParams(temperature=0.0, logprobs=0), [0])]
    assert not sampler.takes_best(seqs)
    assert sampler.takes_best(seqs[:1])


def test_extreme_parameters_still_give_a_token() -> None:
    row = [1e38, -1e38, 3.0, -math.inf]
    for params in (
        SamplingParams(temperature=1e-300, seed=0),
        SamplingParams(temperature=100.0, seed=0),
        SamplingParams(temperature=1.0, seed=0, repetition_penalty=1e-300),
        SamplingParams(temperature=1.0, seed=0, top_p=1e-300, top_k=1, min_p=1.0),
        SamplingParams(temperature=0.0, repetition_penalty=100.0, frequency_penalty=-2.0),
    ):
        sample = one(row, seq_of(params, [0, 1, 2, 3], [0, 1, 2, 3]))
        assert sample.error is None
        assert sample.token in (0, 2)


def test_choices_and_positions_differ_and_repeat() -> None:
    params = SamplingParams(seed=5)
    row = [0.0] * VOCAB

    def token(choice: int, position: int) -> int:
        return one(row, seq_of(params, [3], [0] * position, choice=choice)).token

    answers = [[token(choice, position) for position in range(20)] for choice in range(3)]
    assert answers[0] != answers[1] != answers[2]
    assert answers == [[token(c, p) for p in range(20)] for c in range(3)]


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.9999])
def test_top_p_of_a_large_flat_vocabulary(top_p: float) -> None:
    """More tokens are kept than the first look at the best ones covers."""
    rng = random.Random(3)
    vocab = 5000
    row = [round(rng.gauss(0, 0.5), 2) for _ in range(vocab)]
    values = [float(np.float32(x)) for x in row]
    for position in range(8):
        seq = seq_of(SamplingParams(seed=1, top_p=top_p), [3], [0] * position)
        assert one(row, seq).token == slow_token(values, seq)
