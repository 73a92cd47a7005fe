"""How long an iteration takes, predicted from what it holds.

`StepTimeModel` is a fitted function of a batch's composition; every coefficient is at least zero,
so it never falls when something is added. `StepTimePredictor` follows the machine while it serves:
how much faster or slower it is than when it was profiled, how much single iterations scatter, and
what single costs are off.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from stallfree.core.batch import Batch

TOKEN_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SWEEPS = 3000
_SPEED_STEPS = 9  # whose median is the machine's speed: 5 of them move it, 4 cannot
_SLOW_STEPS = 3  # whose median is believed at once if it is slower: 2 of them move it, 1 cannot
_SCATTER_STEPS = 200
_ENOUGH_STEPS = 30  # to forget the scatter of the profile
_SCATTER_QUANTILE = 0.95  # at most: a few iterations have no say in it
_CORRECTED = 0.02  # of the margin, by a miss
_LEAST_CORRECTION, _MOST_CORRECTION = -0.05, 0.25
_SAME_SPEED = 0.1  # relative change of the speed that is no change
_LEARNED = 0.05  # of an error, in one iteration
_LARGEST_ERROR = 0.2  # that is learned from: more is taken for that much
_MOST_LEARNED = 0.5  # of a cost, either way


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the time of a batch depends on.

    Attributes:
        num_tokens: all tokens.
        prefill_context: for each token of a prefill chunk the tokens that it attends to, added up.
        decode_context: the same for decodes.
        num_sampled: rows whose logits are computed: a token is sampled from them, or a request asks
            how likely the tokens of its prompt are.
    """

    num_tokens: int
    prefill_context: int = 0
    decode_context: int = 0
    num_sampled: int = 0

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """The shape of a batch."""
        prefills = [chunk for chunk in batch.chunks if not chunk.is_decode]
        decodes = [chunk.start for chunk in batch.chunks if chunk.is_decode]
        scored = [chunk.num_tokens for chunk in prefills if chunk.request.is_scored]
        return cls(
            num_tokens=batch.num_tokens,
            prefill_context=sum(chunk_context(c.start, c.num_tokens) for c in prefills),
            decode_context=sum(decodes) + len(decodes),
            num_sampled=len(batch.sampling) + sum(scored),
        )


def chunk_context(start: int, num_tokens: int) -> int:
    """What the tokens of a chunk at `start` attend to, added up: start + 1, start + 2, ..."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Seconds of a batch: a rising broken line over its tokens, and a cost of each of the rest.

    Attributes:
        base_s: of the smallest batch.
        knots: tokens at which the line bends, rising; it goes on beyond the last.
        rises_s: how much it rises from each knot to the next.
        prefill_context_s, decode_context_s, sampled_s: cost of one unit of each.
        scatter: time over prediction of the batches that it was fitted to, sorted.
    """

    base_s: float
    knots: tuple[int, ...]
    rises_s: tuple[float, ...]
    prefill_context_s: float
    decode_context_s: float
    sampled_s: float
    scatter: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        costs = self.costs
        if len(self.rises_s) != len(self.knots) - 1 or sorted(set(self.knots)) != list(self.knots):
            raise ValueError(f"{len(self.rises_s)} rises between knots {self.knots}")
        if not all(0 <= cost < float("inf") for cost in costs) or not any(costs):
            raise ValueError(f"step times must be finite, at least 0 and not all 0: {costs}")

    @property
    def _slopes(self) -> tuple[float, float, float]:
        return self.prefill_context_s, self.decode_context_s, self.sampled_s

    def seconds(self, shape: BatchShape) -> float:
        """Predicted seconds; zero for a batch of nothing."""
        if shape.num_tokens == 0:
            return 0.0
        return (
            self.base_s
            + self._line(shape.num_tokens)
            + self.prefill_context_s * shape.prefill_context
            + self.decode_context_s * shape.decode_context
            + self.sampled_s * shape.num_sampled
        )

    def _line(self, num_tokens: int) -> float:
        return sum(map(float.__mul__, self.rises_s, _shares(self.knots, num_tokens)))

    @property
    def costs(self) -> tuple[float, ...]:
        """All coefficients, in the order of `parts`."""
        return (self.base_s, *self.rises_s, *self._slopes)

    def parts(self, shape: BatchShape) -> list[float]:
        """What each coefficient is multiplied by for a batch."""
        return [
            1.0,
            *_shares(self.knots, shape.num_tokens),
            shape.prefill_context,
            shape.decode_context,
            shape.num_sampled,
        ]

    def with_costs(self, costs: Sequence[float]) -> StepTimeModel:
        """The same model with other coefficients."""
        base, *rises, prefill_context, decode_context, sampled = costs
        return StepTimeModel(
            base, self.knots, tuple(rises), prefill_context, decode_context, sampled, self.scatter
        )


def _shares(knots: Sequence[int], num_tokens: int) -> list[float]:
    """How much of each rise lies below `num_tokens`: from 0 to 1, the last one without end."""
    reached = min(max(1, bisect_right(knots, num_tokens)), len(knots) - 1)
    low, high = knots[reached - 1], knots[reached]
    part = max(0.0, (num_tokens - low) / (high - low))
    return [1.0] * (reached - 1) + [part] + [0.0] * (len(knots) - 1 - reached)


def fit(samples: Iterable[tuple[BatchShape, float]]) -> StepTimeModel:
    """The model with the least relative squared error over measured batches.

    Its scatter is that of each half of the shapes against a model fitted to the other half.

    Raises:
        ValueError: there are fewer than two sizes of batch, or a time is not positive.
    """
    measured = list(samples)
    largest = max((shape.num_tokens for shape, _ in measured), default=0)
    knots = tuple(knot for knot in TOKEN_KNOTS if knot < largest)
    knots = (*knots, largest) if largest > 1 else ()
    if len(knots) < 2 or any(not 0 < seconds < float("inf") for _, seconds in measured):
        raise ValueError("step times need batches of 1 token and of more, each with its seconds")
    shapes = list(dict.fromkeys(shape for shape, _ in measured))
    some = set(shapes[::2])
    halves = [
        [each for each in measured if (each[0] in some) == is_some] for is_some in (True, False)
    ]
    scatter = []
    for fitted, checked in (halves, halves[::-1]):
        model = _fit(knots, fitted or measured)
        predicted = [(model.seconds(shape), seconds) for shape, seconds in checked]
        scatter += [seconds / own for own, seconds in predicted if own > 0]  # of few batches, 0
    return replace(_fit(knots, measured), scatter=tuple(sorted(scatter)))


def _fit(knots: tuple[int, ...], measured: Sequence[tuple[BatchShape, float]]) -> StepTimeModel:
    blank = StepTimeModel(1.0, knots, (0.0,) * (len(knots) - 1), 0.0, 0.0, 0.0)
    rows = [[part / seconds for part in blank.parts(shape)] for shape, seconds in measured]
    return blank.with_costs(_least_squares(rows))


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float]:
    """Weights of at least zero whose sums over each row are nearest to 1.

    By coordinate descent on the normal equations (Franc, Hlavac, Navara 2005): each weight in turn
    goes to its best value, cut at zero, until it has stopped to move.
    """
    scales = [max(abs(row[i]) for row in rows) or 1.0 for i in range(len(rows[0]))]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    columns = list(zip(*scaled, strict=True))
    products = [[sum(map(float.__mul__, a, b)) for b in columns] for a in columns]
    weights = [0.0] * len(columns)
    slopes = [-sum(column) for column in columns]
    for _ in range(_SWEEPS):
        moved = 0.0
        for i, own in enumerate(products):
            if own[i] <= 0.0:
                continue
            step = max(0.0, weights[i] - slopes[i] / own[i]) - weights[i]
            if step:
                weights[i] += step
                slopes = [
                    slope + step * product for slope, product in zip(slopes, own, strict=True)
                ]
                moved = max(moved, abs(step))
        if moved < 1e-9:
            break
    return [weight / scale for weight, scale in zip(weights, scales, strict=True)]


class StepTimePredictor:
    """A model that follows the machine it runs on.

    The speed is the median of the last few iterations, time over model: one slow iteration does
    not move it, a lasting change does within five. What an iteration took beyond the speed moves
    the costs of what it held, each by its share.

    The margin begins as a quantile of the scatter, which is each iteration against the median of
    those around it, so that a change of speed is not taken for scatter; not as the highest, which
    a single iteration would set. It is corrected by its own success: a miss widens it, hits narrow
    it, so that in the long run the share of hits is the quantile that was asked for (adaptive
    conformal inference, arXiv 2106.00170). Where the last three iterations alone are slower than
    the speed, it is wider by as much: two slow ones are believed before the speed follows, as each
    further one would be over its target.

    Args:
        model: what was measured.
        quantile: share of iterations that shall take no longer than predicted, times the margin.
        relevant_s: predicted seconds from which on an iteration's scatter counts. A hitch of some
            milliseconds is a large part of a short iteration, but not of those that matter.
    """

    def __init__(
        self, model: StepTimeModel, quantile: float = 0.995, relevant_s: float = 0.0
    ) -> None:
        self.model = model
        self.quantile = quantile
        self._limits = [
            (cost * (1 - _MOST_LEARNED), cost * (1 + _MOST_LEARNED)) for cost in model.costs
        ]
        self._recent: deque[tuple[float, float]] = deque(maxlen=_SPEED_STEPS)
        self._relevant_s = relevant_s
        self._scatter: deque[float] = deque(maxlen=_SCATTER_STEPS)
        self._sorted = sorted(model.scatter)  # until there are enough of its own
        self._correction = 0.0
        # of the iteration in the middle of `_recent` and those after: the speed before, and a miss
        self._judged: deque[tuple[float, bool]] = deque(maxlen=_SPEED_STEPS - _SPEED_STEPS // 2)
        self.speed = 1.0
        self._slowdown = 1.0  # of the last few iterations beyond the speed

    def seconds(self, shape: BatchShape) -> float:
        """Predicted seconds: as likely too low as too high."""
        return self.speed * self.model.seconds(shape)

    @property
    def margin(self) -> float:
        """What `seconds` is multiplied by so that a share `quantile` of iterations is faster."""
        scatter = 1.0
        if self._sorted:
            last = len(self._sorted) - 1
            share = min(self.quantile, _SCATTER_QUANTILE)
            scatter = self._sorted[min(last, int(share * len(self._sorted)))]
        return max(1.0, scatter + self._correction) * self._slowdown

    def observe(self, shape: BatchShape, seconds: float) -> None:
        """Learn from an iteration that took `seconds`."""
        expected = self.model.seconds(shape)
        if expected <= 0.0 or seconds <= 0.0:
            return
        predicted = self.speed * expected
        self._judged.append((self.speed, seconds > predicted * self.margin))
        self._recent.append((expected, seconds / expected))
        ratios = [ratio for _, ratio in self._recent]
        self.speed = median(ratios)
        self._slowdown = max(1.0, median(ratios[-_SLOW_STEPS:]) / self.speed)
        self._learn(shape, seconds / (self.speed * expected) - 1, expected)
        if len(self._recent) == _SPEED_STEPS:
            expected, ratio = self._recent[_SPEED_STEPS // 2]
            if expected * self.speed >= self._relevant_s:
                self._correct(*self._judged[0])
                self._scatter.append(ratio / self.speed)
                if len(self._scatter) >= _ENOUGH_STEPS:
                    self._sorted = sorted(self._scatter)

    def _correct(self, speed: float, is_miss: bool) -> None:
        """Move the margin by an iteration of a few steps ago, predicted when the speed was `speed`.

        What the change to another speed made a miss is none.
        """
        if abs(self.speed / speed - 1) < _SAME_SPEED:
            moved = self._correction + _CORRECTED * (is_miss - (1 - self.quantile))
            self._correction = max(_LEAST_CORRECTION, min(_MOST_CORRECTION, moved))

    def _learn(self, shape: BatchShape, error: float, expected: float) -> None:
        """Move costs against a relative error: those with the largest share of the time most."""
        error = max(-_LARGEST_ERROR, min(_LARGEST_ERROR, error))
        costs = []
        for cost, part, (low, high) in zip(
            self.model.costs, self.model.parts(shape), self._limits, strict=True
        ):
            share = cost * part / expected
            costs.append(max(low, min(high, cost * (1 + _LEARNED * error * share))))
        self.model = self.model.with_costs(costs)
