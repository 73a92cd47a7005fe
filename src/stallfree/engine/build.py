"""From settings to a running engine: opens the model, loads it, lays out memory."""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stallfree.core.admission import Admission
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget, StaticBudget, TokenBudget
from stallfree.core.policies import POLICIES
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import StepTimePredictor
from stallfree.engine.arithmetic import Arithmetic, choose_arithmetic
from stallfree.engine.clock import WallClock
from stallfree.engine.engine import Engine
from stallfree.engine.facts import EngineFacts
from stallfree.engine.iteration_file import IterationFile
from stallfree.engine.memory import default_share, free_bytes
from stallfree.engine.profile import cached_profile, measure_profile
from stallfree.engine.settings import EngineSettings, available_cpus
from stallfree.engine.tokenizer import Tokenizer, load_tokenizer
from stallfree.errors import ConfigError
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.kernels.int8_matmul import ROWS as INT8_TILE_TOKENS
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8_cache import int8_weights
from stallfree.model.int8_decoder import Int8Decoder, Int8KVCache
from stallfree.model.kv_cache import KVCache
from stallfree.model.source import ModelSource, open_model

# By what computes: the default token budget, and the rows that its matrix kernels round up to.
TOKEN_BUDGETS = {"int8": 96, "cpu": 64, "cuda": 512}
TILE_TOKENS = {"int8": INT8_TILE_TOKENS, "cpu": 16, "cuda": 128}
DEVICES = ("cpu", "cuda")


def build_engine(settings: EngineSettings, *, show_progress: bool = True) -> Engine:
    """Load the model and make an engine for it. Progress goes to stderr, if that is a terminal.

    Raises:
        ConfigError: the settings do not go together, or with this machine.
        ModelError: the model cannot be used.
    """
    started = time.monotonic()
    iteration_file = IterationFile(settings.iteration_file) if settings.iteration_file else None
    threads = settings.threads or available_cpus()
    torch.set_num_threads(threads)
    device = _device(settings.device)
    arithmetic = choose_arithmetic(settings, device)
    kind = "int8" if arithmetic.int8 else device.type
    source = open_model(settings.model, settings.revision)
    config = ModelConfig.from_hf(source.hf_config)
    tokenizer = load_tokenizer(source)
    context = _context(settings, config)
    decoder = _load(config, source, context, arithmetic, device, threads, show_progress)
    cache = _make_cache(settings, decoder, context, device)
    pool = BlockPool(cache.num_blocks, cache.block_size)
    max_model_len = min(context, pool.num_tokens)
    executor = TorchExecutor(decoder, cache)
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
        token_budget=_static_tokens(settings, kind),
        tbt_slo_s=settings.tbt_slo_s,
        tile_tokens=TILE_TOKENS[kind],
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        load_s=time.monotonic() - started,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            settings.scheduler,
            settings.max_num_seqs,
            max_model_len,
            prefill_order=settings.prefill_order,
            is_fair=settings.fair,
        ),
        pool,
        _budget(executor, pool, facts, show_progress),
    )
    return Engine(
        scheduler,
        executor,
        WallClock(),
        tokenizer,
        facts,
        end_token_ids=_end_token_ids(source, tokenizer, config),
        seed=settings.seed,
        tiers=settings.tiers,
        admission=Admission(
            settings.max_queued_requests, settings.max_queued_tokens, settings.admit_within_slo
        ),
        iteration_file=iteration_file,
    )


def _static_tokens(settings: EngineSettings, kind: str) -> int | None:
    """The static token budget, if that is what decides."""
    if settings.tbt_slo_s is not None or not POLICIES[settings.scheduler].keeps_budget:
        return None
    return settings.token_budget or TOKEN_BUDGETS[kind]


def _budget(
    executor: TorchExecutor, pool: BlockPool, facts: EngineFacts, show_progress: bool
) -> TokenBudget:
    """What decides how many tokens an iteration holds; for a target, from measured step times."""
    if facts.tbt_slo_s is None:
        return StaticBudget(facts.token_budget or 1, facts.tile_tokens)
    profile = cached_profile(facts)
    if profile is None:
        with progress(show_progress) as bar:
            task = bar.add_task("measuring iterations, once", total=None)
            profile = measure_profile(
                executor,
                pool,
                facts,
                on_batch=lambda done, total: bar.update(task, completed=done, total=total),
            )
    return SloBudget(
        facts.tbt_slo_s,
        StepTimePredictor(profile.times, relevant_s=facts.tbt_slo_s / 4),
        tile_tokens=max(facts.tile_tokens, profile.tile_tokens),
    )


def progress(shown: bool) -> Progress:
    """A progress bar on stderr, if that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
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
    arithmetic: Arithmetic,
    device: torch.device,
    threads: int,
    show_progress: bool,
) -> Decoder | Int8Decoder:
    with progress(show_progress) as bar:
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
