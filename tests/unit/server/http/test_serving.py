"""The real server on a loopback port: the openai package, lost and slow clients, drain, limits."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from diptych.engine.core.errors import ConfigError, OverloadedError
from diptych.server.http.app import front_of, make_app
from diptych.server.http.listening import open_socket
from diptych.server.http.serve import run_api, serve_http
from diptych.server.http.settings import HttpSettings
from diptych.server.text.tokenizer import Tokenizer
from tests.support.fake_client import FakeClient
from tests.support.tokenizers_small import write_byte_level
from tests.unit.server.http.conftest import EOS, MakeSite, Site

pytestmark = pytest.mark.timeout(60)
HELLO = [{"role": "user", "content": "hello"}]


@contextlib.asynccontextmanager
async def serving(site: Site) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """(base URL, drain event); the server is gone at the end."""
    ready, drain = asyncio.Event(), asyncio.Event()
    sock = open_socket(HttpSettings(model_names=["x"], port=0))
    host, port = sock.getsockname()
    task = asyncio.create_task(serve_http(site.app, sock, ready=ready.set, drain_event=drain))
    await ready.wait()
    try:
        yield f"http://{host}:{port}", drain
    finally:
        drain.set()
        if site.engine.gate is not None:
            site.engine.gate.set()
        await task


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    """Lets the loop run until it holds; the test's own time limit ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.002)


def test_openai_package(make_site: MakeSite) -> None:
    async def run() -> None:
        site = make_site(api_keys=["key"])
        async with serving(site) as (url, _):
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)
            answer = await client.chat.completions.create(
                model="tiny", messages=HELLO, logprobs=True, top_logprobs=1, n=2
            )
            assert [c.message.content for c in answer.choices] == ["hello world"] * 2
            assert answer.usage.prompt_tokens_details.cached_tokens == 0
            assert answer.choices[0].logprobs.content[0].bytes == list(b"hello")
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == "hello world"
            assert chunks[-1].usage.completion_tokens == 3
            assert [m.id async for m in await client.models.list()] == ["tiny", "alias"]
            completion = await client.completions.create(model="tiny", prompt=["a", [5]][0])
            assert completion.choices[0].text == "hello world"
            texts = await client.completions.create(model="tiny", prompt="a", stream=True)
            assert "".join([c.choices[0].text async for c in texts]) == "hello world"
            await _openai_errors(site, client, url)
            await client.close()

    asyncio.run(run())


async def _openai_errors(site: Site, client: openai.AsyncOpenAI, url: str) -> None:
    chat = client.chat.completions
    with pytest.raises(openai.NotFoundError) as missing:
        await chat.create(model="gpt-9", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await chat.create(model="tiny", messages=HELLO, temperature=-1, stream=True)
    assert bad.value.param == "temperature"
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError):
            await wrong.models.list()
    site.engine.refuse = OverloadedError("full", retry_after_s=7)
    with pytest.raises(openai.RateLimitError) as full:
        await chat.create(model="tiny", messages=HELLO, stream=True)
    assert full.value.response.headers["retry-after"] == "7"
    site.engine.refuse = None
    site.engine.fail_after = (1, OverloadedError("later", retry_after_s=7))
    with pytest.raises(openai.APIError, match="later"):
        async for _ in await chat.create(model="tiny", messages=HELLO, stream=True):
            pass


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("path", "body", "requests"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "n": 2}, 1),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}, 3),
    ],
)
def test_a_lost_client_aborts_at_once(
    make_site: MakeSite, streaming: bool, path: str, body: dict[str, object], requests: int
) -> None:
    async def run() -> None:
        site = make_site()
        site.engine.gate = asyncio.Event()  # never opens: only the disconnect can end it
        async with serving(site) as (url, _), httpx.AsyncClient() as http:
            request = http.build_request("POST", url + path, json={**body, "stream": streaming})
            task = asyncio.create_task(http.send(request, stream=True))
            await until(lambda: len(site.engine.calls) == requests)
            if streaming:
                response = await task
                assert response.status_code == 200
                await response.aclose()
            else:
                task.cancel()
                await asyncio.wait({task})
            await until(lambda: len(site.engine.aborted) == requests)
            await until(lambda: front_of(site.app).in_flight == 0)
            text = (await http.get(f"{url}/metrics")).text
            count = 2 if requests == 1 else 3
            assert f'finished_reason="abort",model_name="tiny"}} {count}.0' in text
        assert site.engine.ended == []

    asyncio.run(run())


def test_a_client_that_does_not_read_is_ended(tokenizer: Tokenizer, make_site: MakeSite) -> None:
    """Also shows that what is buffered for it stays small."""

    async def run() -> None:
        site = make_site("x" * 60_000, stall_s_max=0.3)
        site.engine.info = type(site.engine.info)(
            **{f: getattr(site.engine.info, f) for f in site.engine.info.__struct_fields__}
            | {"max_model_len": 100_000}
        )
        async with serving(site) as (url, _):
            host, port = url.removeprefix("http://").split(":")
            loop = asyncio.get_running_loop()
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, int(port)))
                body = b'{"prompt": "x", "stream": true, "max_tokens": 50000}'
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
                await loop.sock_sendall(sock, head.encode() + b"\r\n\r\n" + body)
                await until(lambda: site.engine.aborted)
                await until(lambda: front_of(site.app).in_flight == 0)
                received = 0
                with contextlib.suppress(ConnectionResetError):
                    while data := await loop.sock_recv(sock, 1 << 20):
                        received += len(data)
            assert 0 < received < 8 << 20
            async with httpx.AsyncClient() as http:
                text = (await http.get(f"{url}/metrics")).text
            assert "diptych:stalled_streams_total 1.0" in text

    asyncio.run(run())


def test_drain_finishes_what_runs(make_site: MakeSite) -> None:
    async def run() -> None:
        site = make_site()
        site.engine.gate = asyncio.Event()
        async with serving(site) as (url, drain), httpx.AsyncClient() as http:
            body = {"messages": HELLO, "stream": True}
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as running:
                drain.set()
                await until(lambda: front_of(site.app).draining)
                refused = await http.post(f"{url}/v1/chat/completions", json=body)
                assert refused.status_code == 503
                assert (await http.get(f"{url}/health")).status_code == 503
                site.engine.gate.set()
                text = "".join([part async for part in running.aiter_text()])
            assert text.endswith("data: [DONE]\n\n")
        assert len(site.engine.ended) == 1

    asyncio.run(run())


def test_the_grace_has_an_end(make_site: MakeSite) -> None:
    async def run() -> None:
        site = make_site(grace_s=0.1)
        site.engine.gate = asyncio.Event()
        async with serving(site) as (url, drain), httpx.AsyncClient() as http:
            body = {"messages": HELLO, "stream": True}
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as running:
                drain.set()
                with pytest.raises(httpx.RemoteProtocolError):
                    await running.aread()
            await until(lambda: site.engine.aborted)

    asyncio.run(run())


def test_heads_have_limits(make_site: MakeSite) -> None:
    async def run() -> None:
        site = make_site(header_bytes_max=4096, header_s_max=0.2)
        async with serving(site) as (url, _):
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            assert await reader.read() == b""  # nothing was sent in time
            writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /health HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    writer.write(b"X-A: " + b"a" * 1000 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0)
                assert b"200" not in await reader.read()
            writer.close()
            async with httpx.AsyncClient() as http:
                assert (await http.get(f"{url}/health")).status_code == 200
                await until(lambda: True)
                assert (await http.get(f"{url}/health")).status_code == 200

    asyncio.run(run())


def test_run_api(tmp_path: Path) -> None:
    """The whole of one API server, by its one function."""
    folder = write_byte_level(tmp_path)
    engine = FakeClient(lambda p, s, c: [5, EOS], vocab_size=400, eos=EOS)

    async def run() -> None:
        ready, drain = asyncio.Event(), asyncio.Event()
        settings = HttpSettings(model_names=["m"], port=0)
        sock = open_socket(settings)
        port = sock.getsockname()[1]
        task = asyncio.create_task(
            run_api(engine, folder, settings, ready=ready.set, drain_event=drain, sock=sock)
        )
        await ready.wait()
        async with httpx.AsyncClient() as http:
            body = {"prompt": [7]}
            answer = await http.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == 2
        drain.set()
        await task
        with pytest.raises(OSError, match=r".*"):
            await asyncio.open_connection("127.0.0.1", port)

    asyncio.run(run())


def test_sockets() -> None:
    first = open_socket(HttpSettings(model_names=["m"], port=0))
    port = first.getsockname()[1]
    with pytest.raises(ConfigError, match="Choose another --port"):
        open_socket(HttpSettings(model_names=["m"], port=port))
    first.close()
    with pytest.raises(ConfigError, match="--api-key"):
        open_socket(HttpSettings(model_names=["m"], host="0.0.0.0", port=0))


def test_settings_are_verified(tokenizer: Tokenizer) -> None:
    engine = FakeClient(lambda p, s, c: [5], vocab_size=400, eos=EOS)
    with pytest.raises(ConfigError):
        make_app(engine, tokenizer, HttpSettings(model_names=["m"], host="0.0.0.0"))
