"""Runs batches in this process, on one device, with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stallfree.core.batch import Batch, Chunk
from stallfree.executor.output import ExecutorOutput, PositionLogprobs, Sample
from stallfree.model.attention import Span, make_spans
from stallfree.model.decoder import Decoder, ModelInput, windows_of
from stallfree.model.kv_cache import KVCache
from stallfree.model.sampler import SamplerRow, likeliest, sample

LOGIT_ROWS = 64  # rows of logits held at once where a prompt's log probabilities are asked for


class TorchExecutor:
    """An `Executor` over a decoder and its KV cache."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self._offsets = torch.arange(cache.block_size, device=decoder.device)

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run the batch as one packed forward pass, then sample."""
        with torch.inference_mode():
            return self._execute(batch)

    def _execute(self, batch: Batch) -> ExecutorOutput:
        hidden = self.decoder.forward(self._prepare(batch), self.cache)
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

    def _prepare(self, batch: Batch) -> ModelInput:
        """The batch as tensors, its chunks one after the other."""
        device = self.decoder.device
        token_ids: list[int] = []
        positions, slots = [], []
        spans: dict[int | None, list[Span]] = {w: [] for w in windows_of(self.decoder.config)}
        for chunk in batch.chunks:
            context_slots = self._context_slots(chunk)
            for window, of_window in spans.items():
                of_window += make_spans(
                    len(token_ids), chunk.start, chunk.stop, context_slots, window
                )
            token_ids += chunk.request.tokens(chunk.start, chunk.stop)
            positions.append(torch.arange(chunk.start, chunk.stop, device=device))
            slots.append(context_slots[chunk.start :])
        return ModelInput(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            spans=spans,
        )

    def _context_slots(self, chunk: Chunk) -> torch.Tensor:
        """Slots int64 (chunk.stop,) of all positions up to the chunk's last."""
        block_size = self.cache.block_size
        table = chunk.request.block_table[: -(-chunk.stop // block_size)]
        blocks = torch.tensor(table, device=self.decoder.device)
        return (blocks[:, None] * block_size + self._offsets).flatten()[: chunk.stop]

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
