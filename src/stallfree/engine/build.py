"""From settings to a running engine: opens the model, loads it, lays out memory."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

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
from stallfree.kernels.int8_matmul import ROWS as INT8_TILE_TOKENS
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8 import is_supported as is_int8_supported
from stallfree.model.int8_cache import int8_weights
from stallfree.model.int8_decoder import Int8Decoder, Int8KVCache
from stallfree.model.kv_cache import KVCache
from stallfree.model.source import ModelSource, open_model

# By what computes: the default token budget, and the rows that its matrix kernels round up to.
TOKEN_BUDGETS = {"int8": 96, "cpu": 64, "cuda": 512}
TILE_TOKENS = {"int8": INT8_TILE_TOKENS, "cpu": 16, "cuda": 128}
INT8_BLOCK_TOKENS = 16  # a block of the KV cache is a multiple of these
DEVICES = ("cpu", "cuda")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    """What the model computes in.

    Attributes:
        dtype: of activations, and of weights unless `int8`.
        kv_dtype: of the KV cache.
    """

    int8: bool
    dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def name(self) -> str:
        """For people."""
        return "int8" if self.int8 else str(self.dtype).removeprefix("torch.")


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
    arithmetic = _arithmetic(settings, device)
    kind = "int8" if arithmetic.int8 else device.type
    source = open_model(settings.model, settings.revision)
    config = ModelConfig.from_hf(source.hf_config)
    tokenizer = load_tokenizer(source)
    context = _context(settings, config)
    decoder = _load(config, source, context, arithmetic, device, threads, show_progress)
    cache = _make_cache(settings, decoder, context, device)
    pool = BlockPool(cache.num_blocks, cache.block_size)
    max_model_len = min(context, pool.num_tokens)
    scheduler = Scheduler(
        SchedulerConfig(settings.scheduler, settings.max_num_seqs, max_model_len),
        pool,
        StaticBudget(settings.token_budget or TOKEN_BUDGETS[kind], TILE_TOKENS[kind]),
    )
    facts = EngineFacts(
        model_name=source.name,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        num_parameters=decoder.num_parameters,
        dtype=arithmetic.name,
        device=str(device),
        threads=threads,
        weight_bytes=decoder.weight_bytes,
        kv_cache_bytes=pool.num_tokens * decoder.kv_bytes_per_token,
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


def _arithmetic(settings: EngineSettings, device: torch.device) -> _Arithmetic:
    """int8 where it can be; else half precision where the device has it; else float32."""
    name = settings.dtype
    if name == "int8" or (name == "auto" and device.type == "cpu"):
        if device.type == "cpu" and is_int8_supported():
            return _int8(settings)
        problem = f"int8 needs an x86-64 CPU with AVX2 and PyTorch with libgomp; this is {device}"
        if name == "int8":
            raise ConfigError(f"dtype {problem}: use --dtype auto")
        _log.warning("%s without: the model runs in float32, several times slower", problem)
    if settings.kv_cache_dtype not in ("auto", name):
        raise ConfigError(
            f"kv_cache_dtype is {settings.kv_cache_dtype!r}; only with dtype int8 can it be "
            "another type than the weights': leave it out"
        )
    dtype = _float_type(name, device)
    return _Arithmetic(int8=False, dtype=dtype, kv_dtype=dtype)


def _int8(settings: EngineSettings) -> _Arithmetic:
    if settings.block_size % INT8_BLOCK_TOKENS:
        raise ConfigError(
            f"block_size is {settings.block_size}; with dtype int8 it must be a multiple of "
            f"{INT8_BLOCK_TOKENS}"
        )
    is_float32 = settings.kv_cache_dtype == "float32"
    return _Arithmetic(
        int8=True,
        dtype=torch.float32,
        kv_dtype=torch.float32 if is_float32 else torch.float16,
    )


def _float_type(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if _is_native(torch.bfloat16, device) else torch.float16
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
    config: ModelConfig,
    source: ModelSource,
    context: int,
    arithmetic: _Arithmetic,
    device: torch.device,
    threads: int,
    show_progress: bool,
) -> Decoder | Int8Decoder:
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
        if arithmetic.int8:
            rounding = bar.add_task(f"rounding {source.name} to int8, once", total=None)
            weights = int8_weights(
                source.path,
                weights,
                on_tensor=lambda done, total: bar.update(rounding, completed=done, total=total),
            )
            bar.remove_task(rounding)
        loading = bar.add_task(f"loading layers of {source.name}", total=config.num_layers)

        def on_layer(layer: int) -> None:
            bar.update(loading, completed=layer + 1)

        if not arithmetic.int8:
            return Decoder(
                config,
                weights,
                max_positions=context,
                dtype=arithmetic.dtype,
                device=device,
                on_layer=on_layer,
            )
        decoder = Int8Decoder(
            config,
            weights,
            max_positions=context,
            threads=threads,
            kv_dtype=arithmetic.kv_dtype,
            on_layer=on_layer,
        )
        bar.remove_task(loading)
        bar.add_task("compiling kernels for this processor, once", total=None)
        decoder.compile()
        return decoder


def _make_cache(
    settings: EngineSettings,
    decoder: Decoder | Int8Decoder,
    context: int,
    device: torch.device,
) -> KVCache | Int8KVCache:
    """The KV cache: as large as asked or a share of free memory, and no larger than of use."""
    block_size = settings.block_size
    block_bytes = block_size * decoder.kv_bytes_per_token
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
        return decoder.make_cache(num_blocks, block_size)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"the KV cache of {num_blocks * block_bytes} bytes cannot be allocated: "
            "lower kv_cache_memory"
        ) from error
