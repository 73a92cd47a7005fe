"""The settings of an engine and of a server: validated once, never changed.

The command line and the configuration file are generated from these dataclasses, so a new setting
is one new field here. Nothing here knows how a setting is used, nor imports anything that would
slow `--help` down.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from stallfree.core.policies import POLICIES
from stallfree.engine.flags import (
    Flag,
    check_choice,
    check_file,
    check_range,
    check_types,
    parse_bytes,
    parse_duration,
)
from stallfree.engine.limit_settings import LimitSettings
from stallfree.engine.swap_settings import SwapSettings
from stallfree.errors import ConfigError

API_KEY_VARIABLE = "STALLFREE_API_KEY"
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16")
MAX_BLOCK_SIZE = 256
MAX_PORT = 65_535
MAX_SEED = 2**63 - 1
LONG_TBT_SLO_S = 10.0  # beyond, it is probably meant in milliseconds

_DEVICE = re.compile(r"[a-z]+(:\d+)?")


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class EngineSettings(SwapSettings):
    """What an engine is built from.

    Raises:
        ConfigError: a value has the wrong type or is out of range; names it and the limit.
    """

    model: Annotated[
        str | None,
        Flag(
            "A Hugging Face folder, a GGUF file, a hub id (org/name), or a file of one "
            "(org/name:FILE.gguf).",
            "MODEL",
            unset="the demo model",
            positional=True,
        ),
    ] = None
    revision: Annotated[
        str | None,
        Flag("Branch, tag or commit of a hub id.", "REVISION", unset="the main branch"),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None,
        Flag(
            "Memory of the KV cache: 2GiB, 512MiB, 1.5GB or plain bytes.",
            "BYTES",
            name="kv_cache_memory",
            unset="a quarter of the free memory, 85 % on a GPU",
            parse=parse_bytes,
            panel="Memory",
        ),
    ] = None
    block_size: Annotated[
        int,
        Flag("Tokens in a block of the KV cache.", "TOKENS", panel="Memory"),
    ] = 16
    dtype: Annotated[
        str,
        Flag(
            f"Type of weights: {', '.join(DTYPES)}. auto is int8 on a CPU, a quarter of the memory "
            "and four times as fast as float32, whose answers are the model's own.",
            "DTYPE",
            panel="Memory",
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        str,
        Flag(
            f"Type of the KV cache: {', '.join(KV_CACHE_DTYPES)}. auto is bfloat16 with weights in "
            "int8, else that of the weights.",
            "DTYPE",
            panel="Memory",
        ),
    ] = "auto"
    device: Annotated[
        str,
        Flag("Where the model runs: auto, cpu, cuda, cuda:1, ...", "DEVICE"),
    ] = "auto"
    threads: Annotated[
        int | None,
        Flag(
            "CPU threads of the model, in each of its processes.",
            "THREADS",
            unset="one for each core",
        ),
    ] = None
    seed: Annotated[
        int,
        Flag("Seeds the requests that bring no seed of their own.", "SEED"),
    ] = 0
    iteration_file: Annotated[
        Path | None,
        Flag(
            "Note what each iteration held and took here, for `stallfree simulate --times`.",
            "FILE.csv",
            unset="nowhere",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_types(self)
        SwapSettings.__post_init__(self)
        if self.model is not None and not self.model.strip():
            raise ConfigError("model is empty; leave it out to use the demo model")
        if self.revision is not None and self.model is None:
            raise ConfigError(f"revision is {self.revision!r}, but no model is named")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device is {self.device!r}; write it as auto, cpu, cuda or cuda:1")
        check_range("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
        check_range("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_range("threads", self.threads, 1)
        check_range("seed", self.seed, -MAX_SEED, MAX_SEED)

    @property
    def threads_each(self) -> int:
        """CPU threads of each process of the model."""
        if self.distributed_executor != "mp":
            return self.threads or available_cpus()
        return self.threads or max(1, available_cpus() // self.num_processes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is allowed but probably not meant, one sentence each."""
        cpus = available_cpus()
        notes = []
        num_here = self.num_processes if self.distributed_executor == "mp" else 1
        if num_here > cpus or self.threads_each > cpus // num_here:
            each = f" in each of {num_here} processes" if num_here > 1 else ""
            notes.append(f"threads is {self.threads_each}{each}, more than the {cpus} CPUs here")
        if self.token_budget is not None and not POLICIES[self.scheduler].keeps_budget:
            notes.append(f"scheduler {self.scheduler} keeps no token budget; it is ignored")
        if self.tbt_slo_s is not None and self.tbt_slo_s > LONG_TBT_SLO_S:
            notes.append(f"tbt_slo is {self.tbt_slo_s:g} s; milliseconds are written as 200ms")
        has_ttft = any(targets.ttft_s is not None for targets in self.tiers.values())
        if not has_ttft and self.prefill_order == "edf":
            notes.append(
                "prefill_order is edf; without ttft_slo, only a request's ttft_slo_ms counts"
            )
        if not has_ttft and self.admit_within_slo is not None:
            notes.append("admit_within_slo holds for requests that bring a ttft_slo_ms alone")
        return tuple(notes)


@dataclass(frozen=True, slots=True)
class ServerSettings(LimitSettings):
    """What the HTTP server needs beside an engine; its limits come first.

    Raises:
        ConfigError: a value has the wrong type or is out of range; names it and the limit.
    """

    host: Annotated[
        str,
        Flag(
            "Address to listen on; 0.0.0.0 for every network this machine is in.",
            "ADDRESS",
            panel="Server",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Flag("Port to listen on; 0 takes a free one.", "PORT", panel="Server"),
    ] = 8000
    api_key: Annotated[
        str | None,
        Flag(
            "Key that requests must carry as a bearer token; all but /health, /version, what "
            "describes the API (/docs, /redoc, /openapi.json) and the files of /dashboard. Prefer "
            "the environment variable: a command line is visible to other users.",
            "KEY",
            unset="no key",
            variable=API_KEY_VARIABLE,
            panel="Server",
        ),
    ] = field(default=None, repr=False)
    served_model_name: Annotated[
        str | None,
        Flag(
            "Name of the model in requests and answers.",
            "NAME",
            unset="the model's own",
            panel="Server",
        ),
    ] = None
    chat_template: Annotated[
        Path | None,
        Flag(
            "Jinja file that turns messages into a prompt.",
            "FILE",
            unset="the model's own",
            panel="Server",
        ),
    ] = None
    drain_timeout_s: Annotated[
        float,
        Flag(
            "How long running requests may go on after Ctrl-C or SIGTERM.",
            "TIME",
            name="drain_timeout",
            parse=parse_duration,
            panel="Server",
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        check_types(self)
        LimitSettings.__post_init__(self)
        if not self.host.strip():
            raise ConfigError("host is empty; 127.0.0.1 is this machine only")
        check_range("port", self.port, 0, MAX_PORT)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ConfigError("api_key must be ASCII and not blank; leave it out to need none")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError("served_model_name is empty; leave it out to use the model's own")
        check_file("chat_template", self.chat_template)
        check_range("drain_timeout_s", self.drain_timeout_s, 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is allowed but probably not meant, one sentence each."""
        if self.api_key is not None or self.api_keys_file is not None or _is_local(self.host):
            return ()
        return (f"host is {self.host} and there is no key: all who reach it may use this server",)


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than `localhost` may be any."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
