"""From settings to a running engine: opens the model, loads it, lays out memory."""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.engine.clock import WallClock
from stallfree.engine.engine import Engine
from stallfree.engine.facts import EngineFacts
from stallfree.engine.memory import default_share, free_bytes
from stallfree.engine.settings import EngineSettings, available_cpus
from stallfree.engine.tokenizer import Tokenizer, load_tokenizer
from stallfree.errors import ConfigError
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8 import is_supported as is_int8_supported
from stallfree.model.int8_cache import int8_weights
from stallfree.model.kv_cache import KVCache
from stallfree.model.source import ModelSource, open_model

# By kind of device: the default token budget, and the rows that its matrix kernels round up to.
TOKEN_BUDGETS = {"cpu": 64, "cuda": 512}
TILE_TOKENS = {"cpu": 16, "cuda": 128}
DEVICES = tuple(TOKEN_BUDGETS)


def build_engine(settings: EngineSettings, *, show_progress: bool = True) -> Engine:
    """Load the model and make an engine for it. Progress goes to stderr, if that is a terminal.

    Raises:
        ConfigError: the settings do not go together, or with this machine.
        ModelError: the model cannot be used.
    """
    started = time.monotonic()
    threads = settings.threads or available_cpus()
    torch.set_num_threads(threads)
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    source = open_model(settings.model, settings.revision)
    config = ModelConfig.from_hf(source.hf_config)
    tokenizer = load_tokenizer(source)
    context = _context(settings, config)
    decoder = _load(settings, config, source, context, dtype, device, show_progress)
    cache = _make_cache(settings, config, context, dtype, device)
    pool = BlockPool(cache.num_blocks, cache.block_size)
    max_model_len = min(context, pool.num_tokens)
    scheduler = Scheduler(
        SchedulerConfig(settings.scheduler, settings.max_num_seqs, max_model_len),
        pool,
        StaticBudget(settings.token_budget or TOKEN_BUDGETS[device.type], TILE_TOKENS[device.type]),
    )
    facts = EngineFacts(
        model_name=source.name,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        num_parameters=decoder.num_parameters,
        dtype="int8" if settings.dtype == "int8" else str(dtype).removeprefix("torch."),
        device=str(device),
        threads=threads,
        weight_bytes=decoder.weight_bytes,
        kv_cache_bytes=pool.num_tokens * config.kv_values_per_token * dtype.itemsize,
        kv_cache_tokens=pool.num_tokens,
        kv_cache_share=None if settings.kv_cache_memory_bytes else default_share(device),
        block_size=pool.block_size,
        scheduler=settings.scheduler,
        token_budget=scheduler.budget.tokens(()) if scheduler.policy.keeps_budget else None,
        tile_tokens=scheduler.budget.tile_tokens,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        load_s=time.monotonic() - started,
    )
    return Engine(
        scheduler,
        TorchExecutor(decoder, cache),
        WallClock(),
        tokenizer,
        facts,
        end_token_ids=_end_token_ids(source, tokenizer, config),
        seed=settings.seed,
    )


def _end_token_ids(
    source: ModelSource, tokenizer: Tokenizer, config: ModelConfig
) -> frozenset[int]:
    ids = source.end_token_ids | {tokenizer.eos_token_id}
    return frozenset(i for i in ids if i is not None and i < config.vocab_size)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in DEVICES:
        raise ConfigError(f"device is {name!r}; it must be one of auto, {', '.join(DEVICES)}")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of activations and KV cache; half precision only where the device has it."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if _is_native(torch.bfloat16, device) else torch.float16
    if name == "int8":
        if device.type != "cpu" or not is_int8_supported():
            raise ConfigError(
                f"dtype int8 needs a CPU with AVX2 or better; this is {device}: use --dtype auto"
            )
        return torch.float32
    dtype: torch.dtype = getattr(torch, name)
    if not _is_native(dtype, device):
        raise ConfigError(
            f"dtype {name} has no native arithmetic on this {device.type} and would be several "
            "times slower than float32: use --dtype float32"
        )
    return dtype


def _is_native(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.float32 or (device.type == "cuda" and dtype == torch.float16):
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = ("avx512_bf16", "amx_bf16", "bf16")  # the last is that of ARM
    if dtype == torch.float16:
        features = ("avx512_fp16", "amx_fp16", "fp16_arith")
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(feature, False) for feature in features)


def _context(settings: EngineSettings, config: ModelConfig) -> int:
    """Longest context in tokens that the model gives and the settings ask for."""
    if settings.max_model_len is None:
        stretches = config.rope.rope_type == "dynamic"  # would change the answers to short prompts
        return config.max_position_embeddings if stretches else config.max_context
    if settings.max_model_len > config.max_context:
        raise ConfigError(
            f"max_model_len is {settings.max_model_len}; the model's longest context is "
            f"{config.max_context} tokens"
        )
    return settings.max_model_len


def _load(
    settings: EngineSettings,
    config: ModelConfig,
    source: ModelSource,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    show_progress: bool,
) -> Decoder:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    hidden = not (show_progress and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        weights = source.weights
        if settings.dtype == "int8":
            rounding = bar.add_task(f"rounding {source.name} to int8, once", total=None)
            weights = int8_weights(
                source.path,
                weights,
                on_tensor=lambda done, total: bar.update(rounding, completed=done, total=total),
            )
            bar.remove_task(rounding)
        loading = bar.add_task(f"loading layers of {source.name}", total=config.num_layers)
        return Decoder(
            config,
            weights,
            max_positions=context,
            dtype=dtype,
            device=device,
            on_layer=lambda layer: bar.update(loading, completed=layer + 1),
        )


def _make_cache(
    settings: EngineSettings,
    config: ModelConfig,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """The KV cache: as large as asked or a share of free memory, and no larger than of use."""
    block_size = settings.block_size
    block_bytes = block_size * config.kv_values_per_token * dtype.itemsize
    memory = settings.kv_cache_memory_bytes or int(default_share(device) * free_bytes(device))
    most_useful = settings.max_num_seqs * -(-context // block_size)
    num_blocks = min(memory // block_bytes, most_useful)
    if num_blocks * block_bytes > free_bytes(device):
        raise ConfigError(
            f"kv_cache_memory is {memory} bytes, but {free_bytes(device)} are free on {device}"
        )
    if num_blocks < 1:
        raise ConfigError(
            f"kv_cache_memory is {memory} bytes; one block of {block_size} tokens takes "
            f"{block_bytes}: raise kv_cache_memory or lower block_size"
        )
    if settings.max_model_len is not None and num_blocks * block_size < context:
        raise ConfigError(
            f"max_model_len is {context}, but a KV cache of {memory} bytes holds "
            f"{num_blocks * block_size} tokens: raise kv_cache_memory to at least "
            f"{-(-context // block_size) * block_bytes} or lower max_model_len"
        )
    try:
        return KVCache(config, num_blocks, block_size, dtype, device)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"the KV cache of {num_blocks * block_bytes} bytes cannot be allocated: "
            "lower kv_cache_memory"
        ) from error
