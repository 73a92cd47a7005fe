"""A batch as workers take it: all that it needs of its requests, and nothing of their state."""

from __future__ import annotations

import copyreg
from dataclasses import dataclass
from types import MappingProxyType

from stallfree.core.batch import Batch, Chunk
from stallfree.core.request import Request
from stallfree.executor.copier import NO_BLOCK_COPIES, BlockCopies
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.sampler import SamplerRow


def _read_only(values: dict[int, float]) -> MappingProxyType[int, float]:
    return MappingProxyType(values)


# Sampling parameters hold such a view, and Python does not say how to send it.
copyreg.pickle(MappingProxyType, lambda view: (_read_only, (dict(view),)))


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row that a token is sampled from.

    Attributes:
        row: of the batch.
        sampler: how.
        num_logprobs: likeliest tokens to tell with it; None if no log probabilities are asked for.
    """

    row: int
    sampler: SamplerRow
    num_logprobs: int | None


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Consecutive rows whose next tokens are known, and get log probabilities.

    Attributes:
        first_row: of the batch.
        targets: the next token of each row.
        num_logprobs: likeliest tokens to tell with each.
    """

    request_id: str
    first_row: int
    targets: tuple[int, ...]
    num_logprobs: int


@dataclass(frozen=True, slots=True)
class Step:
    """One batch. It is sent to every process of a model.

    Attributes:
        input: its tokens, and the block tables of their requests.
        sampled: one for each chunk of `Batch.sampling`, in order.
        scored: where requests asked for the log probabilities of their prompts.
        copies: of KV, before anything else.
    """

    input: ModelInput
    sampled: tuple[SampledRow, ...]
    scored: tuple[ScoredRows, ...]
    copies: BlockCopies = NO_BLOCK_COPIES


def step_of(batch: Batch) -> Step:
    """The batch's chunks one after the other."""
    token_ids: list[int] = []
    chunks, sampled, scored = [], [], []
    for chunk in batch.chunks:
        request, first_row = chunk.request, len(token_ids)
        chunks.append(Rows(first_row, chunk.start, chunk.stop, request.block_table))
        token_ids += request.tokens(chunk.start, chunk.stop)
        if _wants_prompt_logprobs(chunk):
            targets = request.prompt_token_ids[chunk.start + 1 : chunk.stop + 1]
            wanted = request.params.prompt_logprobs or 0
            scored.append(ScoredRows(request.request_id, first_row, targets, wanted))
        if chunk.samples:
            row = len(token_ids) - 1
            sampled.append(SampledRow(row, _sampler_row(request), request.params.logprobs))
    copies = BlockCopies.of(batch.copies) if batch.copies else NO_BLOCK_COPIES
    return Step(
        ModelInput(token_ids, chunks),
        tuple(sampled),
        tuple(scored),
        copies,
    )


def _wants_prompt_logprobs(chunk: Chunk) -> bool:
    request = chunk.request
    wants = request.params.prompt_logprobs is not None
    return wants and chunk.start < request.num_prompt_tokens - 1


def _sampler_row(request: Request) -> SamplerRow:
    """With the request's tokens only where a penalty looks at them: a prompt may be long."""
    params = request.params
    repeats = params.repetition_penalty != 1
    counts = repeats or params.presence_penalty or params.frequency_penalty
    return SamplerRow(
        params=params,
        seed=request.seed,
        num_output_tokens=request.num_output_tokens,
        prompt_token_ids=request.prompt_token_ids if repeats else (),
        output_token_ids=request.output_token_ids if counts else (),
        end_token_ids=request.end_token_ids,
    )
