"""A server whose processes share the layers, of which one has too little memory."""

from __future__ import annotations

from pathlib import Path

from fault_fixtures import Stream, note, seconds_until, server, stop, workers
from test_faults_memory import PROMPT, limit_memory, save_wide_model


def test_a_prompt_that_is_too_large_for_the_memory_of_a_share(tmp_path: Path) -> None:
    model = save_wide_model(tmp_path)
    engine = ("--dtype", "float32", "--threads", "1", "--token-budget", "2048")
    sizes = ("--tensor-parallel-size", "2", "--kv-cache-memory", "8MiB")
    with server(model, *sizes, "--no-prefix-caching", engine=engine) as own:
        expected = own.text(PROMPT, max_tokens=8), own.text(max_tokens=200)
        before = own.left()
        bystander = Stream(own, max_tokens=200)
        bystander.wait_for_events()
        shares = workers(own)
        assert len(shares) == 2
        limit_memory(shares[1])
        assert own.text(PROMPT, max_tokens=8) == expected[0]
        assert bystander.text == expected[1]
        healthy_s = seconds_until(own.is_healthy)
        assert "is run in parts" in own.log
        assert "allocate" in own.log
        assert workers(own) == shares
        own.check_nothing_left(before)
        assert stop(own) == 0
    fault = "no memory for an iteration in a share of the layers"
    note(fault, seen="nothing: it is run in parts", healthy=healthy_s)
