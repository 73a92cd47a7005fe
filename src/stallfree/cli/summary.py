"""What `stallfree serve` says when it is ready: a few lines about the engine, and one to paste.

It knows the facts it is given, not how they came about.
"""

from __future__ import annotations

import json
import shlex

from rich.console import Console
from rich.markup import escape

from stallfree.engine.facts import EngineFacts
from stallfree.engine.settings import API_KEY_VARIABLE, EngineSettings, ServerSettings


def print_summary(
    console: Console, facts: EngineFacts, engine: EngineSettings, server: ServerSettings, url: str
) -> None:
    """Print the summary of a server that is ready at `url`."""
    console.print(f"\n[bold]stallfree[/] serves [bold]{escape(facts.model_name)}[/]\n")
    for label, text in _rows(facts, engine, server, url).items():
        console.print(f"  [cyan]{label:<9}[/] {escape(text)}", highlight=False, soft_wrap=True)
    for note in (*engine.notes, *server.notes):
        console.print(f"  [yellow]Note[/]      {escape(note)}", highlight=False, soft_wrap=True)
    has_key = server.api_key is not None or server.api_keys_file is not None
    key = f" (with a key in ${API_KEY_VARIABLE})" if has_key else ""
    console.print(f"\nTry it{key}:\n", highlight=False)
    console.print(
        curl_line(url, server.served_model_name or facts.model_name, has_key),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print("\nCtrl-C drains and stops.\n", highlight=False)


def curl_line(url: str, model: str, has_key: bool) -> str:
    """A command that asks the server at `url` a question; it never holds the key itself."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Write a Python function that adds two numbers."}],
        "max_tokens": 100,
    }
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if has_key else ""
    address = shlex.quote(f"{url}/v1/chat/completions")
    data = shlex.quote(json.dumps(body))
    return f"curl {address} -H 'Content-Type: application/json'{key} -d {data}"


def _rows(
    facts: EngineFacts, engine: EngineSettings, server: ServerSettings, url: str
) -> dict[str, str]:
    parameters = _count(facts.num_parameters)
    weights = f"weights {_size(facts.weight_bytes)}"
    share = f" (at most {facts.kv_cache_share:.0%} of free memory)" if facts.kv_cache_share else ""
    cache = f"KV cache {_size(facts.kv_cache_bytes)}{share} = {facts.kv_cache_tokens:,} tokens"
    threads = f"{facts.threads} thread{'s' if facts.threads > 1 else ''}"
    batching = f"{facts.scheduler}, {_budget(facts)}, {facts.max_num_seqs:,} requests at once"
    targets = {"Targets": text} if (text := _targets(engine)) else {}
    copies = {}
    if server.replicas > 1:
        copies = {"Copies": f"{server.replicas} on Ray Serve, each as below"}
    return {
        **copies,
        "Model": f"{facts.architecture}, {parameters} parameters, {facts.dtype}",
        "Memory": f"{weights}, {cache} in blocks of {facts.block_size}",
        "Batching": batching,
        **targets,
        "Context": f"{facts.max_model_len:,} tokens",
        "Device": f"{facts.device}, {threads}; loaded in {facts.load_s:.1f} s",
        "URL": f"{url}/v1",
        "Watch": f"{url}/dashboard",
    }


def _targets(engine: EngineSettings) -> str:
    """Targets of tiers, the order of prompts and what is refused, where that was asked for."""
    parts = []
    for name, targets in engine.tiers.items():
        times = {"tbt": targets.tbt_s, "ttft": targets.ttft_s}
        told = [f"{kind} {own_s * 1000:,.0f} ms" for kind, own_s in times.items() if own_s]
        if told and (targets.ttft_s or len(engine.tier)):
            parts.append(f"{name} {' and '.join(told)}")
    if engine.prefill_order != "fcfs":
        parts.append(f"prompts by {engine.prefill_order}")
    if engine.fair:
        parts.append("users take turns")
    if engine.max_queued_requests is not None:
        parts.append(f"at most {engine.max_queued_requests:,} requests wait")
    if engine.max_queued_tokens is not None:
        parts.append(f"at most {engine.max_queued_tokens:,} tokens wait")
    if engine.admit_within_slo is not None:
        parts.append(f"refuses beyond {engine.admit_within_slo:g} times the ttft")
    return ", ".join(parts)


def _budget(facts: EngineFacts) -> str:
    if facts.tbt_slo_s is not None:
        return f"a token every {facts.tbt_slo_s * 1000:,.0f} ms for each answer"
    if facts.token_budget is None:
        return "whole prompts"
    tiles = f" (tiles of {facts.tile_tokens})" if facts.tile_tokens > 1 else ""
    return f"at most {facts.token_budget:,} tokens an iteration{tiles}"


def _size(size_bytes: int) -> str:
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{size_bytes / unit:.3g} {name}"


def _count(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
