"""A load client that costs little: one thread, raw sockets, epoll; it counts and does not parse.

Run by bench.http_cost in a process of its own, so that the client is not what is measured. Every
stream sends a completion request, reads it to [DONE], checks that no token is missing, and sends
the next one on the same connection, until its time is up. Prints one line of JSON.
"""

import argparse
import json
import re
import select
import socket
import statistics
import time
from dataclasses import dataclass, field
from typing import Final

_USAGE: Final = re.compile(rb'"completion_tokens":\s?(\d+)')
_DONE: Final = b"data: [DONE]"
_END: Final = b"0\r\n\r\n"
_RECV_BYTES: Final = 1 << 16
_TAIL_BYTES: Final = 1024
_LATE_S: Final = 1.0


@dataclass(slots=True)
class Stream:
    """One connection; `tail` is the end of what was received of the current answer."""

    sock: socket.socket
    tail: bytes = b""
    last_s: float = 0.0
    fresh: bool = True  # nothing of the current answer has come
    gaps_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0


class Load:
    def __init__(self, args: argparse.Namespace) -> None:
        body = json.dumps(
            {
                "model": args.model,
                "prompt": list(range(3, 3 + args.prompt)),
                "max_tokens": args.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self._tokens: int = args.tokens
        self._until_s = time.perf_counter() + args.seconds
        self._once: bool = args.once
        self._epoll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self.all: list[Stream] = []
        self.errors: list[str] = []
        for _ in range(args.streams):
            stream = Stream(socket.create_connection(("127.0.0.1", args.port)))
            self.all.append(stream)
            self._streams[stream.sock.fileno()] = stream
            self._epoll.register(stream.sock.fileno(), select.EPOLLIN)

    def run(self) -> None:
        for stream in self.all:
            self._send(stream)
        while self._streams:
            for fd, _ in self._epoll.poll(60) or [(-1, 0)]:
                if fd < 0:
                    self.errors.append(f"{len(self._streams)} streams silent for 60 s")
                    return
                self._read(self._streams[fd])

    def _send(self, stream: Stream) -> None:
        stream.tail, stream.fresh, stream.last_s = b"", True, time.perf_counter()
        stream.sock.sendall(self._request)

    def _read(self, stream: Stream) -> None:
        data = stream.sock.recv(_RECV_BYTES)
        now = time.perf_counter()
        (stream.ttft_s if stream.fresh else stream.gaps_s).append(now - stream.last_s)
        stream.last_s, stream.fresh = now, False
        tail = stream.tail = (stream.tail + data)[-_TAIL_BYTES:]
        if data and not (tail.endswith(_END) and _DONE in tail):
            return
        found = _USAGE.findall(tail)
        if not data or not found or int(found[-1]) != self._tokens:
            self.errors.append(tail[-200:].decode("utf-8", "replace") or "connection closed")
            self._close(stream)
            return
        stream.tokens += self._tokens
        stream.answers += 1
        if self._once or now >= self._until_s:
            self._close(stream)
        else:
            self._send(stream)

    def _close(self, stream: Stream) -> None:
        fd = stream.sock.fileno()
        self._epoll.unregister(fd)
        stream.sock.close()
        del self._streams[fd]


def _ms(values: list[float]) -> dict[str, float]:
    values = sorted(values) or [0.0]
    return {
        "p50": round(statistics.median(values) * 1e3, 2),
        "p99": round(values[int(len(values) * 0.99)] * 1e3, 2),
        "max": round(values[-1] * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--once", action="store_true", help="one answer per stream")
    args = parser.parse_args()
    load = Load(args)
    start = time.perf_counter()
    load.run()
    result = {
        "seconds": round(time.perf_counter() - start, 2),
        "answers": sum(stream.answers for stream in load.all),
        "tokens": sum(stream.tokens for stream in load.all),
        "errors": len(load.errors),
        "first_error": load.errors[0] if load.errors else None,
        "ttft_ms": _ms([s for stream in load.all for s in stream.ttft_s]),
        "gap_ms": _ms([s for stream in load.all for s in stream.gaps_s]),
        "late": sum(s > _LATE_S for stream in load.all for s in stream.gaps_s),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
