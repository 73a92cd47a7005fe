"""A replica that is lost: what it had not sent yet is run again by another, the rest is told."""

from __future__ import annotations

import asyncio
import json

import pytest
from engine_fixtures import GREEDY, PROMPTS, tiny_settings
from replica_fixtures import (
    BODY,
    LONG,
    ThreadFleet,
    amid_an_answer,
    ask,
    make_front,
    running,
    tokens,
)
from server_fixtures import serve, wait_until

from stallfree import LLM
from stallfree.core.budget import Squeezed
from stallfree.engine.settings import EngineSettings
from stallfree.errors import NoReplicaError, ReplicaLostError
from stallfree.replicas.messages import Events, Hello, Ready, Report, Submit, Welcome
from stallfree.replicas.wire import connect


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


def test_a_request_without_output_survives_its_replica(settings: EngineSettings) -> None:
    one = LLM.from_settings(settings)
    fleet = ThreadFleet(settings)
    prompt = one.tokenizer.encode(PROMPTS[0])
    [expected] = one.generate([PROMPTS[0]], GREEDY)

    async def main() -> None:
        async with running(fleet) as front:
            for held in fleet.held:
                held.free.clear()
            asked = [asyncio.create_task(ask(front, str(i), prompt, GREEDY)) for i in range(4)]
            while not all(fleet.served):  # a held engine takes in no more
                await asyncio.sleep(0.01)
            fleet.held[0].is_dead = True  # and with it its engine
            for held in fleet.held:
                held.free.set()
            for answer in await asyncio.gather(*asked):
                assert tokens(answer) == expected.outputs[0].token_ids
            assert front.health == {"replicas": 2, "ready_replicas": 1}
            assert fleet.num_ended == 1

    asyncio.run(main())


def test_a_request_with_output_fails_with_its_replica_and_no_other(
    settings: EngineSettings,
) -> None:
    fleet = ThreadFleet(settings)

    async def main() -> None:
        async with running(fleet) as front:
            streams = [front.generate(str(index), [index + 1], LONG) for index in range(2)]
            for stream in streams:
                assert await anext(stream) is None
                await anext(stream)
            assert fleet.served == [1, 1]
            victim = asyncio.create_task(asyncio.to_thread(fleet.replicas[0].end))
            ends = []
            for stream in streams:
                try:
                    ends.append([each async for each in stream][-1].finish_reason)  # type: ignore[union-attr]
                except ReplicaLostError as error:
                    ends.append(str(error))
            await victim
            assert sum(end == "length" for end in ends) == 1
            assert sum("its connection ended" in str(end) for end in ends) == 1

    asyncio.run(main())


def test_a_replica_that_says_nothing_is_lost(settings: EngineSettings) -> None:
    fleet = ThreadFleet(settings, count=1)

    async def main() -> None:
        async with running(fleet, timeout_s=2.0) as front:
            offer, last = fleet.replicas[0].outlook.now()
            report = Report(offer, last, 0, 0, Squeezed())
            await asyncio.to_thread(fleet.replicas[0].end)
            with connect(fleet.place) as mute:
                for said in (Hello("nowhere", 1), Ready(front.facts), Events((), report, 0.0)):
                    mute.send(said)
                while not front.is_ready:
                    await asyncio.sleep(0.01)
                asked = asyncio.create_task(ask(front, "one", [1], GREEDY))
                await asyncio.sleep(0)
                assert await asyncio.to_thread(mute.recv) == Welcome(is_first=False)
                assert isinstance(await asyncio.to_thread(mute.recv), Submit)
                while front.is_ready:
                    await asyncio.sleep(0.05)
            with pytest.raises(NoReplicaError):
                await front.check([1], GREEDY)
            await asyncio.to_thread(fleet.add)
            assert len(tokens(await asked)) == 12

    asyncio.run(main())


def test_over_http_it_is_said_what_was_lost(settings: EngineSettings) -> None:
    fleet = ThreadFleet(settings, count=1)
    with serve(make_front(fleet), served_model_name="tiny") as server:
        with server.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            fleet.replicas[0].end()
            last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "was lost (its connection ended)" in error["message"]
        wait_until(lambda: server.http.get("/health").status_code == 503)
        health = server.http.get("/health").json()
        assert health["status"] == "starting"
        assert (health["replicas"], health["ready_replicas"]) == (1, 0)
        refused = server.post("/v1/completions", BODY)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "no copy of the model is ready" in refused.json()["error"]["message"]
        fleet.add()
        wait_until(lambda: server.http.get("/health").status_code == 200)
        assert server.post("/v1/completions", BODY).status_code == 200


def test_what_was_not_sent_yet_is_run_again(settings: EngineSettings) -> None:
    with amid_an_answer(settings) as (_, fleet, is_answered):
        fleet.replicas[0].end()
        fleet.add()
        assert is_answered()
        assert fleet.served == [2, 1]
