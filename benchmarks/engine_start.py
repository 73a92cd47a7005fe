"""Starts of a fresh process: how long to its first token, and what memory it then takes.

Run by itself, with settings of `LLM` as JSON, it is such a process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stallfree import LLM, SamplingParams

PROMPT_TOKENS = 1500
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)
MEMORY = {  # of /proc/self/status
    "VmRSS": "resident_bytes",
    "RssAnon": "resident_anonymous_bytes",
    "VmHWM": "peak_bytes",
}


def measure_starts(settings: Mapping[str, Any], num_warm: int) -> dict[str, Any]:
    """Start a process that only warms the caches, and then `num_warm`, one after the other.

    Returns:
        What the last said of its memory, what of that is neither weights nor KV cache, the seconds
        to the first token of each, and the median of those but the first.

    Raises:
        CalledProcessError: one failed.
    """
    times = []
    for _ in range(1 + num_warm):
        first_token_s, memory = _start(settings)
        times.append(first_token_s)
    known = memory["weight_bytes"] + memory["kv_cache_bytes"]
    return {
        **memory,
        "overhead_bytes": memory["resident_bytes"] - known,
        "first_token_s": statistics.median(times[1:]),
        "first_token_s_of_each": times,
    }


def _start(settings: Mapping[str, Any]) -> tuple[float, dict[str, int]]:
    command = [sys.executable, __file__, json.dumps(dict(settings))]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first_token_s = time.perf_counter() - started
        rest = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return first_token_s, json.loads(rest)


def main() -> None:
    """Print a first token; then touch the whole KV cache, run a prompt and print the memory."""
    llm = LLM(**json.loads(sys.argv[1]))
    output = llm.generate("def fib(n):", ONE_TOKEN, use_progress_bar=False)[0].outputs[0]
    print(output.token_ids, flush=True)
    executor: Any = llm.engine.executor
    for side in (executor.cache.keys, executor.cache.values):
        for layer in side:
            layer.fill_(0)
    facts = llm.engine.facts
    count = min(PROMPT_TOKENS, facts.max_model_len - 1)
    prompt = [number % facts.vocab_size for number in range(count)]
    llm.generate([prompt], ONE_TOKEN, use_progress_bar=False)
    memory = {"weight_bytes": facts.weight_bytes, "kv_cache_bytes": facts.kv_cache_bytes}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, value = line.split(":", 1)
        if name in MEMORY:
            memory[MEMORY[name]] = int(value.split()[0]) * 1024
    print(json.dumps(memory))


if __name__ == "__main__":
    main()
