"""All completions that have not ended, and what becomes of them: text, or an error.

The scheduler knows requests by an id of their own; here they are found by it, and by the id that
their client gave to all completions of a prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from stallfree.core.batch import Batch
from stallfree.core.request import FinishReason, Request
from stallfree.core.scheduler import Scheduler
from stallfree.engine.clock import Clock
from stallfree.engine.completion import Completion
from stallfree.engine.observer import Observers
from stallfree.engine.outputs import Delta
from stallfree.engine.tokenizer import Tokenizer
from stallfree.errors import EngineError, ExecutorError, OutOfMemoryError
from stallfree.executor.output import ExecutorOutput

logger = logging.getLogger(__name__)
first_token_logger = logging.getLogger("stallfree.first_token")


class Completions:
    """Begins completions, turns what iterations gave into deltas, and ends them.

    Args:
        scheduler: runs their requests.
        tokenizer: turns tokens into text.
        clock: stamps ends.
        observers: told of beginnings and ends.
    """

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, clock: Clock, observers: Observers
    ) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._clock = clock
        self._observers = observers
        self._completions: dict[str, Completion] = {}  # by the scheduler's request id
        self._request_ids: dict[str, list[str]] = {}  # the client's to the scheduler's
        self._predicted_s: dict[str, float] = {}  # to the first token, by the scheduler's id

    def __contains__(self, request_id: str) -> bool:
        """Whether a request of a client has a completion that has not ended."""
        return request_id in self._request_ids

    @property
    def num_known(self) -> int:
        """Entries of all that is kept; nothing is once all have ended."""
        return len(self._completions) + len(self._request_ids) + len(self._predicted_s)

    def add(self, request_id: str, requests: Sequence[Request], predicted_s: float | None) -> None:
        """Begin the completions of a prompt: all of them or none.

        Args:
            request_id: the client's; it is not in use.
            requests: one for each completion, not added to the scheduler yet.
            predicted_s: seconds to the first token of the first, if that was predicted.
        """
        first_id = requests[0].request_id
        if predicted_s is not None:
            self._predicted_s[first_id] = predicted_s
        added = self._request_ids[request_id] = []
        try:
            for index, request in enumerate(requests):
                completion = Completion(request_id, index, request, self._tokenizer)
                self._scheduler.add(request)
                self._completions[request.request_id] = completion
                added.append(request.request_id)
                self._observers.added(request)
        except BaseException:
            self.abort(request_id)
            self._request_ids.pop(request_id, None)
            self._predicted_s.pop(first_id, None)
            raise

    def abort(self, request_id: str) -> None:
        """End all completions of a client's request, if it has any."""
        for own_id in list(self._request_ids.get(request_id, ())):
            self._finish(self._completions[own_id], FinishReason.ABORT)

    def report(self, batch: Batch, output: ExecutorOutput) -> list[Delta]:
        """What a completed batch added to them."""
        for own_id, logprobs in output.prompt_logprobs.items():
            chunk = next(c for c in batch.chunks if c.request.request_id == own_id)
            if own_id in self._completions:
                self._completions[own_id].add_prompt_logprobs(chunk.start, logprobs)
        deltas = []
        for own_id, error in output.failed.items():
            deltas += self.fail([own_id], _reason(error))
        for chunk, sample in zip(batch.sampling, output.samples, strict=True):
            completion = self._completions.get(chunk.request.request_id)
            if completion is None:  # it failed, or was aborted while it was in flight
                continue
            if sample.error is not None:
                deltas.append(self._failure(completion, ExecutorError(sample.error)))
                continue
            self._log_first_token(completion.request)
            try:
                delta = completion.add(sample)
            except Exception as error:
                logger.exception("the text of %s cannot be made", completion.request.request_id)
                deltas.append(self._failure(completion, _reason(error)))
                continue
            if delta.finish_reason is not None:
                self._finish(completion, FinishReason.STOP)
            deltas.append(delta)
        return deltas

    def fail_batch(self, batch: Batch, error: BaseException) -> list[Delta]:
        """End those of a batch that could not be run."""
        return self.fail([chunk.request.request_id for chunk in batch.chunks], _reason(error))

    def fail(self, own_ids: Iterable[str], error: EngineError) -> list[Delta]:
        """End those with these ids of the scheduler that have not ended."""
        known = [self._completions.get(own_id) for own_id in own_ids]
        return [self._failure(each, error) for each in known if each is not None]

    def _failure(self, completion: Completion, error: EngineError) -> Delta:
        self._finish(completion, FinishReason.ERROR)
        return Delta(
            completion.request_id,
            completion.index,
            "",
            finish_reason=FinishReason.ERROR.value,
            error=error,
        )

    def _log_first_token(self, request: Request) -> None:
        """Say when the first token of a request came, beside what was predicted."""
        predicted_s = self._predicted_s.pop(request.request_id, None)
        if predicted_s is not None:
            came_s = self._clock.now() - request.arrived_at
            message = "first token of %s (%s): predicted after %.3f s, came after %.3f s"
            tier = request.targets.tier
            first_token_logger.info(message, request.request_id, tier, predicted_s, came_s)

    def _finish(self, completion: Completion, reason: FinishReason) -> None:
        """Forget a completion, and end its request if the scheduler has not."""
        request = completion.request
        self._scheduler.finish(request, reason)
        self._observers.ended(request, request.finish_reason or reason, self._clock.now())
        self._predicted_s.pop(request.request_id, None)
        del self._completions[request.request_id]
        siblings = self._request_ids[completion.request_id]
        siblings.remove(request.request_id)
        if not siblings:
            del self._request_ids[completion.request_id]


def _reason(error: BaseException) -> ExecutorError:
    """What is said of a request that failed with `error`."""
    message = f"the iteration that held this request failed: {type(error).__name__}: {error}"
    no_memory = isinstance(error, MemoryError | OutOfMemoryError)
    return OutOfMemoryError(message) if no_memory else ExecutorError(message)
