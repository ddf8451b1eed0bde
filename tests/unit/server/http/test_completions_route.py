"""Text completions: kinds of prompts, echo with log-probabilities, streams of many choices."""

import json

from tests.unit.server.http.conftest import MakeSite, Site

TEXT = "/v1/completions"


def ask(site: Site, **fields: object) -> dict:  # type: ignore[type-arg]
    response = site.http.post(TEXT, json=fields)
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def stream(site: Site, **fields: object) -> list[dict]:  # type: ignore[type-arg]
    response = site.http.post(TEXT, json={**fields, "stream": True})
    assert response.status_code == 200, response.text
    *chunks, done = response.text[:-2].split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_kinds_of_prompts(site: Site) -> None:
    hello = site.tokenizer.encode("hello")
    plain = site.tokenizer.encode("hello", add_special_tokens=False)
    for prompt, expected in (
        ("hello", [hello]),
        (["hello", "hello"], [hello, hello]),
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7], [8, 9]], [[7], [8, 9]]),
    ):
        site.engine.calls.clear()
        answer = ask(site, prompt=prompt, model="tiny")
        assert sorted(call[1] for call in site.engine.calls) == sorted(expected)
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert {choice["text"] for choice in answer["choices"]} == {"hello world"}
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    ask(site, prompt="hello", add_special_tokens=False)
    assert site.engine.calls[-1][1] == plain


def test_max_tokens_defaults_to_16_and_fits(site: Site) -> None:
    ask(site, prompt=[5] * 10)
    ask(site, prompt=[5] * 120)
    assert [call[2].max_tokens for call in site.engine.calls] == [16, 8]


def test_shape(site: Site) -> None:
    answer = ask(site, prompt="hello")
    assert list(answer) == [
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "system_fingerprint",
    ]
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "hello world",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]


def test_echo_with_logprobs(site: Site) -> None:
    """What evaluation harnesses send to score a text."""
    for fields, generated in (({"max_tokens": 0}, 0), ({"max_tokens": 1}, 1)):
        answer = ask(site, prompt="the fox", echo=True, logprobs=2, **fields)
        choice = answer["choices"][0]
        logprobs = choice["logprobs"]
        prompt = site.engine.calls[-1][1]
        assert choice["text"] == "the fox" + ("hello" if generated else "")
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == generated
        assert {len(logprobs[name]) for name in logprobs} == {len(prompt) + generated}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["tokens"][0] == "<|bos|>"
        for at in range(1, len(prompt)):
            assert logprobs["tokens"][at] == site.tokenizer.pieces.text(prompt[at])
            assert logprobs["token_logprobs"][at] == -0.5
            assert max(logprobs["top_logprobs"][at].values()) == -0.5
        joined = "".join(logprobs["tokens"])
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
            assert joined[offset:].startswith(token)


def test_logprobs_0_has_the_chosen_token(site: Site) -> None:
    logprobs = ask(site, prompt="x", logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"hello": -0.5}
    assert logprobs["text_offset"] == [0, 5, 11]


def test_stream_equals_whole(make_site: MakeSite) -> None:
    fields = {"prompt": ["the", "fox"], "n": 2, "max_tokens": 5}
    extra = [{}, {"echo": True}, {"logprobs": 1}, {"return_token_ids": True}, {"stop": "or"}]
    for chunk in (1, 4):
        site = make_site("hello world é🙂", chunk=chunk)
        for more in extra:
            whole = ask(site, **fields, **more)
            choices = whole["choices"]
            texts = [""] * 4
            ids: list[list[int]] = [[] for _ in range(4)]
            tokens: list[list[str]] = [[] for _ in range(4)]
            ends: dict[int, object] = {}
            for part in stream(site, **fields, **more):
                (choice,) = part["choices"]
                index = choice["index"]
                texts[index] += choice["text"]
                ids[index] += choice.get("token_ids", [])
                tokens[index] += (choice["logprobs"] or {"tokens": []})["tokens"]
                if choice["finish_reason"]:
                    ends[index] = choice["finish_reason"]
            assert texts == [choice["text"] for choice in choices]
            assert ids == [choice.get("token_ids", []) for choice in choices]
            assert tokens == [(c["logprobs"] or {"tokens": []})["tokens"] for c in choices]
            assert [ends[index] for index in range(4)] == [c["finish_reason"] for c in choices]


def test_stream_echo_with_logprobs(site: Site) -> None:
    whole = ask(site, prompt="the fox", echo=True, logprobs=1)["choices"][0]["logprobs"]
    parts = [
        part["choices"][0]["logprobs"]
        for part in stream(site, prompt="the fox", echo=True, logprobs=1)
        if part["choices"][0]["logprobs"]
    ]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


def test_usage_chunk(site: Site) -> None:
    chunks = stream(site, prompt=["a", "b"], stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_truncation_and_echo_of_ids(site: Site) -> None:
    answer = ask(site, prompt="the quick fox", truncate_prompt_tokens=2, echo=True)
    kept = site.engine.calls[-1][1]
    assert len(kept) == 2
    assert answer["choices"][0]["text"] == site.tokenizer.decode(kept) + "hello world"
    prompt = [5 + i % 50 for i in range(300)]
    for side, most, expected in (
        ("left", 7, prompt[-7:]),
        ("right", 7, prompt[:7]),
        ("left", -1, prompt[-(128 - 20) :]),  # as many as leave room for the answer
        ("right", -1, prompt[: 128 - 20]),
    ):
        ask(
            site,
            prompt=prompt,
            truncate_prompt_tokens=most,
            truncation_side=side,
            max_tokens=20,
        )
        assert site.engine.calls[-1][1] == expected, (side, most)


def test_one_refusal_among_many_prompts_refuses_all(site: Site) -> None:
    site.engine.refuse = None
    response = site.http.post(TEXT, json={"prompt": [[5], [5] * 500]})
    assert response.status_code == 400
    assert site.engine.calls == []


def test_token_routes(site: Site) -> None:
    ids = site.tokenizer.encode("hello é")
    plain = site.tokenizer.encode("hello é", add_special_tokens=False)
    ours = site.http.post("/tokenize", json={"prompt": "hello é", "return_token_strs": True})
    assert ours.json() == {
        "count": len(ids),
        "max_model_len": 128,
        "tokens": ids,
        "token_strs": [site.tokenizer.pieces.text(token) for token in ids],
    }
    chat = {"messages": [{"role": "user", "content": "hello"}], "model": "tiny"}
    tokens = site.http.post("/tokenize", json=chat).json()["tokens"]
    text = site.http.post("/detokenize", json={"tokens": tokens}).json()
    assert text["prompt"] == text["content"] == "<|user|>hello<|end|><|assistant|>"
    spans = site.http.post("/tokenize", json={"inputs": "hello fox"}).json()
    assert spans[0]["text"] == "<|bos|>"
    assert "hello fox"[spans[1]["start"] : spans[1]["stop"]] == spans[1]["text"]
    llama = site.http.post("/tokenize", json={"content": "hello é"}).json()
    assert llama == {"tokens": plain}
    pieces = site.http.post("/tokenize", json={"content": "🙂", "with_pieces": True}).json()
    assert pieces["tokens"][0]["piece"] == list("🙂".encode())[:1]
