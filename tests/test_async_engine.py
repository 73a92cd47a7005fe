"""The asynchronous face of the engine, on a tiny real model."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from engine_fixtures import GREEDY, tiny_settings

from stallfree import SamplingParams
from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.outputs import Delta
from stallfree.engine.settings import EngineSettings
from stallfree.errors import EngineStoppedError, InvalidRequestError


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(settings: EngineSettings) -> Engine:
    return build_engine(settings, show_progress=False)


async def collect(engine: AsyncEngine, name: str, params: SamplingParams = GREEDY) -> list[Delta]:
    return [delta async for delta in engine.generate(name, [5, 6, 7], params) if delta is not None]


def test_async_streams_run_together_and_drain(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        both = dataclasses.replace(GREEDY, n=2)
        lists = await asyncio.gather(*(collect(own, str(i), both) for i in range(5)))
        assert all(sum(d.finish_reason == "length" for d in deltas) == 2 for deltas in lists)
        with pytest.raises(InvalidRequestError):
            await anext(own.generate("bad", [], GREEDY))
        running = asyncio.create_task(collect(own, "late"))
        await asyncio.sleep(0)
        assert await own.drain(30)
        assert len(await running) == 12
        with pytest.raises(EngineStoppedError, match="shutting down"):
            await collect(own, "too late")
        own.stop()

    asyncio.run(main())
    engine.scheduler.check_integrity()


def test_closing_a_stream_aborts_its_request(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        long = dataclasses.replace(GREEDY, max_tokens=1000)
        stream = own.generate("gone", [1, 2, 3], long)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(collect(own, "cancelled", long))
        while not own.num_running + own.num_waiting:
            await asyncio.sleep(0.001)
        task.cancel()
        for _ in range(2000):
            if not engine.has_requests:
                break
            await asyncio.sleep(0.001)
        assert not engine.has_requests
        own.stop()

    asyncio.run(main())
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_a_drain_that_takes_too_long_ends_what_runs(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        long = dataclasses.replace(GREEDY, max_tokens=1000, n=2)
        task = asyncio.create_task(collect(own, "long", long))
        await asyncio.sleep(0.05)
        assert not await own.drain(0)
        deltas = await task
        assert sorted(d.index for d in deltas if d.finish_reason == "abort") == [0, 1]
        own.stop()

    asyncio.run(main())


def test_stopping_ends_streams_and_ids_are_not_shared(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        long = dataclasses.replace(GREEDY, max_tokens=1000)
        task = asyncio.create_task(collect(own, "same", long))
        await asyncio.sleep(0.02)
        with pytest.raises(InvalidRequestError, match="'same' is in use"):
            await collect(own, "same")
        await asyncio.to_thread(own.stop)
        assert (await asyncio.wait_for(task, 10))[-1].finish_reason == "abort"

    asyncio.run(main())


def test_a_dead_engine_says_so(engine: Engine) -> None:
    deaths: list[BaseException] = []

    async def main() -> None:
        own = AsyncEngine(engine)
        own.on_death = deaths.append
        own.start()
        engine.scheduler.policy = dataclasses.replace(
            engine.scheduler.policy, propose=lambda view: []
        )
        [delta] = await collect(own, "victim")
        assert delta.finish_reason == "error"
        assert "stuck" in str(delta.error)
        with pytest.raises(EngineStoppedError, match="died"):
            await collect(own, "next")
        own.stop()

    asyncio.run(main())
    assert len(deaths) == 1
