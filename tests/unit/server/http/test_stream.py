"""The event stream by itself: nothing is written to a connection that is closing."""

import asyncio
from collections.abc import AsyncGenerator

from diptych.server.http.stream import TRANSPORT_KEY, EventStream, event


class ClosingTransport:
    def __init__(self, open_for: int) -> None:
        self._left = open_for

    def is_closing(self) -> bool:
        self._left -= 1
        return self._left < 0

    def get_write_buffer_size(self) -> int:
        return 0


def test_stops_and_closes_the_source() -> None:
    closed: list[bool] = []
    sent: list[dict[str, object]] = []

    async def source() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield event({"a": 1})
        finally:
            closed.append(True)

    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    response = EventStream(source(), stall_s_max=5, on_stall=lambda: None)
    scope = {"type": "http", TRANSPORT_KEY: ClosingTransport(open_for=2)}
    asyncio.run(asyncio.wait_for(response(scope, receive, send), 5))  # type: ignore[arg-type]
    assert closed == [True]
    assert [message["type"] for message in sent] == [
        "http.response.start",
        "http.response.body",
        "http.response.body",
    ]
    assert sent[1]["body"] == b'data: {"a":1}\n\n'
