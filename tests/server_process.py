"""A server in a process of its own: `python server_process.py FOLDER DRAIN_TIMEOUT_S [SETTINGS]`.

It serves the tiny model in FOLDER and prints its URL. SETTINGS are a JSON object of more settings
of the server. The token ids below make an iteration fail, as a broken kernel or a broken scheduler
would.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from stallfree.core.batch import Batch
from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.build import build_engine
from stallfree.engine.flags import settings_of
from stallfree.engine.settings import EngineSettings, ServerSettings
from stallfree.executor.output import Executor, ExecutorOutput
from stallfree.server.app import run_server

FAILING_TOKEN = 77  # the iteration fails
DEADLY_TOKEN = 78  # the engine dies


class FaultyExecutor:
    """A real executor with faults."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run `batch`, unless it holds a token that makes it fail."""
        prompts = [chunk.request.prompt_token_ids for chunk in batch.chunks]
        if any(FAILING_TOKEN in prompt for prompt in prompts):
            raise RuntimeError("a kernel failed in /secret/place")
        if any(DEADLY_TOKEN in prompt for prompt in prompts):
            raise SystemExit("the engine dies in /secret/place")
        return self._executor.execute(batch)


def main() -> int:
    """Serve until told to end."""
    folder, drain_timeout_s, *more = sys.argv[1:]
    given = json.loads(more[0]) if more else {}
    known = {setting.field: setting for setting in settings_of(ServerSettings)}
    fields: dict[str, Any] = {name: known[name].read(value) for name, value in given.items()}
    engine = build_engine(
        EngineSettings(model=folder, threads=1, kv_cache_memory_bytes=64 << 20),
        show_progress=False,
    )
    engine.executor = FaultyExecutor(engine.executor)
    settings = ServerSettings(port=0, drain_timeout_s=float(drain_timeout_s), **fields)
    return run_server(AsyncEngine(engine), settings, lambda url: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(main())
