"""Runs batches in this process, on one device, with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from stallfree.core.batch import Batch, Chunk
from stallfree.executor.output import ExecutorOutput, PositionLogprobs, Sample
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.sampler import SamplerRow, likeliest, sample

LOGIT_ROWS = 64  # rows of logits held at once where a prompt's log probabilities are asked for


class _Decoder(Protocol):
    """What runs a batch: see `Decoder` and `Int8Decoder`."""

    def forward(self, batch: ModelInput, cache: Any) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class TorchExecutor:
    """An `Executor` over a decoder and its KV cache."""

    def __init__(self, decoder: _Decoder, cache: Any) -> None:
        self.decoder = decoder
        self.cache = cache

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run the batch as one packed forward pass, then sample."""
        with torch.inference_mode():
            return self._execute(batch)

    def _execute(self, batch: Batch) -> ExecutorOutput:
        hidden = self.decoder.forward(_model_input(batch), self.cache)
        rows, sampling_rows, prompt_logprobs = 0, [], {}
        for chunk in batch.chunks:
            if _wants_prompt_logprobs(chunk):
                scored = hidden[rows : rows + chunk.num_tokens]
                prompt_logprobs[chunk.request.request_id] = self._prompt_logprobs(chunk, scored)
            rows += chunk.num_tokens
            if chunk.samples:
                sampling_rows.append(rows - 1)
        if not sampling_rows:
            return ExecutorOutput((), prompt_logprobs)
        logits = self.decoder.logits(hidden[sampling_rows])
        return ExecutorOutput(_sample(logits, batch.sampling), prompt_logprobs)

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> tuple[PositionLogprobs, ...]:
        """Log probabilities of the prompt tokens that the rows (t, hidden) of a chunk predict."""
        request = chunk.request
        wanted = request.params.prompt_logprobs or 0
        targets = request.prompt_token_ids[chunk.start + 1 : chunk.stop + 1]
        result: list[PositionLogprobs] = []
        for low in range(0, len(targets), LOGIT_ROWS):
            some = targets[low : low + LOGIT_ROWS]
            logprobs = self.decoder.logits(hidden[low : low + len(some)]).log_softmax(dim=-1)
            result += (
                _position(row, token, wanted) for row, token in zip(logprobs, some, strict=True)
            )
        return tuple(result)


def _model_input(batch: Batch) -> ModelInput:
    """The batch's chunks one after the other."""
    token_ids: list[int] = []
    chunks = []
    for chunk in batch.chunks:
        table = chunk.request.block_table
        chunks.append(Rows(len(token_ids), chunk.start, chunk.stop, table))
        token_ids += chunk.request.tokens(chunk.start, chunk.stop)
    return ModelInput(token_ids, chunks)


def _wants_prompt_logprobs(chunk: Chunk) -> bool:
    request = chunk.request
    wants = request.params.prompt_logprobs is not None
    return wants and chunk.start < request.num_prompt_tokens - 1


def _sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> tuple[Sample, ...]:
    asked = [i for i, chunk in enumerate(chunks) if chunk.request.params.logprobs is not None]
    logprobs = dict(zip(asked, logits[asked].log_softmax(dim=-1), strict=True))
    tokens = sample(logits, [_sampler_row(chunk) for chunk in chunks])
    samples = []
    for index, (chunk, token) in enumerate(zip(chunks, tokens, strict=True)):
        if token is None:
            samples.append(Sample(-1, error="the model gave logits that are not finite numbers"))
            continue
        position = None
        if index in logprobs:
            wanted = chunk.request.params.logprobs or 0
            position = _position(logprobs[index], token, wanted)
        samples.append(Sample(token, position))
    return tuple(samples)


def _sampler_row(chunk: Chunk) -> SamplerRow:
    request = chunk.request
    return SamplerRow(
        params=request.params,
        seed=request.seed,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        end_token_ids=request.end_token_ids,
    )


def _position(logprobs: torch.Tensor, token_id: int, wanted: int) -> PositionLogprobs:
    return PositionLogprobs(token_id, float(logprobs[token_id]), likeliest(logprobs, wanted))
