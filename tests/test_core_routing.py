"""Which copy of a model a request goes to, and what its scheduler predicts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedulers import request, scheduler

from stallfree.core.budget import StaticBudget
from stallfree.core.load import Load
from stallfree.core.pace import MeasuredPace
from stallfree.core.routing import Offer, choose, offer_of

MS = 0.001


def test_a_request_goes_where_its_first_token_comes_first() -> None:
    assert choose([Offer(0.5, MS), Offer(0.2, MS)], 100) == 1
    assert choose([Offer(0.2, 2 * MS), Offer(0.3, MS)], 50) == 0
    assert choose([Offer(0.2, 2 * MS), Offer(0.3, MS)], 500) == 1  # it reads faster


def test_a_prefix_is_followed_as_long_as_the_wait_is_worth_what_it_saves() -> None:
    for wait_s, place in ((0.0, 1), (0.2, 1), (0.6, 0)):
        knows = Offer(wait_s, MS, num_known=400)
        assert choose([Offer(0.0, MS), knows], 500) == place


def test_of_equals_the_one_with_the_fewest_requests_then_the_one_that_knows_more() -> None:
    busy, free = Offer(0.1, MS, num_requests=4), Offer(0.1005, MS, num_requests=1)
    assert choose([busy, free, free], 100) == 1
    assert choose([free, Offer(0.1, MS, 1, num_known=1)], 100) == 1


@given(
    offers=st.lists(
        st.builds(
            Offer,
            st.floats(0, 10),
            st.floats(1e-6, 1),
            st.integers(0, 50),
            st.integers(0, 500),
            st.integers(0, 500),
        ),
        min_size=1,
        max_size=5,
    ),
    num_tokens=st.integers(1, 1000),
)
def test_no_choice_is_much_later_than_the_first(offers: list[Offer], num_tokens: int) -> None:
    times = [offer.first_token_s(num_tokens, MS) for offer in offers]
    assert times[choose(offers, num_tokens)] <= 1.05 * min(times) + 2 * MS + 1e-9


def test_an_offer_waits_for_what_it_does_not_know_of_yet() -> None:
    offer = Offer(0.1, MS, num_known=64, num_before=200)
    assert offer.first_token_s(100, 1.0) == pytest.approx(0.3 + 36 * MS)
    assert offer.first_token_s(64, 1.0) == pytest.approx(0.3 + MS)  # one is always read


def test_a_copy_that_has_read_nothing_is_taken_to_be_as_fast_as_the_others() -> None:
    new = Offer(0.0, None)
    assert choose([Offer(0.1, 2 * MS), new], 100) == 1
    assert choose([Offer(0.0, 2 * MS, num_known=50), new], 100) == 0
    assert choose([new, new], 100) == 0


def test_a_scheduler_offers_what_it_predicts() -> None:
    made = scheduler(num_blocks=100)
    pace = MeasuredPace(made.budget)
    idle = offer_of(made, pace, 0.0)
    assert idle.wait_s == 0
    assert idle.token_s is None
    token_s = 1 / pace(Load(()))[0]
    assert idle.num_requests == 0
    for index in range(3):
        made.add(request(str(index), 40))
    waiting = offer_of(made, pace, 0.0)
    assert waiting.num_requests == 3
    assert waiting.wait_s == pytest.approx(120 * token_s)
    batch = made.schedule()
    assert batch is not None
    made.complete(batch, [1] * len(batch.sampling))
    pace.observe(batch, 0.1)
    read = offer_of(made, pace, 0.0)  # and half an iteration, as one is under way
    assert read.token_s is not None
    assert read.wait_s == pytest.approx(104 * read.token_s + pace(Load(()))[1] / 2)


def test_a_pace_is_that_of_late_iterations() -> None:
    made = scheduler(num_blocks=100)
    pace = MeasuredPace(StaticBudget(16))
    made.add(request("long", 60, max_tokens=2))
    while (batch := made.schedule()) is not None:
        made.complete(batch, [1] * len(batch.sampling))
        for _ in range(60):
            pace.observe(batch, batch.num_tokens / 400)
    tokens_per_s, iteration_s = pace(Load(()))
    assert tokens_per_s == pytest.approx(400, rel=0.01)
    assert iteration_s == pytest.approx(1 / 400, rel=0.1)  # the last was a decode


def test_a_budget_that_predicts_is_believed() -> None:
    from known_device import make_device

    device = make_device(slo_s=0.1)
    pace = MeasuredPace(device.scheduler.budget)
    assert pace(Load(())) == device.scheduler.budget.pace(Load(()))
