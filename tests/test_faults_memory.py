"""A server process whose memory is limited: what is too large at once is run in parts."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from fault_fixtures import Stream, model_in, note, seconds_until, server, stop, workers
from tiny import save_tiny_model

PROMPT = [9, 11, 13, 17] * 450
HEADROOM = 96 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide_model(tmp_path_factory.mktemp("memory"))


def save_wide_model(folder: Path) -> Path:
    """A tiny model with a wide layer: 2,000 tokens at once take 500 MB there."""
    return save_tiny_model(
        folder / "wide",
        initializer_range=0.2,
        intermediate_size=32_768,
        max_position_embeddings=4096,
    )


@pytest.mark.slow
def test_a_prompt_that_is_too_large_for_the_memory(model: Path) -> None:
    engine = ("--dtype", "float32", "--threads", "1", "--token-budget", "2048")
    memory = ("--kv-cache-memory", "8MiB", "--no-prefix-caching")  # so that all is read again
    with server(model, *memory, engine=engine) as own:
        expected = own.text(PROMPT, max_tokens=8), own.text(max_tokens=200)
        before = own.left()
        bystander = Stream(own, max_tokens=200)
        bystander.wait_for_events()
        limit_memory(own.process.pid)
        assert own.text(PROMPT, max_tokens=8) == expected[0]
        assert bystander.text == expected[1]
        healthy_s = seconds_until(own.is_healthy)
        assert "is run in parts" in own.log
        assert "allocate" in own.log
        own.check_nothing_left(before)
        assert stop(own) == 0
    note("no memory for an iteration", seen="nothing: it is run in parts", healthy=healthy_s)


def limit_memory(pid: int) -> None:
    """Let a process have no more than it has, and some headroom."""
    status = Path(f"/proc/{pid}/status").read_text()
    limit = int(status.split("VmSize:")[1].split()[0]) * 1024 + HEADROOM
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_prompt_that_is_too_large_for_the_memory_of_a_stage(model: Path) -> None:
    engine = ("--dtype", "float32", "--threads", "1", "--token-budget", "2048")
    sizes = ("--pipeline-parallel-size", "2", "--kv-cache-memory", "8MiB")
    with server(model, *sizes, "--no-prefix-caching", engine=engine) as own:
        expected = own.text(PROMPT, max_tokens=8), own.text(max_tokens=200)
        before = own.left()
        bystander = Stream(own, max_tokens=200)
        bystander.wait_for_events()
        stages = workers(own)
        assert len(stages) == 2
        for pid in stages:
            limit_memory(pid)
        assert own.text(PROMPT, max_tokens=8) == expected[0]
        assert bystander.text == expected[1]
        healthy_s = seconds_until(own.is_healthy)
        assert "is run in parts" in own.log
        assert "allocate" in own.log
        assert workers(own) == stages
        own.check_nothing_left(before)
        assert stop(own) == 0
    fault = "no memory for an iteration in a stage of a pipeline"
    note(fault, seen="nothing: it is run in parts", healthy=healthy_s)


def test_a_request_that_finds_no_memory_is_refused(tmp_path: Path) -> None:
    """See `test_faults_components.py` for one that fails alone; here many come at once."""
    with server(model_in(tmp_path)) as own:
        expected = own.text(max_tokens=200)
        before = own.left()
        own.fault("memory")
        struck = [Stream(own, [5, 77, i], max_tokens=50) for i in range(8)]
        others = [Stream(own, max_tokens=200) for _ in range(4)]
        assert [each.text for each in others] == [expected] * 4
        for each in struck:
            each.end()
            assert each.status == 200
            assert "no memory" in each.events[-1]["error"]["message"]
        own.fault(None)
        own.check_nothing_left(before)
    seen = "HTTP 503 or an error event, with Retry-After"
    note("no memory for a request even alone", seen=seen, healthy=0.0)
