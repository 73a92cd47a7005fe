"""A server with faults to switch on: `python fault_process.py serve MODEL --port 0 ...`.

It is `stallfree serve`, watched (`benchmarks/watched_server.py`), with one more route:
`POST /fault {"name": ...}` makes a component fail from then on, instead of the one before; without
a name all of them work again. Most strike only requests that bring the token or word below.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from watched_server import run

from stallfree.core.admission import Admission
from stallfree.core.batch import Batch
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.completion import Completion
from stallfree.engine.iteration_file import IterationFile
from stallfree.engine.template_process import TemplateProcess
from stallfree.engine.tokenizer import Tokenizer
from stallfree.executor import swap_store, torch_executor
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.server import completions

POISON, WORD = 77, "poison"
SLOW_S = 0.1  # an iteration while `slow` is on
DAY_S = 86_400.0

# A place, and whether what it is called with is struck.
Fault = tuple[Any, str, Callable[..., bool]]


class InjectedError(Exception):
    """What a component that fails raises."""


def _in_prompt(request: Request) -> bool:
    return POISON in request.prompt_token_ids


def _in_batch(batch: Batch) -> bool:
    return any(_in_prompt(chunk.request) for chunk in batch.chunks)


def _always(*_: Any) -> bool:
    return True


def faults_of(engine: AsyncEngine) -> dict[str, Fault]:
    """What can fail, by name."""
    budget = type(engine.engine.scheduler.budget)
    return {
        "tokenizer.encode": (Tokenizer, "encode", lambda _, text, *__: WORD in text),
        "tokenizer.decode": (Tokenizer, "decode", lambda _, ids, **__: POISON in ids),
        "chat template": (TemplateProcess, "render", lambda _, __, found: WORD in str(found)),
        "admission": (Admission, "check", lambda _, request, *__: _in_prompt(request)),
        "executor": (TorchExecutor, "execute", lambda _, batch: _in_batch(batch)),
        "memory": (TorchExecutor, "execute", lambda _, batch: _in_batch(batch)),
        "sampler": (
            torch_executor,
            "sample",
            lambda _, rows: any(row.params.seed == POISON for row in rows),
        ),
        "detokenizer": (Completion, "add", lambda own, _: _in_prompt(own.request)),
        "SSE encoder": (completions, "event", lambda value: WORD in str(value)),
        "iteration file": (IterationFile, "write", _always),
        "schedule": (Scheduler, "schedule", _always),
        "budget": (budget, "tokens", _always),
        "predictor": (budget, "predict", _always),
        "learning": (budget, "observe", _always),
        "completing": (Scheduler, "complete", _always),
        "swap out": (swap_store._FileRows, "write", _always),
        "swap in": (swap_store._FileRows, "read", _always),
    }


def _error(name: str) -> Exception:
    match name:
        case "memory":
            return MemoryError("no memory for this batch in /secret/place")
        case "swap out" | "swap in":
            return OSError(errno.EIO, os.strerror(errno.EIO))
        case _:
            return InjectedError(f"{name} failed in /secret/place")


def _failing(name: str, fault: Fault) -> Any:
    owner, attribute, is_struck = fault
    original = getattr(owner, attribute)

    def failing(*arguments: Any, **named: Any) -> Any:
        if is_struck(*arguments, **named):
            raise _error(name)
        return original(*arguments, **named)

    return patch.object(owner, attribute, failing)


class _FailingObserver:
    """Raises whatever it is told."""

    def __getattr__(self, name: str) -> Any:
        raise InjectedError("an observer failed in /secret/place")


def _slow() -> Any:
    original = TorchExecutor.execute

    def execute(self: TorchExecutor, batch: Batch) -> Any:
        time.sleep(SLOW_S)
        return original(self, batch)

    return patch.object(TorchExecutor, "execute", execute)


def _jumping_clock() -> Any:
    """The time of day goes a day on and a day back, in turn."""
    original, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return original() + (DAY_S if calls[0] % 2 else -DAY_S)

    return patch.object(time, "time", jumping)


def extend(app: FastAPI, engine: AsyncEngine) -> None:
    """Add the route."""
    on = ExitStack()

    async def switch(request: HttpRequest) -> dict[str, Any]:
        name = (await request.json()).get("name")
        on.close()
        if name == "slow":
            on.enter_context(_slow())
        elif name == "clock":
            on.enter_context(_jumping_clock())
        elif name == "observer":
            observer: Any = _FailingObserver()
            engine._inbox.put(lambda: engine.engine.observers.add(observer))
        elif name is not None:
            on.enter_context(_failing(name, faults_of(engine)[name]))
        return {"on": name}

    app.add_api_route("/fault", switch, methods=["POST"])


if __name__ == "__main__":
    logging.captureWarnings(True)
    run(sys.argv[1:], [extend])
