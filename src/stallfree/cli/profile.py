"""`stallfree profile`: measure how long iterations take, and say which budget fits which target."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.engine.settings import EngineSettings

if TYPE_CHECKING:
    from rich.table import Table

    from stallfree.core.step_time import BatchShape, StepTimeModel
    from stallfree.engine.profile import Composition

TARGETS_MS = (50, 100, 200, 500, 1000)
CURVE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256)
_HELD_OUT, _HELD_OUT_ROUNDS = 30, 2
_QUANTILE = 0.95
_BESIDE, _CONTEXT = 8, 500  # answers beside a prompt, and their context, in the table of budgets


def profile(
    engine: EngineSettings,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="ROUNDS", help="How often each batch is measured.")
    ] = 6,
) -> None:
    """Measure this machine: about a minute for the demo model.

    Runs batches of chosen compositions, fits the step-time model that `serve --tbt-slo` uses, keeps
    it for later starts, and checks it on other batches, drawn at random. Prints the time of an
    iteration by its tokens, and the token budget that fits each target. Let nothing else run.
    """
    from rich.console import Console

    from stallfree.engine.build import build_engine, progress
    from stallfree.engine.profile import measure, measure_times

    built = build_engine(engine)
    facts, pool = built.facts, built.scheduler.pool
    held_out = random_compositions(min(facts.max_model_len, 8192), _HELD_OUT)
    with progress(True) as bar:
        task = bar.add_task("measuring", total=None)

        def on_batch(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        times = measure_times(built.executor, pool, facts, on_batch, rounds)
        bar.update(task, description="checking")
        checked = measure(
            built.executor, pool, facts.vocab_size, held_out, _HELD_OUT_ROUNDS, on_batch
        )
    console = Console()
    console.print(_curve(times))
    console.print(_check(times, checked), highlight=False, soft_wrap=True)
    console.print(_budgets(times, facts.tile_tokens))


def random_compositions(max_context: int, count: int) -> list[Composition]:
    """Hybrid batches drawn at random: up to 16 decodes beside a chunk of up to 128 tokens."""
    from stallfree.engine.profile import Composition

    rng = random.Random(1)
    made = []
    for _ in range(count):
        chunk = rng.randrange(1, min(129, max_context))
        made.append(
            Composition(
                decodes=tuple(rng.randrange(1, max_context) for _ in range(rng.randrange(1, 17))),
                chunk_start=rng.randrange(0, max_context - chunk),
                chunk_tokens=chunk,
            )
        )
    return made


def largest_budget(times: StepTimeModel, target_s: float, tile_tokens: int) -> int | None:
    """The largest static budget whose iterations are within a target, in whole tiles.

    With `_BESIDE` answers at `_CONTEXT` tokens of context beside a chunk at the same context.
    """
    from stallfree.core.step_time import BatchShape, chunk_context

    best = None
    for tokens in range(tile_tokens, 8192, tile_tokens):
        chunk = max(0, tokens - _BESIDE)
        shape = BatchShape(
            max(tokens, _BESIDE), chunk_context(_CONTEXT, chunk), _BESIDE * _CONTEXT, _BESIDE + 1
        )
        if times.seconds(shape) > target_s:
            return best
        best = tokens
    return best


def _curve(times: StepTimeModel) -> Table:
    from rich import box
    from rich.table import Table

    from stallfree.core.step_time import BatchShape, chunk_context

    table = Table(title="an iteration by its tokens", title_justify="left", box=box.SIMPLE)
    for title in ("tokens", "ms", "ms a token"):
        table.add_column(title, justify="right")
    table.add_column("")
    seconds = {n: times.seconds(BatchShape(n, chunk_context(0, n), 0, 1)) for n in CURVE_TOKENS}
    longest = max(seconds.values())
    for tokens, own in seconds.items():
        bar = "\u2588" * max(1, round(40 * own / longest))
        table.add_row(str(tokens), f"{own * 1000:.1f}", f"{own * 1000 / tokens:.2f}", bar)
    return table


def _check(times: StepTimeModel, checked: Sequence[tuple[BatchShape, float]]) -> str:
    """How well batches are predicted that the model was not fitted to."""
    if not checked:
        return "The KV cache is too small for the batches that would check the model."
    ratios = [seconds / times.seconds(shape) for shape, seconds in checked]
    scatter = sorted(times.scatter)
    margin = max(1.0, scatter[min(len(scatter) - 1, int(_QUANTILE * len(scatter)))])
    error = median(abs(ratio - 1) for ratio in ratios)
    within = sum(ratio <= margin for ratio in ratios) / len(ratios)
    return (
        f"{len(ratios)} hybrid batches drawn at random: median error {error:.1%}; "
        f"{within:.0%} were within the margin for {_QUANTILE:.0%} ({margin:.2f} x the prediction)"
    )


def _budgets(times: StepTimeModel, tile_tokens: int) -> Table:
    from rich import box
    from rich.table import Table

    caption = f"with {_BESIDE} answers at {_CONTEXT} tokens of context; tiles of {tile_tokens}"
    table = Table(title="static budgets", title_justify="left", caption=caption, box=box.SIMPLE)
    for title in ("target ms", "--token-budget"):
        table.add_column(title, justify="right")
    for target in TARGETS_MS:
        budget = largest_budget(times, target / 1000, tile_tokens)
        table.add_row(f"{target:,}", "none: too slow" if budget is None else f"{budget:,}")
    return table
