"""No body whatsoever makes the server fail: every answer is a success or a 4xx error object."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from diptych.server.http.app import make_app
from diptych.server.http.requests import ChatRequest, CompletionRequest
from diptych.server.http.settings import HttpSettings
from diptych.server.text.tokenizer import Tokenizer
from tests.support.fake_client import FakeClient
from tests.unit.server.http.conftest import EOS

HELLO = [{"role": "user", "content": "hello"}]
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 130), st.floats(allow_nan=False), st.booleans()
)
values = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=8), st.sampled_from(["\x00", "数", "\u2028"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
names = sorted(
    {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    - {"messages", "prompt", "model"}
)
fields = st.dictionaries(st.sampled_from(names), values, max_size=4)


@pytest.fixture(scope="module")
def http(tokenizer: Tokenizer) -> TestClient:
    engine = FakeClient(lambda p, s, c: [65, 66, EOS], vocab_size=tokenizer.vocab_size, eos=EOS)
    return TestClient(make_app(engine, tokenizer, HttpSettings(model_names=["tiny"])))


def check(http: TestClient, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"]


common = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@common
@given(more=fields, message=values)
def test_any_fields(http: TestClient, more: dict[str, object], message: object) -> None:
    for path, base in (
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": message}),
        ("/v1/completions", {"prompt": message}),
    ):
        check(http, path, json.dumps({**base, **more}).encode())


@common
@given(body=st.one_of(st.binary(max_size=60), values.map(lambda v: json.dumps(v).encode())))
def test_any_bytes(http: TestClient, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        check(http, path, body)


@common
@given(field=st.sampled_from(["prompt", "messages", "inputs", "content", "tokens"]), value=values)
def test_any_texts(http: TestClient, field: str, value: object) -> None:
    body = json.dumps({field: value, "with_pieces": True, "return_token_strs": True}).encode()
    for path in ("/tokenize", "/detokenize"):
        check(http, path, body)
