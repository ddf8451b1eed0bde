"""Chat completions: exact bytes of streams, whole answers, every addition that is promised."""

import json
import re

from diptych.engine.core.errors import (
    EngineDeadError,
    OverloadedError,
    PoisonRequestError,
    RequestTimeoutError,
)
from tests.unit.server.http.conftest import MakeSite, Site

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def events(text: str) -> list[str]:
    assert text.endswith("\n\n")
    parts = text[:-2].split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def stream(site: Site, **fields: object) -> list[dict]:  # type: ignore[type-arg]
    response = site.http.post(CHAT, json={"messages": HELLO, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def ask(site: Site, **fields: object) -> dict:  # type: ignore[type-arg]
    response = site.http.post(CHAT, json={"messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def test_stream_byte_for_byte(site: Site) -> None:
    body = {
        "messages": HELLO,
        "model": "alias",
        "stream": True,
        "request_id": "r-1",
        "stream_options": {"include_usage": True},
    }
    response = site.http.post(CHAT, json=body)
    text = re.sub(r'"created":\d+', '"created":0', response.text)
    print_ = re.search(r'"system_fingerprint":"(fp_[0-9a-f]{12})"', text)
    assert print_ is not None
    head = (
        'data: {"id":"chatcmpl-r-1","object":"chat.completion.chunk","created":0,"model":"alias",'
        '"choices":['
    )
    tail = f'],"system_fingerprint":"{print_[1]}","usage":'
    null = '"logprobs":null,"finish_reason":null}'

    def chunk(choice: str, usage: str = "null") -> str:
        return f"{head}{choice}{tail}{usage}}}\n\n"

    usage = (
        '{"prompt_tokens":4,"completion_tokens":3,"total_tokens":7,'
        '"prompt_tokens_details":{"cached_tokens":0}}'
    )
    assert text == (
        chunk('{"index":0,"delta":{"role":"assistant","content":""},' + null)
        + chunk('{"index":0,"delta":{"content":"hello"},' + null)
        + chunk('{"index":0,"delta":{"content":" world"},' + null)
        + chunk('{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}')
        + chunk("", usage)
        + "data: [DONE]\n\n"
    )
    assert response.headers["x-request-id"] == "r-1"
    assert response.headers["cache-control"] == "no-cache"


def test_whole_answer(site: Site) -> None:
    site.engine.num_cached = 3
    answer = ask(site, model="tiny")
    assert re.fullmatch(r"chatcmpl-0-\d+-[0-9a-f]{8}", answer["id"])
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert "prompt_token_ids" not in answer


def test_prompt_is_the_template_without_a_second_bos(site: Site) -> None:
    ask(site)
    _, prompt, params, _ = site.engine.calls[0]
    text = site.tokenizer.decode(prompt, skip_special_tokens=False)
    assert text == "<|user|>hello<|end|><|assistant|>"
    assert params.max_tokens == 128 - len(prompt)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask(site, messages=[{"role": "user", "content": parts}], add_generation_prompt=False)
    assert site.tokenizer.decode(site.engine.calls[1][1], skip_special_tokens=False) == (
        "<|user|>a\nb<|end|>"
    )
    more = [*HELLO, {"role": "assistant", "content": "so"}]
    ask(site, messages=more, continue_final_message=True)
    text = site.tokenizer.decode(site.engine.calls[2][1], skip_special_tokens=False)
    assert text == "<|user|>hello<|end|><|assistant|>so"


def test_choices_and_usage(site: Site) -> None:
    answer = ask(site, n=3, max_completion_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 3
    chunks = stream(site, n=3)
    roles = [chunk["choices"][0]["index"] for chunk in chunks[:3]]
    assert roles == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["hello world"] * 3


def test_logprobs(site: Site) -> None:
    content = ask(site, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["hello", " world", "<|end|>"]
    assert content[0]["bytes"] == list(b"hello")
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
    streamed = [
        entry
        for chunk in stream(site, logprobs=True, top_logprobs=2)
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    as_ids = ask(site, logprobs=True, return_tokens_as_token_ids=True)
    assert as_ids["choices"][0]["logprobs"]["content"][2]["token"] == "token_id:1"


def test_token_ids_and_prompt_logprobs(site: Site) -> None:
    answer = ask(site, return_token_ids=True, prompt_logprobs=1)
    prompt = site.engine.calls[0][1]
    ids = [*site.tokenizer.encode("hello world", add_special_tokens=False), 1]
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == ids
    assert answer["prompt_logprobs"][0] is None
    entry = answer["prompt_logprobs"][1][str(prompt[1])]
    assert entry == {
        "logprob": -0.5,
        "rank": 1,
        "decoded_token": site.tokenizer.pieces.text(prompt[1]),
    }
    chunks = stream(site, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == prompt
    streamed = [
        token
        for chunk in chunks
        for choice in chunk["choices"]
        for token in choice.get("token_ids", [])
    ]
    assert streamed == ids


def test_continuous_usage(site: Site) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream(site, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert all("usage" not in chunk for chunk in stream(site))


def test_stop_string(site: Site) -> None:
    answer = ask(site, stop="wor")
    assert answer["choices"][0]["message"]["content"] == "hello "
    assert answer["choices"][0]["stop_reason"] == "wor"
    assert answer["usage"]["completion_tokens"] == 2
    last = stream(site, stop=["wor"])[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "wor")


def test_parameters_reach_the_engine(make_site: MakeSite) -> None:
    site = make_site(sampling_defaults={"temperature": 0.6, "top_k": 7}, timeout_s=50.0)
    ask(
        site,
        top_k=3,
        seed=-4,
        min_tokens=1,
        stop_token_ids=[9],
        logit_bias={"5": -100},
        allowed_token_ids=[4, 5],
        priority=-2,
        cache_salt="s",
        timeout_s=2.5,
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        temperature=None,
    )
    _, _, params, extra = site.engine.calls[0]
    assert (params.temperature, params.top_k, params.seed, params.min_tokens) == (0.6, 3, -4, 1)
    assert params.logit_bias == {5: -100.0}
    assert params.allowed_token_ids == [4, 5]
    assert extra == {"priority": -2, "cache_salt": "s", "timeout_s": 2.5}
    site.http.post(CHAT, json={"messages": HELLO}, headers={"X-Request-Timeout": "3"})
    ask(site)
    assert [call[3]["timeout_s"] for call in site.engine.calls[1:]] == [3.0, 50.0]
    assert "diptych:unknown_fields_total{" not in site.http.get("/metrics").text


def test_unknown_fields_are_ignored_and_counted(site: Site) -> None:
    ask(site, top_kk=3, kv_transfer_params={"host": "x"})
    metrics = site.http.get("/metrics").text
    assert 'diptych:unknown_fields_total{field="top_kk"} 1.0' in metrics
    assert 'diptych:unknown_fields_total{field="kv_transfer_params"} 1.0' in metrics
    for number in range(100):
        ask(site, **{f"field{number}": 1})
    metrics = site.http.get("/metrics").text
    assert metrics.count("diptych:unknown_fields_total{") <= 33
    assert 'diptych:unknown_fields_total{field="other"}' in metrics


def test_refusals_of_the_engine_are_http_errors(site: Site) -> None:
    for error, status, code in (
        (OverloadedError("full", retry_after_s=2.2), 429, "server_overloaded"),
        (EngineDeadError("gone"), 503, "engine_unavailable"),
        (RequestTimeoutError("late"), 408, "deadline_exceeded"),
        (PoisonRequestError("it crashed"), 500, "request_failed"),
    ):
        site.engine.refuse = error
        for streaming in (False, True):
            response = site.http.post(CHAT, json={"messages": HELLO, "stream": streaming})
            assert response.status_code == status
            assert response.json()["error"]["code"] == code
            assert response.headers.get("retry-after") == ("3" if status == 429 else None)
            again = "false" if status in (408, 500) else None  # it would fail again
            assert response.headers.get("x-should-retry") == again
    assert site.http.get("/load").json() == {"server_load": 0}


def test_overload_can_be_503(make_site: MakeSite) -> None:
    site = make_site(overload_status=503)
    site.engine.refuse = OverloadedError("full", retry_after_s=2.2)
    response = site.http.post(CHAT, json={"messages": HELLO})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "server_overloaded"


def test_whole_numbers_may_be_written_as_floats(site: Site) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2.0, "seed": 1e2}'
    response = site.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.json()["usage"]["completion_tokens"] == 2
    assert site.engine.calls[0][2].seed == 100


def test_an_error_after_the_start_is_an_event_without_done(site: Site) -> None:
    site.engine.fail_after = (1, RequestTimeoutError("The deadline passed."))
    response = site.http.post(CHAT, json={"messages": HELLO, "stream": True})
    assert response.status_code == 200
    last = json.loads(events(response.text)[-1])
    assert last == {
        "error": {
            "message": "The deadline passed.",
            "type": "timeout_error",
            "param": None,
            "code": "deadline_exceeded",
        }
    }
    assert site.http.post(CHAT, json={"messages": HELLO}).status_code == 408


def test_text_that_waits_is_not_lost(make_site: MakeSite) -> None:
    for text in ("é🙂 数字 wor", "hello <|en"):
        site = make_site(text)
        chunks = stream(site, stop=["world", "<|end"])
        shown = [c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]]
        assert "".join(shown) == text
        assert not any("\ufffd" in part for part in shown)
