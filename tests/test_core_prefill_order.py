"""The order in which waiting requests are read: tiers, then arrival, deadline or length."""

from __future__ import annotations

import pytest
from known_device import make_request

from stallfree.core.request import Request
from stallfree.core.targets import Targets
from stallfree.core.waiting import WaitingQueue


def names(queue: WaitingQueue) -> list[str]:
    return [request.request_id for request in queue]


def queue_of(order: str, *requests: Request) -> WaitingQueue:
    queue = WaitingQueue(order)
    for index, request in enumerate(requests):
        request.arrival = (request.arrived_at, index)
        queue.add(request)
    return queue


def test_orders_are_what_they_say() -> None:
    def made() -> list[Request]:
        return [
            make_request("long", 3000, at=0.0, targets=Targets(ttft_s=10)),
            make_request("late", 500, at=4.0, targets=Targets(ttft_s=2)),
            make_request("none", 100, at=1.0),
        ]

    assert names(queue_of("fcfs", *made())) == ["long", "none", "late"]
    assert names(queue_of("edf", *made())) == ["late", "long", "none"]
    assert names(queue_of("srpf", *made())) == ["none", "late", "long"]


def test_a_long_prompt_is_overtaken_for_so_long_only() -> None:
    """A second of waiting is worth 100 tokens: 2,000 more tokens cost 20 s at most."""
    long = make_request("long", 3000, at=0.0)
    assert names(queue_of("srpf", long, make_request("soon", 1000, at=19.0))) == ["soon", "long"]
    long = make_request("long", 3000, at=0.0)
    assert names(queue_of("srpf", long, make_request("later", 1000, at=21.0))) == ["long", "later"]


def test_tiers_go_first_whatever_the_order() -> None:
    for order in ("fcfs", "edf", "srpf"):
        queue = queue_of(
            order,
            make_request("flex", 10, targets=Targets("flex", ttft_s=0.1)),
            make_request("default", 10, at=1.0),
            make_request("priority", 9000, at=2.0, targets=Targets("priority")),
        )
        assert names(queue) == ["priority", "default", "flex"]
        assert [queue.num_tokens(rank) for rank in range(3)] == [9000, 9010, 9020]
        assert [queue.num_requests(rank) for rank in range(3)] == [1, 2, 3]
        assert queue.has_flex


def test_a_request_that_leaves_is_forgotten() -> None:
    requests = [make_request(str(i), 10 + i) for i in range(5)]
    queue = queue_of("srpf", *requests)
    queue.remove(requests[2])
    assert names(queue) == ["0", "1", "3", "4"]
    assert len(queue) == 4
    assert queue.num_tokens(1) == 10 + 11 + 13 + 14
    with pytest.raises(KeyError):
        queue.remove(requests[2])
