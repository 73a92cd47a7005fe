"""Several replicas behind one face: routing, losses, drains; with real engines, in threads."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest
from engine_fixtures import GREEDY, PROMPTS, tiny_settings
from replica_fixtures import ThreadFleet, ask, longer, make_front, running, tokens
from server_fixtures import serve, wait_until

from stallfree import LLM, SamplingParams
from stallfree.core.budget import Squeezed
from stallfree.engine.settings import EngineSettings, ServerSettings
from stallfree.errors import (
    ConfigError,
    EngineStoppedError,
    InvalidRequestError,
    NoReplicaError,
    OverloadedError,
    ReplicaLostError,
)
from stallfree.replicas.launch import launch
from stallfree.replicas.messages import Events, Hello, Ready, Report, Submit, Welcome
from stallfree.replicas.roster import Roster
from stallfree.replicas.wire import Gate, connect, has_ended

LONG = longer(GREEDY, 1000)
BLOCK = 16
BODY = {"model": "tiny", "prompt": "alpha", "temperature": 0, "max_tokens": 400}
BODY |= {"ignore_eos": True}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def one(settings: EngineSettings) -> LLM:
    return LLM.from_settings(settings)


def test_replicas_give_what_one_engine_gives_and_share_the_work(
    settings: EngineSettings, one: LLM
) -> None:
    drawn = SamplingParams(temperature=1.0, max_tokens=12, n=2, ignore_eos=True)
    expected = [
        [tokens_of.token_ids for tokens_of in answer.outputs]
        for params in (GREEDY, drawn)
        for answer in one.generate(PROMPTS, params)
    ]
    fleet = ThreadFleet(settings)

    async def main() -> None:
        async with running(fleet) as front:
            prompts = [front.tokenizer.encode(prompt) for prompt in PROMPTS]
            given: list[list[tuple[int, ...]]] = []
            for params in (GREEDY, drawn):
                asked = [ask(front, str(i), prompt, params) for i, prompt in enumerate(prompts)]
                answers = await asyncio.gather(*asked)
                given += [[tokens(own, index) for index in range(params.n)] for own in answers]
            assert given == expected
            assert front.num_running == front.num_waiting == 0

    asyncio.run(main())
    assert all(count >= 2 for count in fleet.served)


def test_what_started_when_is_told_by_the_clock_of_the_front(settings: EngineSettings) -> None:
    async def main() -> None:
        async with running(ThreadFleet(settings)) as front:
            before = front.now()
            deltas = await ask(front, "one", [1, 2, 3], GREEDY)
            assert before <= deltas[0].scheduled_at <= front.now()  # type: ignore[operator]

    asyncio.run(main())


def test_a_prompt_goes_where_its_beginning_was_read(settings: EngineSettings) -> None:
    fleet = ThreadFleet(settings)

    async def main() -> None:
        async with running(fleet) as front:
            beginning = list(range(1, 1 + 4 * BLOCK))
            for turn in range(4):
                await ask(front, f"a{turn}", [*beginning, *range(turn * BLOCK)], GREEDY)
            assert sorted(fleet.served) == [0, 4]
            place = fleet.served.index(4)
            fleet.held[place].free.clear()  # it has a long prompt to read
            held = asyncio.create_task(ask(front, "long", [*beginning, *range(500)], GREEDY))
            while fleet.served[place] < 5:
                await asyncio.sleep(0.01)
            await ask(front, "other", [*beginning, 7], GREEDY)
            assert fleet.served[1 - place] == 1
            fleet.held[place].free.set()
            assert len(tokens(await held)) == 12

    asyncio.run(main())


def test_a_request_without_output_survives_its_replica(settings: EngineSettings, one: LLM) -> None:
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


def test_a_client_that_leaves_frees_its_replica(settings: EngineSettings) -> None:
    fleet = ThreadFleet(settings)

    async def main() -> None:
        async with running(fleet) as front:
            stream = front.generate("gone", [1, 2], LONG)
            for _ in range(3):
                await anext(stream)
            assert front.num_running == 1
            await stream.aclose()
            while front.num_running:
                await asyncio.sleep(0.01)
            assert not any(each.engine.engine.has_requests for each in fleet.replicas)

    asyncio.run(main())


def test_each_replica_is_asked_before_a_request_is_refused(settings: EngineSettings) -> None:
    fleet = ThreadFleet(replace(settings, max_num_seqs=1, max_queued_requests=1))

    async def main() -> None:
        async with running(fleet) as front:
            streams = [front.generate(f"long {index}", [index + 1], LONG) for index in range(2)]
            for stream in streams:
                await anext(stream)
                await anext(stream)
            assert fleet.served == [1, 1]
            asked = [ask(front, str(index), [index + 1], GREEDY) for index in range(6)]
            pending = asyncio.gather(*asked, return_exceptions=True)
            while not all(each.engine.num_waiting for each in fleet.replicas):
                await asyncio.sleep(0.01)
            for stream in streams:
                await stream.aclose()
            answers = await pending
            refused = [each for each in answers if isinstance(each, OverloadedError)]
            assert len(refused) == 4
            assert fleet.served == [2, 2]

    asyncio.run(main())


def test_what_is_wrong_is_refused(settings: EngineSettings) -> None:
    async def main() -> None:
        async with running(ThreadFleet(settings)) as front:
            with pytest.raises(InvalidRequestError, match="empty"):
                await ask(front, "bad", [], GREEDY)
            stream = front.generate("same", [1], LONG)
            await anext(stream)
            with pytest.raises(InvalidRequestError, match="'same' is in use"):
                await ask(front, "same", [1], GREEDY)
            await stream.aclose()

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


def test_a_replica_that_cannot_be_built_ends_the_start(settings: EngineSettings) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 99999"):
        Roster(ThreadFleet(replace(settings, max_model_len=99_999)), 2, 10.0)


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
    fleet = ThreadFleet(settings, count=1)
    with (
        serve(make_front(fleet), served_model_name="tiny") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        whole = server.post("/v1/completions", BODY).json()["choices"]
        asked = pool.submit(server.post, "/v1/completions", BODY)
        engine = fleet.replicas[0].engine.engine
        wait_until(lambda: any(each.num_output_tokens > 5 for each in engine.scheduler.running))
        fleet.replicas[0].end()
        fleet.add()
        assert asked.result(30).json()["choices"] == whole
        assert fleet.served == [2, 1]


def test_strangers_are_turned_away() -> None:
    calls: list[Connection] = []
    gate = Gate("127.0.0.1", calls.append)
    place = gate.place
    silent = socket.create_connection((place.host, place.port))
    with pytest.raises(AuthenticationError):
        Client((place.host, place.port), authkey=b"guessed")
    with connect(place) as friend:
        wait_until(lambda: len(calls) == 1)
        friend.send("hello")
        assert calls[0].recv() == "hello"
    silent.close()
    assert not has_ended(place)
    gate.close()
    wait_until(lambda: has_ended(place))


def test_errors_come_whole_from_another_process() -> None:
    for error in (OverloadedError("too much", 3.5), InvalidRequestError("wrong", "prompt")):
        copy = pickle.loads(pickle.dumps(error))
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def test_settings_of_one_engine_alone_are_refused(settings: EngineSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replicas is 0; it must be at least 1"):
        ServerSettings(replicas=0)
    with pytest.raises(ConfigError, match=r"replica_timeout_s is 0\.5; it must be at least 2"):
        ServerSettings(replica_timeout_s=0.5)
    server = ServerSettings(replicas=2)
    with pytest.raises(ConfigError, match="all would write there"):
        launch(replace(settings, iteration_file=tmp_path / "a.csv"), server)
    with pytest.raises(ConfigError, match="on its own machine"):
        launch(replace(settings, distributed_executor="ray"), server)


def test_what_was_not_sent_yet_is_run_again_even_while_the_server_drains(
    settings: EngineSettings,
) -> None:
    fleet = ThreadFleet(settings, count=1)
    with (
        serve(make_front(fleet), served_model_name="tiny") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        whole = server.post("/v1/completions", BODY).json()["choices"]
        asked = pool.submit(server.post, "/v1/completions", BODY)
        engine = fleet.replicas[0].engine.engine
        wait_until(lambda: any(each.num_output_tokens > 5 for each in engine.scheduler.running))
        fleet.held[0].free.clear()  # it does not end before its replica does
        server.server.shut_down()
        wait_until(lambda: server.http.get("/health").json()["status"] == "draining")
        fleet.held[0].is_dead = True
        fleet.held[0].free.set()
        wait_until(lambda: server.http.get("/health").json()["ready_replicas"] == 0)
        assert server.post("/v1/completions", BODY).status_code == 503
        fleet.add()
        assert asked.result(30).json()["choices"] == whole
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


def test_it_is_logged_when_each_is_ready_but_that_is_no_warning(
    settings: EngineSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "stallfree.replicas"):
        make_front(ThreadFleet(settings)).stop()
    told = [each for each in caplog.records if each.getMessage().endswith("is ready")]
    assert [each.levelname for each in told] == ["INFO", "INFO"]
    assert {each.getMessage()[:9] for each in told} == {"replica 0", "replica 1"}
