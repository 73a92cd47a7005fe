"""The engine: requests in, deltas of text out, one iteration a step. Single-threaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from stallfree.core.admission import Admission
from stallfree.core.batch import Batch, Copies
from stallfree.core.counter_random import mix
from stallfree.core.request import FinishReason, Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import DEFAULT_TARGETS, Targets
from stallfree.engine.clock import Clock
from stallfree.engine.completion import Completion
from stallfree.engine.facts import EngineFacts
from stallfree.engine.iteration_file import IterationFile
from stallfree.engine.loop import Iteration, Loop, OneStage
from stallfree.engine.losses import Losses
from stallfree.engine.observer import IterationRecord, Observers
from stallfree.engine.outputs import Delta
from stallfree.engine.request_check import RequestCheck
from stallfree.engine.tokenizer import Tokenizer
from stallfree.errors import (
    CopyError,
    EngineError,
    ExecutorError,
    InvalidRequestError,
    OutOfMemoryError,
    OverloadedError,
    WorkersLostError,
)
from stallfree.executor.output import Executor, ExecutorOutput, WorkerPipeline
from stallfree.executor.rerun import RerunningPipeline

_RESTARTS = 5  # attempts to start workers anew, as those may be lost too

logger = logging.getLogger(__name__)
first_token_logger = logging.getLogger("stallfree.first_token")


class Engine:
    """Runs requests to their end, one iteration a step.

    Args:
        scheduler: decides each iteration.
        executor: runs it.
        pipeline: runs several at once, if it can.
        copy: copies for the executor between the KV cache and the swap space, if there is one; a
            pipeline does that itself.
        clock: stamps arrivals.
        tokenizer: turns tokens into text.
        facts: what all this was built with.
        end_token_ids: tokens that end an output.
        seed: from which requests without a seed draw theirs.
        tiers: targets of requests that have none of their own, by tier.
        admission: who is refused.
        restarts: whether a pipeline that was lost is begun anew.
        iteration_file: where each iteration is noted; None for nowhere.

    Attributes:
        observers: told of requests and iterations.
        is_restarting: whether lost workers are being started anew; may be read from any thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        tokenizer: Tokenizer,
        facts: EngineFacts,
        *,
        end_token_ids: frozenset[int] = frozenset(),
        seed: int = 0,
        tiers: Mapping[str, Targets] | None = None,
        admission: Admission | None = None,
        pipeline: WorkerPipeline | None = None,
        copy: Callable[[Copies], None] | None = None,
        restarts: bool = False,
        iteration_file: IterationFile | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.tokenizer = tokenizer
        self.facts = facts
        self.end_token_ids = end_token_ids
        self._tiers = dict(tiers or {})
        self._check = RequestCheck(facts, self._tiers)
        self.admission = admission or Admission()
        self.observers = Observers()
        self.is_restarting = False
        self._iteration_file = iteration_file
        one = OneStage(lambda: self.executor, copy)
        self._loop = Loop(scheduler, RerunningPipeline(pipeline) if pipeline else one, clock)
        self._workers = pipeline
        self._losses = Losses() if restarts else None
        self._seed = seed
        self._num_added = 0
        self._is_checked = True  # that no KV block is lost, since the last step
        self._completions: dict[str, Completion] = {}  # by the scheduler's request id
        self._request_ids: dict[str, list[str]] = {}  # ours to the scheduler's
        self._predicted_s: dict[str, float] = {}  # to the first token, by the scheduler's id

    @property
    def model_name(self) -> str:
        """Name of the model."""
        return self.facts.model_name

    @property
    def vocab_size(self) -> int:
        """Token ids from 0 up to this are accepted."""
        return self.facts.vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest context in tokens, prompt and output together."""
        return self.scheduler.config.max_model_len

    @property
    def tiers(self) -> Mapping[str, Targets]:
        """Targets of requests that have none of their own, by tier."""
        return self._tiers

    @property
    def has_requests(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.has_requests

    def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
    ) -> int:
        """Most output tokens that a request may have. Safe to call from any thread.

        Raises:
            InvalidRequestError: the request cannot be run; ContextLengthError if it is too long.
        """
        return self._check(prompt_token_ids, params, targets)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
        cache_salt: str | None = None,
    ) -> None:
        """Queue `params.n` completions of a prompt.

        Args:
            request_id: names them; not that of a request that has not ended.
            prompt_token_ids: the prompt.
            params: see `SamplingParams`.
            targets: what they are promised.
            cache_salt: they share KV blocks only with requests that have the same.

        Raises:
            InvalidRequestError: as `check`, or the id is in use.
            OverloadedError: too much waits already.
        """
        max_tokens = self.check(prompt_token_ids, params, targets)
        if request_id in self._request_ids:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        self._num_added += 1
        seed = params.seed if params.seed is not None else mix(self._seed, self._num_added)
        now = self.clock.now()
        prompt = tuple(prompt_token_ids)
        ids = [f"{request_id}/{index}" for index in range(params.n)]
        requests = []
        for index, own_id in enumerate(ids):
            own = params if index == 0 else dataclasses.replace(params, prompt_logprobs=None)
            request = Request(
                own_id,
                prompt,
                own,
                max_tokens=max_tokens,
                end_token_ids=self.end_token_ids,
                arrived_at=now,
                seed=mix(seed, index),
                group=request_id if params.n > 1 else None,
                cache_salt=cache_salt,
                targets=targets.completed(self._tiers),
            )
            requests.append(request)
        try:
            predicted_s = self.admission.check(requests[0], params.n, self.scheduler)
        except OverloadedError as error:
            self.observers.refused(requests[0].targets, error)
            raise
        if predicted_s is not None:
            self._predicted_s[ids[0]] = predicted_s
        added = self._request_ids[request_id] = []
        try:
            for index, request in enumerate(requests):
                completion = Completion(request_id, index, request, self.tokenizer)
                self.scheduler.add(request)
                self._completions[request.request_id] = completion
                added.append(request.request_id)
                self.observers.added(request)
        except BaseException:  # all of them or none
            self.abort(request_id)
            self._request_ids.pop(request_id, None)
            self._predicted_s.pop(ids[0], None)
            raise

    def abort(self, request_id: str) -> None:
        """End all completions of a request; unknown ids are ignored, as it may just have ended."""
        for own_id in list(self._request_ids.get(request_id, ())):
            self._finish(self._completions[own_id], FinishReason.ABORT)

    def close(self) -> None:
        """End what runs the model, if that is more than this process."""
        if self._workers is not None:
            self._workers.close()

    def tend(self) -> None:
        """Look after the engine while there are no requests.

        Raises:
            WorkersLostError: what runs the model was lost; see `step`.
            IntegrityError: a KV block was lost since it last idled.
        """
        if not self._is_checked:
            self.scheduler.check_integrity()
            self._is_checked = True
        if self._workers is None:
            return
        try:
            self._workers.tend()
        except WorkersLostError as error:
            self._recover(error, ())

    def step(self) -> list[Delta]:
        """Fill the pipeline, wait for the oldest batch in it, and report what that added.

        Raises:
            EngineError: requests wait but none can run, which is a bug.
            WorkersLostError: the pipeline was lost, and is not to be begun anew, or cannot be.
        """
        while self._loop.dispatch():
            pass
        self._note_room()
        if not self._loop.num_in_flight:
            if self.has_requests:
                raise EngineError("no request can be scheduled: the scheduler is stuck")
            return []
        self._is_checked = False
        iteration = self._loop.collect()
        batch, error = iteration.batch, iteration.error
        if isinstance(error, WorkersLostError):
            return self._recover(error, iteration.lost)
        self._tell_of(iteration)
        if isinstance(error, CopyError):  # its requests wait again
            logger.error("nothing is swapped any more: %s", error)
            return []
        if iteration.output is None:
            assert error is not None, "an iteration gives an output or an error"
            if not isinstance(error, Exception):  # an interrupt
                self._fail(batch, error)
                raise error
            logger.error("an iteration of %d tokens failed", batch.num_tokens, exc_info=error)
            return self._fail(batch, error)
        if self._losses is not None:
            self._losses.forget(batch)
        deltas = self._report(batch, iteration.output)
        if not self.has_requests:
            self._note_room()
        seconds = self._loop.observe(iteration)
        self._note(batch, seconds)
        return deltas

    def _note(self, batch: Batch, seconds: float) -> None:
        """Write an iteration down, if that is asked for; nobody's answer depends on it."""
        if self._iteration_file is None:
            return
        try:
            self._iteration_file.write(batch, seconds)
        except Exception:
            logger.exception("iterations are noted no more")
            self._iteration_file = None

    def _tell_of(self, iteration: Iteration) -> None:
        record = IterationRecord(
            iteration.batch,
            iteration.started_s,
            self.clock.now(),
            self.scheduler.budget.predict(iteration.batch),
            is_failed=iteration.output is None,
        )
        self.observers.iterated(record, self.scheduler)

    def _note_room(self) -> None:
        """Tell the pipeline, if it has room for a batch, that there is none."""
        loop = self._loop
        if self._workers is not None and loop.num_in_flight < loop.pipeline.num_stages:
            self._workers.starve()

    def _recover(self, error: WorkersLostError, lost: Sequence[Batch]) -> list[Delta]:
        """Begin anew with the requests that wait; fail those that were in too many losses."""
        if self._losses is None or self._workers is None:
            raise error
        logger.error("the workers are started anew: %s", error)
        self._restart(self._workers)
        kind = OutOfMemoryError if error.no_memory else ExecutorError
        reason = kind(f"the workers that ran this request were lost again and again: {error}")
        own = [self._completions.get(own_id) for own_id in self._losses.note(lost)]
        return [self._failure(each, reason) for each in own if each is not None]

    def _restart(self, workers: WorkerPipeline) -> None:
        """Begin anew, again if a worker is lost even while it starts; all KV is lost with them."""
        self.scheduler.recompute(())
        self.is_restarting = True
        for attempt in range(_RESTARTS):
            try:
                workers.restart()
                break
            except WorkersLostError as error:
                if attempt == _RESTARTS - 1:
                    raise
                logger.error("the workers are started anew again: %s", error)
        self.is_restarting = False
        if not workers.can_swap:
            self.scheduler.stop_swapping(())

    def _report(self, batch: Batch, output: ExecutorOutput) -> list[Delta]:
        for own_id, logprobs in output.prompt_logprobs.items():
            chunk = next(c for c in batch.chunks if c.request.request_id == own_id)
            if own_id in self._completions:
                self._completions[own_id].add_prompt_logprobs(chunk.start, logprobs)
        deltas = []
        for own_id, error in output.failed.items():
            if own_id in self._completions:
                deltas.append(self._failure(self._completions[own_id], _reason(error)))
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

    def _log_first_token(self, request: Request) -> None:
        """Say when the first token of a request came, beside what was predicted."""
        predicted_s = self._predicted_s.pop(request.request_id, None)
        if predicted_s is not None:
            came_s = self.clock.now() - request.arrived_at
            message = "first token of %s (%s): predicted after %.3f s, came after %.3f s"
            tier = request.targets.tier
            first_token_logger.info(message, request.request_id, tier, predicted_s, came_s)

    def _fail(self, batch: Batch, error: BaseException) -> list[Delta]:
        reason = _reason(error)
        completions = [self._completions.get(chunk.request.request_id) for chunk in batch.chunks]
        return [self._failure(each, reason) for each in completions if each is not None]

    def _failure(self, completion: Completion, error: EngineError) -> Delta:
        self._finish(completion, FinishReason.ERROR)
        return Delta(
            completion.request_id,
            completion.index,
            "",
            finish_reason=FinishReason.ERROR.value,
            error=error,
        )

    def _finish(self, completion: Completion, reason: FinishReason) -> None:
        """Forget a completion, and end its request if the scheduler has not."""
        request = completion.request
        self.scheduler.finish(request, reason)
        self.observers.ended(request, request.finish_reason or reason, self.clock.now())
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
