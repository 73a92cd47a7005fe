"""A server of completions around OpenVINO GenAI, which has none; runs in its environment.

    python benchmarks/peer_openvino.py MODEL.gguf PORT

One thread does it all, because a step of the pipeline lets no other thread of Python run: between
two steps, the tokens of the last one are sent and the requests that have arrived are read.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from asyncio import StreamReader, StreamWriter
from typing import Any

import openvino_genai  # type: ignore[import-not-found]  # it has an environment of its own

TURNS = 20  # of the event loop between two steps: accepting and reading a request takes a few


class Server:
    """Answers HTTP requests and runs the pipeline for them.

    Args:
        model: a GGUF file.
        max_num_batched_tokens: of an iteration; None for the library's own default.
    """

    def __init__(self, model: str, max_num_batched_tokens: int | None) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        if max_num_batched_tokens:
            scheduler.max_num_batched_tokens = max_num_batched_tokens
        self._model = model
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {})
        self._tokenizer = self._pipeline.get_tokenizer()
        self._ids = itertools.count()
        self._running: dict[Any, asyncio.Queue[list[int]]] = {}  # by handle: ids of tokens to send
        self._arrived = asyncio.Event()

    async def serve(self, port: int) -> None:
        """Serve until the process is ended."""
        async with await asyncio.start_server(self._connected, "127.0.0.1", port):
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while self._pipeline.has_non_finished_requests():
                    self._step()
                    for _ in range(TURNS):
                        await asyncio.sleep(0)

    def _step(self) -> None:
        self._pipeline.step()
        for handle, queue in self._running.items():
            if handle.can_read():
                (output,) = handle.read().values()
                queue.put_nowait(output.generated_ids)

    async def _connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = head.partition("content-length:")[2].partition("\r\n")[0]
        body = json.loads(await reader.readexactly(int(length))) if length else {}
        kind = "text/event-stream" if body else "application/json"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode())
        if body:
            await self._complete(body, writer)
        else:  # /health or /v1/models
            writer.write(json.dumps({"data": [{"id": self._model}]}).encode())
        writer.close()

    async def _complete(self, body: dict[str, Any], writer: StreamWriter) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = body["max_tokens"], body["ignore_eos"]
        prompt = self._tokenizer.encode(body["prompt"]).input_ids
        queue: asyncio.Queue[list[int]] = asyncio.Queue()
        handle = self._pipeline.add_request(next(self._ids), prompt, config)
        self._running[handle] = queue
        self._arrived.set()
        sent = 0
        while sent < body["max_tokens"]:
            for token_id in await queue.get():
                text = self._tokenizer.decode([token_id])
                _send(writer, {"choices": [{"index": 0, "text": text}]})
                sent += 1
        del self._running[handle]
        usage = {"prompt_tokens": prompt.shape[1], "completion_tokens": sent}
        _send(writer, {"choices": [], "usage": usage})


def _send(writer: StreamWriter, event: dict[str, Any]) -> None:
    writer.write(f"data: {json.dumps(event)}\n\n".encode())


def main() -> None:
    """Load the model, then serve until a signal ends the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    options = parser.parse_args()
    asyncio.run(Server(options.model, options.max_num_batched_tokens).serve(options.port))


if __name__ == "__main__":
    main()
