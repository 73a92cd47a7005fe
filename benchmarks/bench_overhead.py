"""What `stallfree bench serve` costs and how far its times are off: `python bench_overhead.py`.

A server in a process of its own does nothing but emit tokens at an even pace, 500 a second in all
over 32 streams, and notes when it wrote each one on the clock that both processes share. The load
generator measures it as it would any other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection

from stallfree.bench.client import run_workload
from stallfree.bench.endpoint import Endpoint
from stallfree.bench.metrics import percentile
from stallfree.bench.records import Results
from stallfree.bench.report import cpu_share
from stallfree.bench.workload import Arrival, Workload

PROMPT_TOKENS = 100
_HEAD = "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{framing}\r\nconnection: close\r\n\r\n"


def chunk(value: object) -> bytes:
    """An event in a chunk of its own, about as long as those of real servers."""
    data = value if isinstance(value, str) else json.dumps(value)
    event = f"data: {data}\n\n"
    return f"{len(event):x}\r\n{event}\r\n".encode()


def serve(connection: Connection, gap_s: float) -> None:
    """Emit tokens until told to stop, then tell when each was written, by their number."""
    written: dict[int, list[float]] = {}
    token = {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "paced",
        "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}],
        "usage": None,
    }

    async def stream(writer: asyncio.StreamWriter, num_tokens: int) -> None:
        times = written[num_tokens] = []
        framing = "transfer-encoding: chunked"
        writer.write(_HEAD.format(kind="text/event-stream", framing=framing).encode())
        began = time.perf_counter()
        for index in range(num_tokens):
            await asyncio.sleep(began + (index + 1) * gap_s - time.perf_counter())
            times.append(time.perf_counter())
            writer.write(chunk(token))
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": num_tokens}
        writer.write(chunk({"choices": [], "usage": usage}) + chunk("[DONE]") + b"0\r\n\r\n")

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = head.partition("content-length:")[2].split("\r\n")[0]
        asked = json.loads(await reader.readexactly(int(length))) if length else {}
        if asked.get("stream"):
            await stream(writer, asked["max_tokens"])
        else:
            answer = {"data": [{"id": "paced"}], "usage": {"prompt_tokens": PROMPT_TOKENS}}
            body = json.dumps(answer)
            framing = f"content-length: {len(body)}"
            writer.write((_HEAD.format(kind="application/json", framing=framing) + body).encode())
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        connection.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await asyncio.to_thread(connection.recv)
        connection.send(written)

    asyncio.run(run())


def gap_errors(results: Results, written: dict[int, list[float]]) -> list[float]:
    """How far each measured gap is from the one between the two writes, in seconds."""
    errors = []
    for record in results.records:
        times = written[record.arrival.output_tokens]
        true = [later - earlier for earlier, later in pairwise(times)]
        errors += [abs(own - each) for own, each in zip(record.gaps_s, true, strict=True)]
    return errors


def measure(tokens_per_s: float, streams: int, seconds: float) -> tuple[Results, list[float]]:
    """The results of a run at this pace, and the errors of its gaps in seconds."""
    gap_s = streams / tokens_per_s
    num_tokens = max(2, round(seconds / gap_s))
    arrivals = [  # each with another number of tokens, by which its stream is known
        Arrival(gap_s * index / streams, PROMPT_TOKENS, num_tokens + index)
        for index in range(streams)
    ]
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve, args=(other, gap_s), daemon=True)
    process.start()
    results = asyncio.run(run_workload(Endpoint(own.recv()), Workload(tuple(arrivals))))
    own.send("stop")
    written = own.recv()
    process.join()
    assert not any(each.failure for each in results.records), results.records[0].failure
    return results, gap_errors(results, written)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens-per-s", type=float, default=500.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    chosen = parser.parse_args(arguments)
    results, errors = measure(chosen.tokens_per_s, chosen.streams, chosen.seconds)
    num_tokens = sum(len(each.token_s) for each in results.records)
    p50, p99 = (percentile(errors, share) * 1000 for share in (0.5, 0.99))
    print(
        f"{num_tokens / results.end_s:.0f} tokens a second over {chosen.streams} streams: "
        f"{cpu_share(results):.1%} of a core; gaps are off by {p50:.2f} ms at P50, "
        f"{p99:.2f} ms at P99, {max(errors) * 1000:.2f} ms at most"
    )


if __name__ == "__main__":
    main()
