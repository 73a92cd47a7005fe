"""Processes of a model that a Ray cluster starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_fixtures import GREEDY, PROMPTS, tiny_settings

from stallfree import LLM
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

LONG = replace(GREEDY, max_tokens=40)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine alone, with room for three processes."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        "local", num_cpus=3, include_dashboard=False, configure_logging=False, log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    own = tiny_settings(tmp_path)
    return replace(own, distributed_executor="ray", restart_workers=True)


def worker_pids() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::_work"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_what_one_process_gives_and_recovers(settings: EngineSettings) -> None:
    one = LLM.from_settings(replace(settings, distributed_executor="mp", restart_workers=False))
    expected = [each.outputs[0].token_ids for each in one.generate(PROMPTS, LONG)]
    two = LLM.from_settings(replace(settings, pipeline_parallel_size=2))
    for index, prompt in enumerate(PROMPTS):
        two.engine.add(str(index), two.tokenizer.encode(prompt), LONG)
    given: dict[str, list[int]] = {}
    for step in range(10_000):
        if step == 7:
            pids = worker_pids()
            assert len(pids) == 2
            os.kill(pids[0], signal.SIGKILL)
        for delta in two.engine.step():
            assert delta.error is None
            given.setdefault(delta.request_id, []).extend(delta.token_ids)
        if not two.engine.has_requests:
            break
    two.close()
    assert [tuple(given[str(index)]) for index in range(4)] == expected


@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_room_is_refused(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stallfree.executor.ray_launch._PLACEMENT_TIMEOUT_S", 0.5)
    with pytest.raises(ConfigError, match=r"no room for 2 stages of \{'CPU': 64\}"):
        LLM.from_settings(replace(settings, pipeline_parallel_size=2, threads=64))


def test_without_a_cluster_it_says_how_to_start_one(settings: EngineSettings) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(ConfigError, match="no cluster runs here: `ray start --head`"):
        LLM.from_settings(settings)
