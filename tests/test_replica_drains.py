"""The drain of several replicas: what runs, or may run again, is waited for."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from engine_fixtures import GREEDY, tiny_settings
from replica_fixtures import BODY, LONG, ThreadFleet, amid_an_answer, ask, running, tokens
from server_fixtures import wait_until

from stallfree.engine.settings import EngineSettings
from stallfree.errors import EngineStoppedError


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


def test_a_drain_waits_and_one_that_takes_too_long_ends_what_runs(
    settings: EngineSettings,
) -> None:
    async def main() -> None:
        async with running(ThreadFleet(settings)) as front:
            asked = asyncio.create_task(ask(front, "one", [1], GREEDY))
            await asyncio.sleep(0)
            assert await front.drain(30)
            assert len(tokens(await asked)) == 12
            with pytest.raises(EngineStoppedError, match="shutting down"):
                await front.check([1], GREEDY)
        async with running(ThreadFleet(settings)) as front:
            stream = front.generate("one", [1], replace(LONG, n=2))
            for _ in range(4):
                await anext(stream)
            assert not await front.drain(0)
            rest = [each async for each in stream]
            ended = [each for each in rest if each and each.finish_reason == "abort"]
            assert sorted(each.index for each in ended) == [0, 1]

    asyncio.run(main())


def test_what_was_not_sent_yet_is_run_again_even_while_the_server_drains(
    settings: EngineSettings,
) -> None:
    with amid_an_answer(settings) as (server, fleet, is_answered):
        fleet.held[0].free.clear()  # it does not end before its replica does
        server.server.shut_down()
        wait_until(lambda: server.http.get("/health").json()["status"] == "draining")
        fleet.held[0].is_dead = True
        fleet.held[0].free.set()
        wait_until(lambda: server.http.get("/health").json()["ready_replicas"] == 0)
        assert server.post("/v1/completions", BODY).status_code == 503
        fleet.add()
        assert is_answered()
        assert fleet.served == [2, 1]


def test_requests_that_may_run_again_are_waited_for_and_no_others_are_taken(
    settings: EngineSettings,
) -> None:
    async def main() -> None:
        async with running(ThreadFleet(settings, count=1)) as front:
            with front.keeping(["kept"]):
                drain = asyncio.create_task(front.drain(30))
                await asyncio.sleep(0.1)
                assert not drain.done()
                assert len(tokens(await ask(front, "kept", [1], GREEDY))) == 12
                with pytest.raises(EngineStoppedError):
                    await ask(front, "new", [1], GREEDY)
                with pytest.raises(EngineStoppedError), front.keeping(["new"]):
                    pass
                assert not drain.done()
            assert await drain
            with pytest.raises(EngineStoppedError):
                await ask(front, "kept", [1], GREEDY)

    asyncio.run(main())


def test_after_the_drain_timeout_nothing_runs_again(settings: EngineSettings) -> None:
    async def main() -> None:
        async with running(ThreadFleet(settings, count=1)) as front:
            with front.keeping(["kept"]):
                assert not await front.drain(0)
                with pytest.raises(EngineStoppedError):
                    await ask(front, "kept", [1], GREEDY)

    asyncio.run(main())
