"""Load on an engine in this process: so many requests in it at any time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from stallfree import SamplingParams
from stallfree.engine.engine import Engine


class Load:
    """Requests of random lengths.

    Args:
        engine: that they are given to.
        prompts, answers: tokens, drawn from evenly.
        num_requests: in the engine at any time.

    Attributes:
        gaps: seconds between tokens of one answer.
        num_tokens: of prompts that were read to their end, and of answers.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[int], answers: Sequence[int], num_requests: int
    ) -> None:
        self._engine, self._random, self._num_requests = engine, random.Random(0), num_requests
        self._lengths, self._answers = prompts, answers
        self._prompts: dict[str, int] = {}  # tokens of each request's
        self._last_at: dict[str, float] = {}
        self.forget()

    def forget(self) -> None:
        """Count from now on."""
        self.gaps: list[float] = []
        self.num_tokens = 0

    def run(self, seconds: float) -> None:
        """Run iterations for so long."""
        until = time.monotonic() + seconds
        scheduler = self._engine.scheduler
        while time.monotonic() < until:
            while len(scheduler.running) + len(scheduler.waiting) < self._num_requests:
                self._add()
            for delta in self._engine.step():
                self._count(delta.request_id, len(delta.token_ids))

    def percentile(self, share: float) -> float:
        """Of the gaps, in seconds."""
        return sorted(self.gaps)[int(len(self.gaps) * share)]

    def _add(self) -> None:
        name = str(len(self._prompts))
        length = self._prompts[name] = self._random.choice(self._lengths)
        prompt = [self._random.randrange(1000, 100_000) for _ in range(length)]
        params = SamplingParams(
            temperature=0, max_tokens=self._random.choice(self._answers), ignore_eos=True
        )
        self._engine.add(name, prompt, params)

    def _count(self, name: str, num_tokens: int) -> None:
        now = time.monotonic()
        if name in self._last_at:
            self.gaps.append(now - self._last_at[name])
        else:
            self.num_tokens += self._prompts[name]
        self.num_tokens += num_tokens
        self._last_at[name] = now
