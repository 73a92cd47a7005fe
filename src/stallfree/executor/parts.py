"""Running a batch in parts when it cannot be run whole: for want of memory, or for one request.

Running tokens again is harmless. A pass that was broken off has written keys and values of its own
tokens alone; the next pass writes the same, and until then nobody reads them. Nor does a part
change an answer: a token's result does not depend on what else is in its batch.
"""

from __future__ import annotations

import logging
from collections import deque

from stallfree.core.batch import Batch, Chunk
from stallfree.errors import WorkersLostError
from stallfree.executor.output import Executor, ExecutorOutput, PositionLogprobs, Sample

_NOT_RUN = Sample(-1, error="the token before it could not be run")

logger = logging.getLogger(__name__)


def run_in_parts(executor: Executor, batch: Batch) -> ExecutorOutput:
    """Run `batch`; if that fails, once more, then in halves, and so on with a half that fails.

    The decodes go first, without the prompts. A request fails if one of its tokens cannot be run
    even alone; the others are run.

    Raises:
        WorkersLostError: what runs it was lost.
        Exception: nothing of the batch could be run; it is what the last part failed with.
    """
    try:
        return executor.execute(batch)
    except WorkersLostError:
        raise
    except Exception:
        logger.warning("an iteration of %d tokens is run in parts", batch.num_tokens, exc_info=True)
    return _Parts(batch).run(executor)


class _Parts:
    """What is left of a batch, and what came of the rest of it."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._left = deque([batch])
        self._samples: dict[str, Sample] = {}
        self._logprobs: dict[str, tuple[PositionLogprobs, ...]] = {}
        self._failed: dict[str, Exception] = {}

    def run(self, executor: Executor) -> ExecutorOutput:
        """Run all that is left."""
        while self._left:
            part = self._left.popleft()
            if _id(part.chunks[0]) in self._failed:  # the rest of a single prompt
                continue
            error = self._try(executor, part)
            if error is None:
                continue
            halves = part.halves()
            self._left.extendleft(reversed(halves))
            if not halves:
                logger.error("%s cannot be run even alone: %r", _id(part.chunks[0]), error)
                self._failed[_id(part.chunks[0])] = error
        if len(self._failed) == len(self._batch.chunks):
            raise next(reversed(self._failed.values()))
        samples = [self._samples.get(_id(chunk), _NOT_RUN) for chunk in self._batch.sampling]
        return ExecutorOutput(tuple(samples), self._logprobs, self._failed)

    def _try(self, executor: Executor, part: Batch) -> Exception | None:
        """Run a part and keep what comes of it, or return why it failed."""
        try:
            output = executor.execute(part)
        except WorkersLostError:
            raise
        except Exception as error:
            # its frames would keep what they allocated
            error.__traceback__ = error.__context__ = error.__cause__ = None
            return error
        for chunk, sample in zip(part.sampling, output.samples, strict=True):
            self._samples[_id(chunk)] = sample
        for own_id, logprobs in output.prompt_logprobs.items():
            self._logprobs[own_id] = (*self._logprobs.get(own_id, ()), *logprobs)
        return None


def _id(chunk: Chunk) -> str:
    return chunk.request.request_id
