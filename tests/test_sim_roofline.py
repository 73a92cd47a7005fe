"""Step times from operations and bytes: how they move with each thing that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from stallfree.core.batch import Batch, Chunk
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.errors import ConfigError
from stallfree.sim.data import load_device, load_model_shape
from stallfree.sim.roofline import Efficiency, Roofline

REQUEST = Request("any", (0,), SamplingParams(), max_tokens=1)
MODELS = ["mistral-7b", "yi-34b", "llama2-70b", "falcon-180b"]


def decodes(count: int, context: int) -> list[Chunk]:
    """Each with so many tokens of context, its own included."""
    return [Chunk(REQUEST, context - 1, 1, samples=True, is_decode=True)] * count


def prefill(num_tokens: int, start: int = 0) -> list[Chunk]:
    return [Chunk(REQUEST, start, num_tokens, samples=True, is_decode=False)]


def roofline(
    model: str = "yi-34b",
    tensor: int = 2,
    pipeline: int = 1,
    device: str = "a100-80gb",
    *,
    is_one_node: bool = True,
    window: int | None = None,
    **efficiency: float,
) -> Roofline:
    shape = replace(load_model_shape(model), sliding_window=window)
    own = Efficiency(**efficiency)  # type: ignore[arg-type]
    return Roofline(load_device(device), shape, tensor, pipeline, own, is_one_node=is_one_node)


def seconds(times: Roofline, *parts: Sequence[Chunk]) -> float:
    return sum(times.seconds(Batch([chunk for part in parts for chunk in part])))


@pytest.mark.parametrize(
    ("model", "tensor", "low_ms", "high_ms"), [("yi-34b", 2, 35, 42), ("mistral-7b", 1, 19, 23)]
)
def test_decodes_take_a_fifth_of_the_strict_target_of_the_paper(
    model: str, tensor: int, low_ms: float, high_ms: float
) -> None:
    """Section 5.1: five times an iteration of 32 decodes at 4,096; 0.2 s and 0.1 s."""
    times = Roofline(load_device("a100-80gb-pcie"), load_model_shape(model), tensor)
    assert low_ms < 1000 * seconds(times, decodes(32, 4096)) < high_ms


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("window", [None, 700])
def test_more_tokens_and_longer_contexts_never_take_less(model: str, window: int | None) -> None:
    times = roofline(model, 8, window=window)
    sizes = [1, 2, 100, 128, 129, 500, 512, 513, 1000, 2048]
    runs = [
        [seconds(times, prefill(size)) for size in sizes],
        [seconds(times, prefill(512, start)) for start in (0, 1, 300, 600, 699, 700, 3000)],
        [seconds(times, decodes(count, 1000)) for count in (1, 2, 31, 32, 128, 129)],
        [seconds(times, decodes(32, context)) for context in (1, 2, 699, 700, 701, 4096)],
        [seconds(times, decodes(32, 1000), prefill(size)) for size in sizes],
    ]
    for run in runs:
        assert all(0 < earlier <= later for earlier, later in pairwise(run))
        assert run[0] < run[-1]


def test_a_chunk_beside_decodes_takes_less_than_both_alone() -> None:
    times = roofline()
    both = seconds(times, decodes(32, 1000), prefill(256))
    assert max(seconds(times, decodes(32, 1000)), seconds(times, prefill(256))) < both
    assert both < seconds(times, decodes(32, 1000)) + seconds(times, prefill(256))


def test_chunks_of_a_prompt_read_its_beginning_again() -> None:
    times = roofline()
    whole = seconds(times, prefill(4096))
    chunked = sum(seconds(times, prefill(512, start)) for start in range(0, 4096, 512))
    assert whole < chunked < 1.3 * whole  # section 5.4.1: a quarter at most


@pytest.mark.parametrize("batch", [decodes(32, 2000), prefill(1024)])
def test_more_devices_of_a_stage_are_faster_and_not_by_as_much(batch: list[Chunk]) -> None:
    one, two, four = (seconds(roofline("mistral-7b", count), batch) for count in (1, 2, 4))
    assert one / 2 < two < one
    assert two / 2 < four < two


@pytest.mark.parametrize("batch", [decodes(32, 2000), prefill(1024)])
@pytest.mark.parametrize("model", MODELS)
def test_more_stages_share_the_layers(model: str, batch: list[Chunk]) -> None:
    whole = seconds(roofline(model, 4), batch)
    longest = whole
    for count in (2, 3, 4, 8):
        stages = roofline(model, 4, count).seconds(Batch(batch))
        assert len(stages) == count
        assert max(stages) < longest
        assert whole < sum(stages) < 1.1 * whole
        longest = max(stages)


def test_layers_that_do_not_divide_are_spread() -> None:
    times = roofline("yi-34b", 2, 7)  # 60 layers: 9, 9, 9, 9, 8, 8, 8
    stages = times.seconds(Batch(decodes(1, 100)))
    assert stages[0] == stages[3] > stages[4] == stages[5]
    assert stages[0] / stages[4] == pytest.approx(9 / 8, rel=0.02)


def test_a_stage_has_a_layer_at_least() -> None:
    assert all(each > 0 for each in roofline("mistral-7b", 1, 32).seconds(Batch(decodes(1, 1))))
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 33; mistral-7b has 32 layers"):
        roofline("mistral-7b", 1, 33)


def test_the_network_costs_tensor_parallelism_more_than_a_pipeline() -> None:
    """Section 5.4.2: Falcon-180B in two nodes, all over the network or a pipeline of two."""
    batch = decodes(32, 1000)
    across = seconds(roofline("falcon-180b", 8, is_one_node=False), batch)
    within = seconds(roofline("falcon-180b", 8), batch)
    split = roofline("falcon-180b", 4, 2, is_one_node=False)
    assert across > 1.3 * within
    assert max(split.seconds(Batch(batch))) < across
    nearer = roofline("falcon-180b", 4, 2)
    assert split.seconds(Batch(batch))[0] > nearer.seconds(Batch(batch))[0]
    assert split.seconds(Batch(batch))[1] == nearer.seconds(Batch(batch))[1]  # it sends nothing


def test_a_window_is_all_that_a_token_attends_to() -> None:
    full, cut = roofline(), roofline(window=1000)
    for batch in (decodes(32, 1000), prefill(1000), prefill(200, 800)):
        assert seconds(cut, batch) == seconds(full, batch)
    assert seconds(cut, decodes(32, 1001)) == seconds(full, decodes(32, 1000))
    assert seconds(cut, decodes(32, 4000)) == seconds(full, decodes(32, 1000))
    assert seconds(cut, prefill(200, 801)) < seconds(full, prefill(200, 801))
    assert seconds(cut, prefill(200, 999)) == seconds(cut, prefill(200, 3000))
    assert seconds(cut, prefill(4000)) < seconds(full, prefill(4000))


@pytest.mark.parametrize("window", [1, 5, 64, 300])
@pytest.mark.parametrize("start", [0, 3, 63, 64, 65, 500])
def test_a_chunk_in_a_window_takes_what_its_tokens_attend_to(window: int, start: int) -> None:
    """Attention alone, where arithmetic is all that counts, against each token of the chunk."""
    times = roofline(window=window, attention=1e-15)
    products = sum(min(at + 1, window) for at in range(start, start + 70))
    unit = seconds(roofline(window=1, attention=1e-15), prefill(1))  # one product
    assert seconds(times, prefill(70, start)) == pytest.approx(products * unit, rel=1e-4)


def test_launching_is_a_floor_of_each_layer() -> None:
    free, slow = roofline(), roofline(launch_s=800e-6)
    output_s = seconds(roofline(launch_s=1.0), decodes(1, 10)) - 60 * 1.0
    assert seconds(slow, decodes(1, 10)) == pytest.approx(60 * 800e-6 + output_s)
    assert seconds(free, decodes(1, 10)) < seconds(slow, decodes(1, 10))
    assert seconds(free, prefill(4096)) == seconds(slow, prefill(4096))
    stages = roofline(pipeline=4, launch_s=800e-6).seconds(Batch(decodes(1, 10)))
    assert all(each >= 15 * 800e-6 for each in stages)


def test_each_request_costs_the_processor_as_much() -> None:
    free, slow = roofline(pipeline=2), roofline(pipeline=2, sequence_s=50e-6)
    batch = Batch([*decodes(10, 100), *prefill(300)])
    first, second = slow.seconds(batch)
    assert first == pytest.approx(free.seconds(batch)[0] + 11 * 50e-6)
    assert second == free.seconds(batch)[1]


def test_memory_is_what_weights_leave() -> None:
    assert roofline("yi-34b", 1).kv_cache_tokens == pytest.approx(34e3, rel=0.1)
    assert roofline("yi-34b", 2).kv_cache_tokens == pytest.approx(350e3, rel=0.1)
    assert roofline("yi-34b", 1, 2).kv_cache_tokens == roofline("yi-34b", 2).kv_cache_tokens
    assert roofline("falcon-180b", 2).kv_cache_tokens == 0
