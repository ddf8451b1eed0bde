"""Generation over a fake engine: stops, cuts, logprobs, and the rules of length."""

import asyncio

import pytest

from diptych.engine.core.errors import InvalidRequestError, OverloadedError
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.types import FinishReason
from diptych.server.text.generation import OutputDelta, generate
from diptych.server.text.prepare import merge_defaults, prepare_params
from diptych.server.text.tokenizer import Tokenizer
from tests.support.fake_client import FakeClient
from tests.support.tokenizers_small import write_byte_level

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("t")))


def answering(tokenizer: Tokenizer, text: str, *, chunk: int = 1) -> FakeClient:
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS]
    return FakeClient(
        lambda prompt, params, choice: ids,
        vocab_size=tokenizer.vocab_size,
        eos=EOS,
        chunk=chunk,
    )


def collect(
    client: FakeClient, tokenizer: Tokenizer, params: SamplingParams
) -> list[list[OutputDelta]]:
    async def run() -> list[list[OutputDelta]]:
        prepared = prepare_params(params, [5, 6], tokenizer=tokenizer, info=client.info)
        per_choice: list[list[OutputDelta]] = [[] for _ in range(params.n)]
        stream = generate(client, tokenizer, "r", prepared.prompt_ids, prepared.params)
        async for delta in stream:
            per_choice[delta.choice].append(delta)
        return per_choice

    return asyncio.run(run())


def text_of(deltas: list[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[OutputDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_cuts_text_ids_and_logprobs(
    tokenizer: Tokenizer, chunk: int, include: bool
) -> None:
    client = answering(tokenizer, "hello world, the value", chunk=chunk)
    params = SamplingParams(
        max_tokens=None, stop=["ld, t"], include_stop_str_in_output=include, logprobs=1
    )
    (deltas,) = collect(client, tokenizer, params)
    assert text_of(deltas) == ("hello world, t" if include else "hello wor")
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == "ld, t"
    kept = ids_of(deltas)
    full = tokenizer.encode("hello world, the value", add_special_tokens=False)
    assert kept == full[: len(kept)]
    assert "ld, t" in tokenizer.decode(kept)
    assert "ld, t" not in tokenizer.decode(kept[:-1])
    assert sum(len(delta.logprobs or []) for delta in deltas) == len(kept)


def test_engine_is_told_once_and_the_request_ends(tokenizer: Tokenizer) -> None:
    client = answering(tokenizer, "hello world")
    collect(client, tokenizer, SamplingParams(max_tokens=None, stop=["wor"], n=2))
    assert client.stopped == [("r", 0), ("r", 1)]
    assert client.ended + client.aborted == ["r"]


def test_held_text_comes_with_the_end(tokenizer: Tokenizer) -> None:
    client = answering(tokenizer, "hello worl")
    (deltas,) = collect(client, tokenizer, SamplingParams(max_tokens=None, stop=["world"]))
    assert text_of(deltas) == "hello worl"
    assert client.stopped == []


def test_stop_tokens_are_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    for include, expected in ((False, ids[:-1]), (True, ids)):
        client = answering(tokenizer, "hello world")
        params = SamplingParams(
            max_tokens=None, stop_token_ids=[ids[-1]], include_stop_str_in_output=include
        )
        (deltas,) = collect(client, tokenizer, params)
        assert text_of(deltas) == tokenizer.decode(expected)
        assert ids_of(deltas) == ids
        assert deltas[-1].stop_reason == ids[-1]


def test_min_tokens_silences_stop_strings(tokenizer: Tokenizer) -> None:
    text = "x" * 6
    client = answering(tokenizer, text)
    params = SamplingParams(max_tokens=None, stop=["x"], min_tokens=3)
    (deltas,) = collect(client, tokenizer, params)
    assert text_of(deltas) == "xxx"
    assert len(ids_of(deltas)) == 4


def test_without_detokenizing(tokenizer: Tokenizer) -> None:
    client = answering(tokenizer, "hello")
    (deltas,) = collect(client, tokenizer, SamplingParams(max_tokens=None, detokenize=False))
    assert text_of(deltas) == ""
    assert ids_of(deltas)[-1] == EOS


def test_closing_early_aborts(tokenizer: Tokenizer) -> None:
    client = answering(tokenizer, "hello world")

    async def run() -> None:
        stream = generate(client, tokenizer, "r", [5], SamplingParams(max_tokens=9))
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert client.aborted == ["r"]


def test_a_refusal_comes_before_the_first_delta(tokenizer: Tokenizer) -> None:
    client = answering(tokenizer, "hello")
    client.refuse = OverloadedError("full", retry_after_s=2)
    with pytest.raises(OverloadedError):
        collect(client, tokenizer, SamplingParams())


def test_logprob_strings(tokenizer: Tokenizer) -> None:
    client = answering(tokenizer, "é")
    params = SamplingParams(max_tokens=None, logprobs=2, prompt_logprobs=0)
    (deltas,) = collect(client, tokenizer, params)
    chosen = [entry.chosen for delta in deltas for entry in delta.logprobs or []]
    assert b"".join(candidate.bytes for candidate in chosen[:-1]) == "é".encode()
    assert chosen[-1].text == "<|end|>"
    assert [candidate.rank for candidate in (deltas[0].logprobs or [])[0].top] == [1, 2]
    assert len(deltas[0].prompt_logprobs or []) == 1


def test_defaults_of_the_model() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "eos_token_id": 3}
    merged = merge_defaults({"top_k": 5, "max_tokens": None}, defaults)
    assert (merged.temperature, merged.top_k, merged.max_tokens) == (0.6, 5, None)
    with pytest.raises(InvalidRequestError, match="temperature"):
        merge_defaults({"temperature": "hot"}, {})


def test_lengths(tokenizer: Tokenizer) -> None:
    info = answering(tokenizer, "x").info

    def prepare(ids: list[int], clip: bool = False, **fields: object) -> tuple[int, int]:
        prepared = prepare_params(
            merge_defaults(fields, {}), ids, tokenizer=tokenizer, info=info, clip_max_tokens=clip
        )
        assert prepared.params.max_tokens is not None
        return len(prepared.prompt_ids), prepared.params.max_tokens

    assert prepare([5] * 28, max_tokens=None) == (28, 100)
    assert prepare([5] * 28, max_tokens=100) == (28, 100)
    assert prepare([5] * 120, clip=True, max_tokens=16) == (120, 8)
    assert prepare([5] * 500, max_tokens=8, truncate_prompt_tokens=100) == (100, 8)
    with pytest.raises(InvalidRequestError, match=r"128 tokens.*129 tokens \(28.*at most 100"):
        prepare([5] * 28, max_tokens=101)
    with pytest.raises(InvalidRequestError, match="128 tokens, and your prompt has 128"):
        prepare([5] * 128, max_tokens=1)
    with pytest.raises(InvalidRequestError, match="empty"):
        prepare([], max_tokens=1)
    with pytest.raises(InvalidRequestError, match="token id 99999"):
        prepare([99999], max_tokens=1)
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        prepare([5] * 100, max_tokens=None, min_tokens=50)


def test_bad_words(tokenizer: Tokenizer) -> None:
    info = answering(tokenizer, "x").info
    prepared = prepare_params(
        SamplingParams(bad_words=["hello"]), [5], tokenizer=tokenizer, info=info
    )
    decoded = {tokenizer.decode(ids) for ids in prepared.params.bad_word_ids}
    assert decoded == {"hello", " hello"}
