"""An HTTP server whose streamed answers a test writes byte by byte, and runs against it.

It lists one model, and counts 5 tokens for a prompt and 2 for each of its words.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from stallfree.bench.client import run_workload
from stallfree.bench.endpoint import Endpoint
from stallfree.bench.records import Results
from stallfree.bench.workload import Arrival, Workload

MODEL = "fake/model"
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """The prompt, or the first message."""
        text: str = self.body["messages"][0]["content"] if "messages" in self.body else ""
        return text or self.body["prompt"]

    @property
    def prompt_tokens(self) -> int:
        """As this server counts them."""
        return 5 + 2 * len(self.text.split())


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


def event(value: object) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(text: str = " a", finish_reason: str | None = None) -> bytes:
    """An event with a token of a completion."""
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def usage(asked: Asked, output_tokens: int) -> bytes:
    """An event with counts alone, and the end."""
    counts = {"prompt_tokens": asked.prompt_tokens, "completion_tokens": output_tokens}
    return event({"choices": [], "usage": counts}) + b"data: [DONE]\n\n"


def response(status: int, body: bytes, *headers: str, kind: str = "application/json") -> bytes:
    """A whole response."""
    lines = [f"HTTP/1.1 {status} Status", f"content-type: {kind}", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "connection: close", "", ""]).encode() + body


async def answer_in_full(asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Every token at once, as many as asked for."""
    count = asked.body["max_tokens"]
    writer.write(SSE_HEAD + token() * (count - 1) + token(finish_reason="length"))
    writer.write(usage(asked, count))


def fixed(data: bytes) -> Answer:
    """Always the same bytes."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


@dataclass
class FakeServer:
    """What came, and what is answered to streamed requests.

    Attributes:
        answer: answers streamed requests, all but the first of which may go to `later`.
        models, probe: whole responses to other requests instead of the usual ones.
        keeps_alive: whether a connection may bring several requests.
    """

    answer: Answer = answer_in_full
    later: Answer | None = None
    models: bytes | None = None
    probe: bytes | None = None
    keeps_alive: bool = False
    num_connections: int = 0
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    @property
    def streamed(self) -> list[Asked]:
        """The requests of the run itself."""
        return [each for each in self.asked if each.body.get("stream")]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection, one unless it is kept, and close it."""
        self.num_connections += 1
        try:
            await self._answer(await _read(reader), writer)
            while self.keeps_alive:
                await self._answer(await _read(reader), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        self.asked.append(asked)
        if asked.method == "GET":
            data = json.dumps({"data": [{"id": MODEL, "max_model_len": 4096}]}).encode()
            writer.write(self.models or response(200, data))
        elif not asked.body.get("stream"):
            counts = {"prompt_tokens": asked.prompt_tokens, "completion_tokens": 1}
            data = json.dumps({"choices": [{"text": "a"}], "usage": counts}).encode()
            writer.write(self.probe or response(200, data))
        else:
            is_first = len(self.streamed) == 1
            await (self.answer if is_first or self.later is None else self.later)(asked, writer)
        await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, json.loads(body) if body else {})


@contextmanager
def fake_server(**settings: Any) -> Iterator[FakeServer]:
    """A fake server on a free port, in a thread of its own."""
    fake = FakeServer(**settings)
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def end() -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = loop.run_until_complete(start())
    fake.close = lambda: loop.call_soon_threadsafe(server.close)  # type: ignore[assignment]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def requests(count: int, gap_s: float = 0.0, output_tokens: int = 3) -> Workload:
    """Requests of 25 tokens, evenly spaced."""
    arrivals = [Arrival(index * gap_s, 25, output_tokens) for index in range(count)]
    return Workload(tuple(arrivals))


def run(url: str, workload: Workload, **settings: Any) -> Results:
    """What comes of a workload at a server; settings are those of its endpoint."""
    return asyncio.run(run_workload(Endpoint(url, **settings), workload))
