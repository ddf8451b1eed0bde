"""A thin OpenAI-compatible HTTP front for OpenVINO GenAI, which has no server of its own.

Runs under the peer's interpreter: standard library, `tokenizers` and `openvino_genai` only. Two
processes, because a step of the pipeline holds the interpreter's lock: the parent speaks HTTP,
the child computes; JSON lines over a socket pair between them. It does as little as a server can
(one text chunk per token, no sampling options but greedy), which favours the peer.
"""

import argparse
import asyncio
import json
import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

BODY_BYTES_MAX = 4 << 20


class Lines:
    """JSON lines over one socket, for the computing side."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest = b""

    def read(self, wait: bool) -> Iterator[dict[str, Any]]:
        """What is there; `wait`: until something is. Ends the process with the parent."""
        while wait or select.select([self._sock], [], [], 0)[0]:
            data = self._sock.recv(1 << 20)
            if not data:
                os._exit(0)
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from map(json.loads, lines)
            wait = wait and not lines

    def write(self, message: dict[str, object]) -> None:
        self._sock.sendall(json.dumps(message).encode() + b"\n")


def compute(sock: socket.socket, args: argparse.Namespace) -> None:
    """Adds what was asked, steps while anything runs, one message per step."""
    import openvino
    import openvino_genai as genai

    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = 2  # GB
    scheduling.max_num_batched_tokens = args.max_num_batched_tokens
    scheduling.max_num_seqs = args.max_num_seqs
    scheduling.dynamic_split_fuse = True
    scheduling.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "LATENCY"}
    pipeline = genai.ContinuousBatchingPipeline(args.folder, scheduling, "CPU", properties)
    lines = Lines(sock)
    handles: dict[int, Any] = {}
    lines.write({"ready": True})
    while True:
        for job in lines.read(wait=not pipeline.has_non_finished_requests()):
            key = job["id"]
            if "cancel" in job:
                if key in handles:
                    handles.pop(key).stop()
                continue
            config = genai.GenerationConfig()
            config.max_new_tokens = job["max_tokens"]
            config.ignore_eos = True
            config.do_sample = False
            prompt = openvino.Tensor([job["prompt"]])
            handles[key] = pipeline.add_request(key, prompt, config)
        if not pipeline.has_non_finished_requests():
            continue
        pipeline.step()
        tokens: dict[int, list[int]] = {}
        for key, handle in handles.items():
            while handle.can_read():
                for output in handle.read().values():
                    tokens.setdefault(key, []).extend(output.generated_ids)
        if tokens:
            lines.write({"tokens": tokens})


class Front:
    """The HTTP side: answers three paths, nothing else."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, texts: list[str]
    ):
        self._reader, self._writer, self._texts = reader, writer, texts
        self._waiting: dict[int, asyncio.Queue[list[int]]] = {}
        self._next = 0

    async def pump(self) -> None:
        """Hands the tokens of every step to their streams."""
        while line := await self._reader.readline():
            for key, ids in json.loads(line)["tokens"].items():
                if queue := self._waiting.get(int(key)):
                    queue.put_nowait(ids)
        os._exit(1)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path = head.split(" ", 2)[1]
            if path == "/v1/completions":
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
                length = int(fields["content-length"])
                if length > BODY_BYTES_MAX:
                    writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
                else:
                    await self._complete(json.loads(await reader.readexactly(length)), writer)
            else:
                body = json.dumps({"data": [{"id": "openvino"}]}).encode()
                kind = "Content-Type: application/json\r\nConnection: close"
                writer.write(
                    f"HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
        with suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        key, self._next = self._next, self._next + 1
        queue = self._waiting[key] = asyncio.Queue()
        job = {"id": key, "prompt": body["prompt"], "max_tokens": body["max_tokens"]}
        self._writer.write(json.dumps(job).encode() + b"\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        )
        left = body["max_tokens"]
        try:
            while left > 0:
                for token in await queue.get():
                    left -= 1
                    end = "length" if left == 0 else None
                    choice = {"index": 0, "text": self._texts[token], "finish_reason": end}
                    self._send(writer, {"object": "text_completion", "choices": [choice]})
                await writer.drain()
            counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            self._send(writer, {"object": "text_completion", "choices": [], "usage": counts})
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
        finally:
            del self._waiting[key]
            if left:
                self._writer.write(json.dumps({"id": key, "cancel": True}).encode() + b"\n")

    def _send(self, writer: asyncio.StreamWriter, chunk: dict[str, object]) -> None:
        writer.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


async def answer(sock: socket.socket, args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.folder) / "tokenizer.json"))
    texts = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 24)
    await reader.readline()  # ready
    front = Front(reader, writer, texts)
    server = await asyncio.start_server(front.serve, "127.0.0.1", args.port)
    async with server:
        await front.pump()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    args = parser.parse_args()
    parent, child = socket.socketpair()
    if os.fork() == 0:
        parent.close()
        compute(child, args)
    child.close()
    asyncio.run(answer(parent, args))


if __name__ == "__main__":
    main()
