"""The Python front door: inline and with processes, the same answers, everything ends with it."""

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.models import write_model
from bench.procs import descendants
from diptych import Engine, SamplingParams
from diptych.engine.core.errors import ConfigError, DiptychError, InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=3, n=2, max_tokens=16, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), "tiny")


@pytest.fixture(scope="module", params=["inline", "processes"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with Engine(folder, inline=request.param == "inline", load_format="dummy", threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, object]:
    """What one request at a time gives in a fresh inline engine."""
    with Engine(folder, inline=True, load_format="dummy", threads=1) as fresh:
        return {
            "greedy": [fresh.generate(text, GREEDY)[0].outputs for text in ("abc", "hello there")],
            "seeded": fresh.generate("xyz", SEEDED)[0].outputs,
        }


def test_answers_do_not_depend_on_the_kind_of_engine(
    engine: Engine, expected: dict[str, object]
) -> None:
    outputs = engine.generate(["abc", "hello there"], GREEDY, progress=False)
    assert [output.outputs for output in outputs] == expected["greedy"]
    assert engine.generate("xyz", SEEDED)[0].outputs == expected["seeded"]


def test_generate_keeps_the_order_of_many_prompts(engine: Engine) -> None:
    rng = random.Random(1)
    prompts = [rng.choices(range(256), k=rng.randrange(1, 80)) for _ in range(40)]
    each = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 9)) for _ in prompts]
    outputs = engine.generate(prompts, each, progress=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    alone = engine.generate(prompts[7], each[7])[0]
    assert outputs[7].outputs == alone.outputs


def test_stream_pieces_add_up(engine: Engine) -> None:
    whole = engine.generate("stream me", GREEDY)[0].outputs[0]
    pieces = list(engine.stream("stream me", GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert pieces[-1].finish_reason == "length"


def test_async_iteration_and_leaving_early(engine: Engine) -> None:
    async def first_two() -> list[int]:
        tokens: list[int] = []
        stream = engine.stream_async("abc", GREEDY)
        async for piece in stream:
            tokens += piece.token_ids
            if len(tokens) >= 2:
                break
        await stream.aclose()
        return tokens

    tokens = asyncio.run(first_two())
    assert tokens[:2] == engine.generate("abc", GREEDY)[0].outputs[0].token_ids[:2]


def test_chat_uses_the_template(engine: Engine) -> None:
    output = engine.chat([{"role": "user", "content": "hi"}], GREEDY)
    text = "user: hi\nassistant: "
    assert output.prompt_token_ids == engine.tokenizer.encode(text, add_special_tokens=False)
    assert output.text == engine.generate([output.prompt_token_ids], GREEDY)[0].text


def test_bad_input_names_the_parameter_and_harms_nothing(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        engine.generate("a", SamplingParams(temperature=-1))
    with pytest.raises(InvalidRequestError, match="maximum context length"):
        engine.generate([[1] * 5000], GREEDY)
    with pytest.raises(InvalidRequestError, match="prompt"):
        engine.generate("", GREEDY)
    with pytest.raises(InvalidRequestError, match="2 prompts but 1"):
        engine.generate(["a", "b"], [GREEDY])
    assert engine.generate("abc", GREEDY)[0].outputs[0].finish_reason == "length"


def test_one_bad_prompt_of_many_ends_the_call_and_leaves_nothing(engine: Engine) -> None:
    with pytest.raises(DiptychError):
        engine.generate(["a" * 50, [10**6], "b" * 50], GREEDY, progress=False)
    assert len(engine.generate(["a", "b"], GREEDY, progress=False)) == 2


def test_close_ends_every_process(folder: Path) -> None:
    before = set(descendants(os.getpid()))
    engine = Engine(folder, load_format="dummy", threads=1)
    assert len(set(descendants(os.getpid())) - before) >= 4
    engine.close()
    engine.close()
    assert set(descendants(os.getpid())) - before == set()
    with pytest.raises(DiptychError, match="closed"):
        engine.generate("a")


def test_int8_kv(folder: Path) -> None:
    """More blocks in the same memory, under a name of its own, and equal answers inline and not."""
    memory = 1 << 20
    answers, infos = [], []
    for inline, dtype in ((True, "auto"), (True, "int8"), (False, "int8")):
        with Engine(
            folder,
            inline=inline,
            load_format="dummy",
            threads=1,
            kv_cache_dtype=dtype,
            kv_cache_memory_bytes=memory,
        ) as engine:
            infos.append(engine.info)
            answers.append(engine.generate(["abc", "xyz"], SEEDED, progress=False))
    model, inline, processes = infos
    assert inline.num_blocks == processes.num_blocks > 1.5 * model.num_blocks  # heads of 16
    assert inline.fingerprint == processes.fingerprint == f"{model.fingerprint} kv int8"
    assert [output.outputs for output in answers[1]] == [output.outputs for output in answers[2]]


def test_impossible_options_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="prefill"):
        Engine(folder, prefill=0, decode=1)
    with pytest.raises(DiptychError, match="no such folder"):
        Engine("./does-not-exist", inline=True)


def test_pools_of_other_kinds(folder: Path, expected: dict[str, object]) -> None:
    with Engine(
        folder,
        load_format="dummy",
        threads=1,
        separate_pools=True,
        prefill_block_size=32,
        decode_block_size=16,
        decode_kv_cache_dtype="auto",
        prefill_core_share=70,
        hang_timeout_s=5.0,
    ) as engine:
        outputs = engine.generate(["abc", "hello there"], GREEDY, progress=False)
        assert [output.outputs for output in outputs] == expected["greedy"]
        assert engine.generate("xyz", SEEDED)[0].outputs == expected["seeded"]
        stats = engine.stats()
        assert stats is not None
        assert len(stats.pools) == 2
    with pytest.raises(ConfigError, match="--separate-pools"):
        Engine(folder, load_format="dummy", prefill_block_size=32)
    with pytest.raises(TypeError, match="block_sise"):
        Engine(folder, block_sise=32)  # type: ignore[call-arg]
