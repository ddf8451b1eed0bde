"""Every bad input gets the right 4xx, an OpenAI error object, and words that say what to do."""

import json

import pytest

from tests.unit.server.http.conftest import MakeSite, Site

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def check_error(response, status: int, words: str, param: str | None = None) -> None:  # type: ignore[no-untyped-def]
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words.lower() in error["message"].lower(), error["message"]
    assert error["param"] == param, error
    assert "x-request-id" in response.headers


RAW = [
    (b'{"messages": [', "not valid JSON"),
    (b'{"messages": "\xff"}', "UTF-8"),
    (b"", "empty"),
    (b"[1, 2]", "JSON object"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN"),
    (b'{"prompt": "x", "temperature": Infinity}', "Infinity"),
    (b'{"prompt": "x", "temperature": 1e999}', "out of range"),
    (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    (rb'{"prompt": "cut in two: \ud83d"}', "half a character"),
    (rb'{"prompt": "\udc00 alone"}', "half a character"),
]


@pytest.mark.parametrize(("body", "words"), RAW)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json(site: Site, path: str, body: bytes, words: str) -> None:
    response = site.http.post(path, content=body, headers={"Content-Type": "application/json"})
    check_error(response, 400, words)


BOTH = [
    ({"n": 10**9}, "n must be an integer between 1 and 128", "n"),
    ({"n": 0}, "between 1 and 128", "n"),
    ({"n": 1.5}, "expected integer, got number", "n"),
    ({"n": True}, "expected integer, got boolean", "n"),
    ({"temperature": -0.1}, "[0, 100], got -0.1", "temperature"),
    ({"temperature": "hot"}, "expected number, got string", "temperature"),
    ({"top_p": 0}, "top_p must be a finite number in (0, 1]", "top_p"),
    ({"top_p": 1.01}, "(0, 1]", "top_p"),
    ({"top_k": -2}, "top_k", "top_k"),
    ({"min_p": 2}, "min_p", "min_p"),
    ({"frequency_penalty": 3}, "frequency_penalty", "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty", "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "at most 1024 entries", "logit_bias"),
    ({"logit_bias": {"5": 1e30}}, "[-100, 100]", "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "token ids in [0,", "logit_bias"),
    ({"logit_bias": {"x": 1}}, "expected integer, got string", "logit_bias"),
    ({"allowed_token_ids": []}, "at least one", "allowed_token_ids"),
    ({"stop": ["x"] * 17}, "at most 16", "stop"),
    ({"stop": [""]}, "1 to 1024 characters", "stop"),
    ({"stop": "x", "detokenize": False}, "detokenize", "stop"),
    ({"stop_token_ids": [-1]}, "token ids in", "stop_token_ids"),
    ({"max_tokens": -5}, "max_tokens", "max_tokens"),
    ({"max_tokens": 10_000}, "Lower max_tokens to at most", "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 2}, "at most max_tokens", "min_tokens"),
    ({"seed": 2**80}, "seed", "seed"),
    ({"prompt_logprobs": 21}, "between 0 and 20", "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "not available with stream", "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream=true", "stream_options"),
    ({"stream": "yes"}, "expected boolean", "stream"),
    ({"priority": 2**40}, "32-bit", "priority"),
    ({"cache_salt": "x" * 300}, "256", "cache_salt"),
    ({"timeout_s": 0}, "seconds", "timeout_s"),
    ({"request_id": "a b\n"}, "request_id", "request_id"),
    ({"truncate_prompt_tokens": -7}, "truncate_prompt_tokens", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, "invalid enum value", "truncation_side"),
    ({"bad_words": [""]}, "non-empty", "bad_words"),
    ({"tools": [{"type": "function"}]}, "Remove this field", "tools"),
    ({"response_format": {"type": "json_object"}}, "structured output", "response_format"),
    ({"structured_outputs": {"regex": "a"}}, "structured output", "structured_outputs"),
    ({"guided_json": {}, "guided_regex": "a"}, "structured output", "guided_regex"),
    ({"use_beam_search": True}, "beam search", "use_beam_search"),
    ({"best_of": 3}, "use n", "best_of"),
    ({"suffix": "end"}, "insertion", "suffix"),
    ({"chat_template": "{{ 1 }}"}, "not accepted", "chat_template"),
]


@pytest.mark.parametrize(("fields", "words", "param"), BOTH)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_parameters(
    site: Site, fields: dict[str, object], words: str, param: str, stream: bool
) -> None:
    if stream and ("stream_options" in fields or "prompt_logprobs" in fields):
        return  # there the words are others
    for path, base in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "hello"})):
        body = {**base, "stream": stream, **fields}
        check_error(site.http.post(path, json=body), 400, words, param)
    assert site.engine.calls == []


CHAT_ONLY = [
    ({"messages": []}, "messages is empty", "messages"),
    ({}, "messages is required", "messages"),
    ({"messages": "hi"}, "expected array, got string", "messages"),
    ({"messages": [{"content": "x"}]}, "role is required", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "content is missing", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "got integer", "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "Unknown role robot", "messages"),
    ({"messages": [{"role": "", "content": "x"}]}, "role must be", "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "'image_url' are not supported",
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "tool calls",
        "messages[0]",
    ),
    ({"messages": HELLO, "top_logprobs": 2}, "needs logprobs=true", "top_logprobs"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "0 and 20", "top_logprobs"),
    ({"messages": HELLO, "logprobs": 3}, "expected boolean", "logprobs"),
    ({"messages": HELLO, "continue_final_message": True}, "role assistant", "messages"),
    ({"messages": HELLO, "chat_template_kwargs": {"x": [1]}}, "'x'", "chat_template_kwargs"),
    ({"messages": HELLO, "chat_template_kwargs": {"tools": 1}}, "tools", "chat_template_kwargs"),
    ({"messages": HELLO, "max_completion_tokens": 0}, "max_tokens", "max_tokens"),
    ({"messages": [{"role": "user", "content": "数" * 500}]}, "your prompt has", "prompt"),
]


@pytest.mark.parametrize(("body", "words", "param"), CHAT_ONLY)
def test_bad_chats(site: Site, body: dict[str, object], words: str, param: str) -> None:
    check_error(site.http.post(CHAT, json=body), 400, words, param)
    assert site.engine.calls == []


TEXT_ONLY = [
    ({}, "prompt is required", "prompt"),
    ({"prompt": []}, "empty list", "prompt"),
    ({"prompt": "", "add_special_tokens": False}, "prompt is empty", "prompt"),
    ({"prompt": [[]]}, "prompt is empty", "prompt"),
    ({"prompt": ["a", 5]}, "mixture", "prompt"),
    ({"prompt": [5, 99_999]}, "token id 99999", "prompt"),
    ({"prompt": [-1]}, "token id -1", "prompt"),
    ({"prompt": ["a"] * 300}, "more than 256", "prompt"),
    ({"prompt": [5] * 200}, "maximum context length is 128", "prompt"),
    ({"prompt": "x", "logprobs": 21}, "between 0 and 20", "logprobs"),
    ({"prompt": "x", "logprobs": -1}, "between 0 and 20", "logprobs"),
    ({"prompt": "x", "max_tokens": 0}, "at least 1", "max_tokens"),
    (
        {"prompt": "x", "echo": True, "logprobs": 1, "n": 2, "stream": True},
        "not available with stream",
        "echo",
    ),
]


@pytest.mark.parametrize(("body", "words", "param"), TEXT_ONLY)
def test_bad_prompts(site: Site, body: dict[str, object], words: str, param: str) -> None:
    check_error(site.http.post(TEXT, json=body), 400, words, param)
    assert site.engine.calls == []


def test_hopeless_prompts_are_refused_before_tokenizing(site: Site) -> None:
    response = site.http.post(TEXT, json={"prompt": "x" * 5_000_000})
    check_error(response, 400, "your prompt has at least", "prompt")
    fits = {"prompt": "x" * 50_000, "truncate_prompt_tokens": 9}
    assert site.http.post(TEXT, json=fits).json()["usage"]["prompt_tokens"] == 9


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_large_bodies(site: Site, path: str) -> None:
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    headers = {"Content-Type": "application/json"}
    check_error(site.http.post(path, content=body, headers=headers), 413, "larger than 8388608")

    def parts():  # type: ignore[no-untyped-def]
        for start in range(0, len(body), 1_000_000):
            yield body[start : start + 1_000_000]

    check_error(site.http.post(path, content=parts(), headers=headers), 413, "larger than")


def test_unknown_model_and_urls(site: Site) -> None:
    for path, base in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"})):
        response = site.http.post(path, json={**base, "model": "gpt-9"})
        check_error(response, 404, "This server has: tiny, alias", "model")
        assert response.json()["error"]["code"] == "model_not_found"
    check_error(site.http.get("/v1/nothing"), 404, "Unknown request URL: GET /v1/nothing")
    check_error(site.http.get("/v1/models/gpt-9"), 404, "does not exist", "model")
    response = site.http.get(CHAT)
    check_error(response, 405, "use POST")
    assert response.headers["allow"] == "POST"


def test_content_type(site: Site) -> None:
    response = site.http.post(CHAT, data={"messages": "x"})
    check_error(response, 415, "Content-Type: application/json")


def test_bad_timeout_header(site: Site) -> None:
    for value in ("soon", "nan", "-1"):
        response = site.http.post(TEXT, json={"prompt": "x"}, headers={"X-Request-Timeout": value})
        check_error(response, 400, "seconds", "timeout_s")


def test_bad_token_routes(site: Site) -> None:
    check_error(site.http.post("/tokenize", json={}), 400, "prompt, messages, inputs", "prompt")
    check_error(site.http.post("/detokenize", json={"tokens": [10**9]}), 400, "ids from", "tokens")
    check_error(site.http.post("/detokenize", json={"tokens": ["a"]}), 400, "integer", "tokens[0]")


def test_a_bug_of_ours_says_nothing_but_the_id(make_site: MakeSite) -> None:
    site = make_site()
    site.engine.refuse = RuntimeError("secret /home/path")
    response = site.http.post(TEXT, json={"prompt": "x"}, headers={"X-Request-Id": "mine-1"})
    check_error(response, 500, "internal error while serving request mine-1")
    assert "secret" not in response.text
