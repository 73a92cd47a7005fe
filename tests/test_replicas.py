"""Several replicas behind one face: what it answers, and who gets which request; in threads."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from engine_fixtures import GREEDY, PROMPTS, tiny_settings
from replica_fixtures import LONG, ThreadFleet, ask, make_front, running, tokens

from stallfree import LLM, SamplingParams
from stallfree.engine.settings import EngineSettings, ServerSettings
from stallfree.errors import ConfigError, InvalidRequestError, OverloadedError
from stallfree.replicas.launch import launch
from stallfree.replicas.roster import Roster

BLOCK = 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


def test_replicas_give_what_one_engine_gives_and_share_the_work(settings: EngineSettings) -> None:
    one = LLM.from_settings(settings)
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
            waiting = [asyncio.ensure_future(each) for each in asked]
            async with asyncio.timeout(60):
                while sum(each.done() for each in waiting) < 4:
                    await asyncio.sleep(0.01)
            for stream in streams:
                await stream.aclose()
            answers = await asyncio.gather(*waiting, return_exceptions=True)
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


def test_a_replica_that_cannot_be_built_ends_the_start(settings: EngineSettings) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 99999"):
        Roster(ThreadFleet(replace(settings, max_model_len=99_999)), 2, 10.0)


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


def test_it_is_logged_when_each_is_ready_but_that_is_no_warning(
    settings: EngineSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "stallfree.replicas"):
        make_front(ThreadFleet(settings)).stop()
    told = [each for each in caplog.records if each.getMessage().endswith("is ready")]
    assert [each.levelname for each in told] == ["INFO", "INFO"]
    assert {each.getMessage()[:9] for each in told} == {"replica 0", "replica 1"}
