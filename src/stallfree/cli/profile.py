"""`stallfree profile`: measure how long iterations take, and say which budget fits which target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from stallfree.core.step_time import BatchShape, StepTimeModel
TARGETS_MS = (50, 100, 200, 500, 1000)
CURVE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256)
_NUM_HELD_OUT, _HELD_OUT_ROUNDS, _HELD_OUT_SEED = 40, 1, 1
_QUANTILE = 0.95
_BESIDE, _CONTEXT = 8, 500  # answers beside a prompt, and their context, in the table of budgets


def profile(
    engine: EngineSettings,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="ROUNDS", help="How often each batch is measured.")
    ] = 3,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Also write the profile here; serve finds its own without."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Also draw the time of an iteration by its tokens."),
    ] = None,
) -> None:
    """Measure this machine: a minute or two for the demo model.

    Runs batches of chosen compositions, fits the step-time model that `serve --tbt-slo` uses, keeps
    it for later starts, and checks it on other batches, drawn at random. Prints the time of an
    iteration by its tokens, the tile of the matrix kernels, and the token budget that fits each
    target. Let nothing else run.
    """
    from rich.console import Console

    from stallfree.engine.build import build_engine
    from stallfree.engine.profile import measure_profile, write_profile
    from stallfree.engine.profile_batches import hybrid, measure
    from stallfree.engine.progress import progress

    if picture is not None:
        _import_pyplot()  # before minutes of measuring
    built = build_engine(engine)
    facts, pool = built.facts, built.scheduler.pool
    held_out = hybrid(facts.max_model_len, _NUM_HELD_OUT, _HELD_OUT_SEED)
    with progress(True) as bar:
        task = bar.add_task("measuring", total=None)

        def on_batch(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        made = measure_profile(built.executor, pool, facts, on_batch, rounds, finds_tile=True)
        bar.update(task, description="checking")
        checked = measure(
            built.executor, pool, facts.vocab_size, held_out, _HELD_OUT_ROUNDS, on_batch
        )
    if output is not None:
        write_profile(output, made, facts)
    curve = {n: _plain_seconds(made.times, n) for n in CURVE_TOKENS}
    if picture is not None:
        _draw(curve, picture)
    console = Console()
    console.print(_curve(curve))
    lines = (_tile(made.tile_tokens, facts.tile_tokens), _check(made.times, checked))
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    console.print(_budgets(made.times, max(made.tile_tokens, facts.tile_tokens)))


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


def _plain_seconds(times: StepTimeModel, num_tokens: int) -> float:
    """A chunk at the start of its prompt, and nothing else."""
    from stallfree.core.step_time import BatchShape, chunk_context

    return times.seconds(BatchShape(num_tokens, chunk_context(0, num_tokens), 0, 1))


def _curve(seconds: Mapping[int, float]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="an iteration by its tokens", title_justify="left", box=box.SIMPLE)
    for title in ("tokens", "ms", "ms a token"):
        table.add_column(title, justify="right")
    table.add_column("")
    longest = max(seconds.values())
    for tokens, own in seconds.items():
        bar = "\u2588" * max(1, round(40 * own / longest))
        table.add_row(str(tokens), f"{own * 1000:.1f}", f"{own * 1000 / tokens:.2f}", bar)
    return table


def _import_pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(seconds: Mapping[int, float], path: Path) -> None:
    """Draw the curve, and beside it what a token costs."""
    pyplot = _import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    tokens = list(seconds)
    left.plot(tokens, [seconds[n] * 1000 for n in tokens], marker="o")
    left.set(xlabel="tokens of an iteration", ylabel="ms", xlim=(0, None), ylim=(0, None))
    right.plot(tokens, [seconds[n] * 1000 / n for n in tokens], marker="o")
    right.set(xlabel="tokens of an iteration", ylabel="ms a token", xscale="log", ylim=(0, None))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    pyplot.close(figure)


def _tile(found: int, expected: int) -> str:
    if found == 1:
        return f"No tile shows in the times; chunks are cut to {expected}, the kernels' own rows."
    return f"Times rise in tiles of {found} tokens; chunks are cut to {max(found, expected)}."


def _check(times: StepTimeModel, checked: Sequence[tuple[BatchShape, float]]) -> str:
    """How well batches are predicted that the model was not fitted to, one after the other.

    As while serving: what a batch took is learned from before the next is predicted.
    """
    from stallfree.core.step_time import StepTimePredictor

    if not checked:
        return "The KV cache is too small for the batches that would check the model."
    predictor = StepTimePredictor(times, _QUANTILE)
    errors, num_within = [], 0
    for shape, seconds in checked:
        expected = predictor.seconds(shape)
        errors.append(abs(expected / seconds - 1))
        num_within += seconds <= expected * predictor.margin
        predictor.observe(shape, seconds)
    return (
        f"{len(errors)} hybrid batches drawn at random, each predicted while serving the others: "
        f"median error {median(errors):.1%}; {num_within / len(errors):.0%} were within the "
        f"{_QUANTILE:.0%} quantile"
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
