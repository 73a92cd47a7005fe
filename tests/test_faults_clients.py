"""Clients that leave at every point of a request's life: within an iteration it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fault_fixtures import Sent, Server, Stream, model_in, note, seconds_until, server

# Room for 128 tokens, and places for two: a third waits, and two long ones do not fit.
KV = ("--kv-cache-memory", str(32 * 4 * 512), "--max-num-seqs", "2")
ITERATIONS = 3  # until it is gone: the one under way, the one that was being sent, and one
BYSTANDER = "alpha beta gamma"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(model_in(tmp_path_factory.mktemp("clients")), *KV) as own:
        yield own


@pytest.fixture
def before(running: Server) -> Iterator[dict[str, Any]]:
    """What is left of nothing; afterwards iterations are fast again."""
    left = running.left()
    yield left
    running.fault(None)
    running.check_nothing_left(left)


def state_of(running: Server, state: str, **more: int) -> bool:
    """Whether a request is in a state, with at least so much of other things."""
    return any(
        each["state"] == state and all(each[name] >= least for name, least in more.items())
        for each in running.watch()["live"].values()
    )


def iterations_until_gone(running: Server, left_s: float) -> int:
    """How many iterations ended between a client's departure and the end of its request."""
    seconds_until(lambda: any(end["reason"] == "abort" for end in ends_since(running, left_s)))
    ended_s = max(e["at_s"] for e in ends_since(running, left_s) if e["reason"] == "abort")
    return sum(left_s < at_s <= ended_s for at_s in running.watch()["iterations_s"])


def ends_since(running: Server, since_s: float) -> list[dict[str, Any]]:
    return [end for end in running.watch()["ends"] if end["at_s"] > since_s]


LONG = [5] * 50  # two of them with 64 tokens each fill the cache


# By when the client leaves: who else is there, what it sends, and how its request is known.
MOMENTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "before its first token": (
        [{"prompt": BYSTANDER, "max_tokens": 15}],
        {"prompt": [7] * 80, "max_tokens": 30},
        {"state": "running", "blocks": 20},
    ),
    "in the middle": (
        [{"prompt": BYSTANDER, "max_tokens": 15}],
        {"prompt": [7] * 5, "max_tokens": 100},
        {"state": "running", "output_tokens": 3, "max_tokens": 100},
    ),
    "while it waits": (
        [{"prompt": BYSTANDER, "max_tokens": 15}, {"prompt": [9, 9], "max_tokens": 15}],
        {"prompt": [7] * 5, "max_tokens": 100},
        {"state": "waiting"},
    ),
    "while it is preempted": (
        [{"prompt": LONG, "max_tokens": 40}],
        {"prompt": [7] * 50, "max_tokens": 60},
        {"state": "waiting", "num_preemptions": 1},
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_client_leaves(
    running: Server, before: dict[str, Any], moment: str, stream: bool
) -> None:
    bystanders, leaving, known_by = MOMENTS[moment]
    expected = [running.text(**fields) for fields in bystanders]
    running.fault("slow")
    streams = [Stream(running, **fields) for fields in bystanders]
    for each in streams:
        each.wait_for_events()
    client = Sent(running, stream=stream, **leaving)
    seconds_until(lambda: state_of(running, **known_by))
    left_s = client.leave()
    num_iterations = iterations_until_gone(running, left_s)
    assert num_iterations <= ITERATIONS
    assert [each.text for each in streams] == expected
    if stream:
        note(
            f"a client leaves {moment}",
            seen="nothing by others",
            healthy=f"{num_iterations} iterations until nothing of it was left",
        )
