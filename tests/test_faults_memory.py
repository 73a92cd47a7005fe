"""A server process whose memory is limited: what is too large at once is run in parts."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from fault_fixtures import Stream, model_in, note, seconds_until, server, stop, workers
from tiny import save_tiny_model

PROMPT = [9, 11, 13, 17] * 450
HEADROOM = 96 << 20


STAGES, SHARES = "--pipeline-parallel-size", "--tensor-parallel-size"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "limited", "fault"),
    [
        ((), slice(None), "no memory for an iteration"),
        ((STAGES, "2"), slice(None), "no memory for an iteration in a stage of a pipeline"),
        ((SHARES, "2"), slice(1, None), "no memory for an iteration in a share of the layers"),
    ],
    ids=["one process", "stages", "a share"],
)
def test_a_prompt_that_is_too_large_for_the_memory(
    tmp_path: Path, split: tuple[str, ...], limited: slice, fault: str
) -> None:
    """2,000 tokens at once take 500 MB in the wide layer of this tiny model."""
    model = save_tiny_model(
        tmp_path / "wide",
        initializer_range=0.2,
        intermediate_size=32_768,
        max_position_embeddings=4096,
    )
    engine = ("--dtype", "float32", "--threads", "1", "--token-budget", "2048")
    memory = ("--kv-cache-memory", "8MiB", "--no-prefix-caching")  # so that all is read again
    with server(model, *split, *memory, engine=engine) as own:
        expected = own.text(PROMPT, max_tokens=8), own.text(max_tokens=200)
        before = own.left()
        bystander = Stream(own, max_tokens=200)
        bystander.wait_for_events()
        others = workers(own)
        assert len(others) == (2 if split else 0)
        for pid in (others or [own.process.pid])[limited]:
            limit_memory(pid)
        assert own.text(PROMPT, max_tokens=8) == expected[0]
        assert bystander.text == expected[1]
        healthy_s = seconds_until(own.is_healthy)
        assert "is run in parts" in own.log
        assert "allocate" in own.log
        assert workers(own) == others
        own.check_nothing_left(before)
        assert stop(own) == 0
    note(fault, seen="nothing: it is run in parts", healthy=healthy_s)


def limit_memory(pid: int) -> None:
    """Let a process have no more than it has, and some headroom."""
    status = Path(f"/proc/{pid}/status").read_text()
    limit = int(status.split("VmSize:")[1].split()[0]) * 1024 + HEADROOM
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


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
