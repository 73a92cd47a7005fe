"""Decodes that several batches share, and iterations that are repeated at once."""

from __future__ import annotations

from schedulers import request, run_to_end, scheduler

from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.repeats import num_repeats, repeat
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.targets import Targets


def test_decodes_that_have_no_share_wait_in_line() -> None:
    """Four decodes, a share of one, and two batches in flight: three are ready each time."""
    config = SchedulerConfig(num_stages=4)
    own = Scheduler(config, BlockPool(100, 4), StaticBudget(64))
    for name in "abcd":
        own.add(request(name, max_tokens=40))
    first = own.schedule()
    assert first is not None
    own.complete(first, [1] * 4)
    order, in_flight = [], []
    for _ in range(40):
        batch = own.schedule()
        assert batch is not None
        in_flight.append(batch)
        order += [chunk.request.request_id for chunk in batch.chunks]
        if len(in_flight) == 2:
            own.complete(in_flight.pop(0), [1])
    assert "".join(order) == "abcd" * 10


def test_iterations_that_are_repeated_leave_what_single_ones_leave() -> None:
    def after(repeats: bool) -> tuple[object, ...]:
        config = SchedulerConfig(max_model_len=64, is_fair=True)
        own = Scheduler(config, BlockPool(40, 4), StaticBudget(64))
        sizes = {"short": (5, 12), "long": (9, 30)}
        for name, (num_prompt, max_tokens) in sizes.items():
            made = Request(
                name,
                range(num_prompt),
                SamplingParams(ignore_eos=True),
                max_tokens=max_tokens,
                targets=Targets(user=name),
            )
            own.add(made)
        batches = [own.schedule()]
        for _ in range(2):  # the prompts, then decodes
            assert batches[-1] is not None
            own.complete(batches[-1], [7] * 2)
            batches.append(own.schedule())
        batch = batches[-1]
        assert batch is not None
        own.complete(batch, [7] * 2)
        assert num_repeats(own, batch) == 12 - 3 - 1
        if repeats:
            repeat(own, batch, 7, 3)
            repeat(own, batch, 7, num_repeats(own, batch))
            assert num_repeats(own, batch) == 0
        else:
            for _ in range(8):
                batch = own.schedule()
                assert batch is not None
                own.complete(batch, [7] * 2)
        own.check_integrity()
        state = [
            (list(r.output_token_ids), r.num_computed_tokens, len(r.block_table))
            for r in own.running
        ]
        assert own.counters is not None
        counters = [own.counters[name] for name in sizes]
        rest = [[chunk.start for chunk in each.chunks] for each in run_to_end(own)]
        assert own.pool.num_free == 40
        return state, counters, rest

    assert after(repeats=True) == after(repeats=False)


def test_what_cannot_be_repeated() -> None:
    def repeats(*requests: Request, num_blocks: int = 40, waits: bool = False) -> int:
        own = scheduler(num_blocks)
        for each in requests:
            own.add(each)
        for _ in range(2):
            batch = own.schedule()
            assert batch is not None
            own.complete(batch, [7] * len(batch.sampling))
        if waits:
            own.add(request("waits"))
        assert batch is not None
        return num_repeats(own, batch)

    plain = SamplingParams()
    stops = SamplingParams(ignore_eos=True, stop_token_ids=(9,))
    assert repeats(request("a"), request("b", max_tokens=5)) == 2
    assert repeats(request("a", max_tokens=28), num_blocks=8) == 25
    assert repeats(request("a"), waits=True) == 0
    assert repeats(request("a"), request("b", num_prompt=30)) == 0  # whose prompt is being read
    assert repeats(Request("a", range(4), plain, max_tokens=8)) == 0
    assert repeats(Request("a", range(4), stops, max_tokens=8)) == 0
    assert repeats(*(request(f"{i}", 4, 20) for i in range(2)), num_blocks=6) == 0  # one must go
