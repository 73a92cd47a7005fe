"""Devices whose step times are known, under a scheduler that keeps a target on them.

`Device` is what tests of the budget need; `OrderedDevice` also tells when first tokens came.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from test_step_time import device_seconds, measured

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import BatchShape, StepTimePredictor, fit
from stallfree.core.targets import Targets

TILE = 8
MODEL = fit(measured(0, 300))
SLO_S = 0.2


@dataclass
class Device:
    """Runs a scheduler; an iteration takes what the device takes, times `slowness`."""

    scheduler: Scheduler
    slowness: float = 1.0
    now: float = 0.0
    steps: list[tuple[Batch, float]] = field(default_factory=list)

    def step(self) -> None:
        running = [r for r in self.scheduler.running if r.is_decode and not r.is_flex]
        batch = self.scheduler.schedule(self.now)
        assert batch is not None
        scheduled = {chunk.request.request_id for chunk in batch.chunks}
        assert {r.request_id for r in running} <= scheduled  # no decode is ever paused
        self.run_batch(batch)

    def run_batch(self, batch: Batch) -> None:
        seconds = self.slowness * device_seconds(BatchShape.of(batch))
        self.now += seconds
        self.steps.append((batch, seconds))
        self.scheduler.complete(batch, [1] * len(batch.sampling))
        self.scheduler.budget.observe(batch, seconds)

    def add(self, name: str, prompt: int, output: int, *, is_scored: bool = False) -> Request:
        request = make_request(name, prompt, output, at=self.now, is_scored=is_scored)
        self.scheduler.add(request)
        return request

    def run(self) -> None:
        for _ in range(20_000):
            if not self.scheduler.has_requests:
                return
            self.step()
        raise AssertionError("it does not end")


class OrderedDevice(Device):
    """A device that notes when each request got its first token."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.first_token_at: dict[str, float] = {}
        self.requests: list[Request] = []

    def step(self) -> None:
        super().step()
        for request in self.requests:
            if request.output_token_ids:
                self.first_token_at.setdefault(request.request_id, self.now)

    def put(self, name: str, prompt: int, output: int, targets: Targets) -> Request:
        request = make_request(name, prompt, output, targets, self.now)
        self.scheduler.add(request)
        self.requests.append(request)
        return request


def make_request(
    name: str,
    prompt: int = 100,
    output: int = 4,
    targets: Targets | None = None,
    at: float = 0.0,
    *,
    is_scored: bool = False,
) -> Request:
    logprobs = 1 if is_scored else None
    params = SamplingParams(
        temperature=0, max_tokens=output, ignore_eos=True, prompt_logprobs=logprobs
    )
    return Request(
        name,
        [1] * prompt,
        params,
        max_tokens=output,
        arrived_at=at,
        targets=targets or Targets(),
    )


def make_device(
    order: str = "fcfs",
    *,
    is_fair: bool = False,
    places: int = 64,
    blocks: int = 20_000,
    slo_s: float = SLO_S,
) -> OrderedDevice:
    budget = SloBudget(slo_s, StepTimePredictor(MODEL), tile_tokens=TILE)
    config = SchedulerConfig("sarathi", places, 16_000, prefill_order=order, is_fair=is_fair)
    return OrderedDevice(Scheduler(config, BlockPool(blocks, 16), budget))
