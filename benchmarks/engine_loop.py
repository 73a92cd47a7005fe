"""How much of an engine's time goes to its loop rather than to the model."""

from __future__ import annotations

from collections.abc import Mapping

from steps import seconds

from stallfree.core.batch import Batch
from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.engine import Engine
from stallfree.errors import ConfigError
from stallfree.executor.output import Executor, ExecutorOutput

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 16, 64
KV_TOKENS = REQUESTS * (PROMPT_TOKENS + OUTPUT_TOKENS + 16)  # all run at once, with room to spare


class _TimedExecutor:
    """Another executor that notes how long its last batch took, and how large that was."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.last_s, self.last_rows = 0.0, 0

    def execute(self, batch: Batch) -> ExecutorOutput:
        outputs: list[ExecutorOutput] = []
        self.last_s = seconds(lambda: outputs.append(self._inner.execute(batch)))
        self.last_rows = batch.num_tokens if len(batch.sampling) == REQUESTS else 0
        return outputs[0]


def measure_loop(engine: Engine) -> Mapping[str, float]:
    """Decode `REQUESTS` requests to their end, and time the steps that run all of them.

    Returns:
        How many steps these were, their mean in ms, and the share of it outside the executor.

    Raises:
        ConfigError: none ran all of them.
        InvalidRequestError: the engine takes no request of this length.
    """
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    for number in range(REQUESTS):
        prompt = [(number + i) % engine.vocab_size for i in range(PROMPT_TOKENS)]
        engine.add(f"loop-{number}", prompt, params)
    inner = engine.executor
    timed = _TimedExecutor(inner)
    engine.executor = timed
    steps, executed_s, total_s = 0, 0.0, 0.0
    try:
        while engine.has_requests:
            step_s = seconds(engine.step)
            if timed.last_rows == REQUESTS:
                steps, executed_s, total_s = steps + 1, executed_s + timed.last_s, total_s + step_s
    finally:
        engine.executor = inner
    if not steps:
        raise ConfigError(
            f"no step of the loop ran all {REQUESTS} requests: the KV cache holds "
            f"{engine.facts.kv_cache_tokens} tokens, and {engine.facts.max_num_seqs} requests may "
            "run at once"
        )
    return {
        "requests": REQUESTS,
        "steps": steps,
        "step_ms": total_s / steps * 1000,
        "share_outside": 1 - executed_s / total_s,
    }
