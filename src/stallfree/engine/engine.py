"""The engine: requests in, deltas of text out, one iteration a step. Single-threaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from stallfree.core.admission import Admission
from stallfree.core.batch import Batch
from stallfree.core.counter_random import mix
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import DEFAULT_TARGETS, Targets
from stallfree.engine.clock import Clock
from stallfree.engine.completions import Completions
from stallfree.engine.facts import EngineFacts
from stallfree.engine.iteration_file import IterationFile
from stallfree.engine.loop import Iteration, Loop, OneStage
from stallfree.engine.losses import Losses, start_anew
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
from stallfree.executor.copier import BlockCopies
from stallfree.executor.output import Executor, WorkerPipeline
from stallfree.executor.rerun import RerunningPipeline

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests to their end, one iteration a step.

    Args:
        scheduler: decides each iteration.
        executor: runs it.
        pipeline: runs several at once, if it can.
        copy: copies KV for the executor; a pipeline does that itself.
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
        copy: Callable[[BlockCopies], None] | None = None,
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
        self._completions = Completions(scheduler, tokenizer, clock, self.observers)
        self.is_restarting = False
        self._iteration_file = iteration_file
        one = OneStage(lambda: self.executor, copy)
        self._loop = Loop(scheduler, RerunningPipeline(pipeline) if pipeline else one, clock)
        self._workers = pipeline
        self._losses = Losses() if restarts else None
        self._seed = seed
        self._num_added = 0
        self._is_checked = True  # that no KV block is lost, since the last step

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
        if request_id in self._completions:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        self._num_added += 1
        seed = params.seed if params.seed is not None else mix(self._seed, self._num_added)
        now = self.clock.now()
        prompt = tuple(prompt_token_ids)
        requests = []
        for index in range(params.n):
            own = params if index == 0 else dataclasses.replace(params, prompt_logprobs=None)
            request = Request(
                f"{request_id}/{index}",
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
        self._completions.add(request_id, requests, predicted_s)

    def abort(self, request_id: str) -> None:
        """End all completions of a request; unknown ids are ignored, as it may just have ended."""
        self._completions.abort(request_id)

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
            logger.error("KV is not copied any more: %s", error)
            return []
        if iteration.output is None:
            assert error is not None, "an iteration gives an output or an error"
            if not isinstance(error, Exception):  # an interrupt
                self._completions.fail_batch(batch, error)
                raise error
            logger.error("an iteration of %d tokens failed", batch.num_tokens, exc_info=error)
            return self._completions.fail_batch(batch, error)
        if self._losses is not None:
            self._losses.forget(batch)
        deltas = self._completions.report(batch, iteration.output)
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
        self.scheduler.recompute(())  # all KV is lost with them
        self.is_restarting = True
        start_anew(self._workers)
        self.is_restarting = False
        if not self._workers.can_swap:
            self.scheduler.stop_swapping()
        kind = OutOfMemoryError if error.no_memory else ExecutorError
        reason = kind(f"the workers that ran this request were lost again and again: {error}")
        return self._completions.fail(self._losses.note(lost), reason)
