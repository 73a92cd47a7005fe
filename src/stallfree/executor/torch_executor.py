"""Runs batches in this process, on one device, with PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from stallfree.core.batch import Batch
from stallfree.executor.output import ExecutorOutput, PositionLogprobs, Sample
from stallfree.executor.step import SampledRow, ScoredRows, Step, step_of
from stallfree.model.model_input import ModelInput
from stallfree.model.part import ModelPart
from stallfree.model.peers import Exchange
from stallfree.model.sampler import likeliest, sample

_NO_MEMORY = "DefaultCPUAllocator"  # what PyTorch's errors name when the CPU's memory is used up
LOGIT_ROWS = 64  # rows of logits held at once where a prompt's log probabilities are asked for


class _Decoder(Protocol):
    """What runs a batch: see `Decoder` and `Int8Decoder`."""

    part: ModelPart

    def forward(
        self, batch: ModelInput, cache: Any, hidden: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def exchanges(self, rows: int, logits: Sequence[int]) -> list[Exchange]: ...


class TorchExecutor:
    """An `Executor` over a decoder and its KV cache."""

    def __init__(self, decoder: _Decoder, cache: Any) -> None:
        self.decoder = decoder
        self.cache = cache

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run the batch as one packed forward pass, then sample.

        Raises:
            MemoryError: there is no memory for it.
        """
        step = step_of(batch)
        return self.finish(step, self.forward(step))

    def forward(self, step: Step, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (T, hidden) after the layers of the decoder: see `Decoder.forward`.

        Raises:
            MemoryError: there is no memory for it.
        """
        with memory_errors(), torch.inference_mode():
            return self.decoder.forward(step.input, self.cache, hidden)

    def finish(self, step: Step, hidden: torch.Tensor) -> ExecutorOutput:
        """Sample from the last hidden states (T, hidden).

        Raises:
            MemoryError: there is no memory for it.
        """
        with memory_errors(), torch.inference_mode():
            return self._finish(step, hidden)

    def exchanges(self, step: Step) -> list[Exchange]:
        """What the processes of a stage exchange in `forward` and, if it is the last, `finish`."""
        logits: list[int] = []
        if self.decoder.part.is_last:
            for rows in step.scored:
                logits += (len(some) for some in _slices(rows))
            logits += [len(step.sampled)] if step.sampled else []
        return self.decoder.exchanges(len(step.input.token_ids), logits)

    def _finish(self, step: Step, hidden: torch.Tensor) -> ExecutorOutput:
        prompt_logprobs = {rows.request_id: self._score(rows, hidden) for rows in step.scored}
        if not step.sampled:
            return ExecutorOutput((), prompt_logprobs)
        logits = self.decoder.logits(hidden[[each.row for each in step.sampled]])
        return ExecutorOutput(_sample(logits, step.sampled), prompt_logprobs)

    def _score(self, rows: ScoredRows, hidden: torch.Tensor) -> tuple[PositionLogprobs, ...]:
        """Log probabilities of the tokens that follow rows of a prompt."""
        result: list[PositionLogprobs] = []
        for some in _slices(rows):
            first = rows.first_row + some.start
            logprobs = self.decoder.logits(hidden[first : first + len(some)]).log_softmax(dim=-1)
            result += (
                _position(row, rows.targets[index], rows.num_logprobs)
                for row, index in zip(logprobs, some, strict=True)
            )
        return tuple(result)


def _slices(rows: ScoredRows) -> Iterator[range]:
    """Which of the rows get their logits at once."""
    count = len(rows.targets)
    for low in range(0, count, LOGIT_ROWS):
        yield range(low, min(low + LOGIT_ROWS, count))


@contextmanager
def memory_errors() -> Iterator[None]:
    """Have what PyTorch raises for want of memory be a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY in str(error):
            raise MemoryError(str(error)) from None
        raise


def _sample(logits: torch.Tensor, rows: Sequence[SampledRow]) -> tuple[Sample, ...]:
    asked = [index for index, row in enumerate(rows) if row.num_logprobs is not None]
    logprobs = {index: logits[index].log_softmax(dim=-1) for index in asked}
    tokens = sample(logits, [row.sampler for row in rows])
    samples = []
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if token is None:
            samples.append(Sample(-1, error="the model gave logits that are not finite numbers"))
            continue
        position = None
        if index in logprobs:
            position = _position(logprobs[index], token, row.num_logprobs or 0)
        samples.append(Sample(token, position))
    return tuple(samples)


def _position(logprobs: torch.Tensor, token_id: int, wanted: int) -> PositionLogprobs:
    return PositionLogprobs(token_id, float(logprobs[token_id]), likeliest(logprobs, wanted))
