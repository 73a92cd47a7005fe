"""What an engine tells its observers: every request once, every iteration, in order."""

from __future__ import annotations

from typing import Any

import pytest
from engine_fixtures import GREEDY, Failing, tiny_settings

from stallfree.core.admission import Admission
from stallfree.core.request import FinishReason, Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.observer import IterationRecord
from stallfree.errors import OverloadedError


class Diary:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def added(self, request: Request) -> None:
        self.lines.append(("added", request.request_id))

    def refused(self, targets: Targets, error: OverloadedError) -> None:
        self.lines.append(("refused", targets.tier, str(error)))

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        assert record.seconds > 0
        tokens = [chunk.num_tokens for chunk in record.batch.chunks]
        outputs = [chunk.request.num_output_tokens for chunk in record.batch.sampling]
        scheduler.check_integrity()
        self.lines.append(("iterated", tokens, outputs, record.is_failed))

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        assert now >= request.arrived_at
        self.lines.append(("ended", request.request_id, reason))


class Rude(Diary):
    """Raises at the first iteration."""

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        raise RuntimeError("an observer that fails")


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    settings = tiny_settings(tmp_path_factory.mktemp("model"))
    return build_engine(settings, show_progress=False)


def test_a_request_is_told_from_its_arrival_to_its_end(engine: Engine) -> None:
    diary = Diary()
    engine.observers.add(diary)
    engine.add("one", [1, 2, 3], GREEDY)
    while engine.has_requests:
        engine.step()
    assert diary.lines[0] == ("added", "one/0")
    assert diary.lines[1] == ("iterated", [3], [1], False)
    assert diary.lines[-1] == ("ended", "one/0", FinishReason.LENGTH)
    num_tokens = 12
    assert len(diary.lines) == num_tokens + 2


def test_an_abort_and_a_failure_are_told_with_their_reasons(engine: Engine) -> None:
    diary = Diary()
    engine.observers.add(diary)
    engine.add("left", [1, 2, 3], GREEDY)
    engine.add("failed", [1, 2, 3], GREEDY)
    engine.step()
    engine.abort("left")
    failing = Failing(engine)
    failing.fails = True
    engine.executor = failing
    engine.step()
    assert diary.lines[-3:] == [
        ("ended", "left/0", FinishReason.ABORT),
        ("iterated", [1], [1], True),
        ("ended", "failed/0", FinishReason.ERROR),
    ]


def test_an_observer_that_raises_is_dropped_and_nobody_else_notices(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    diary = Diary()
    engine.observers.add(Rude())
    engine.observers.add(diary)
    engine.add("one", [1, 2, 3], GREEDY)
    while engine.has_requests:
        engine.step()
    assert ("ended", "one/0", FinishReason.LENGTH) in diary.lines
    assert caplog.text.count("Rude is told nothing any more") == 1


def test_a_refusal_is_told_with_its_tier(engine: Engine) -> None:
    diary = Diary()
    engine.observers.add(diary)
    engine.admission = Admission(max_queued_requests=1)
    engine.scheduler.num_left_waiting = [1, 1, 1]
    engine.add("first", [1, 2, 3], GREEDY)
    with pytest.raises(OverloadedError):
        engine.add("second", [1, 2, 3], GREEDY)
    assert diary.lines[1][:2] == ("refused", "default")
