"""From settings to a running engine: opens the model, loads it, lays out memory."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import torch

from stallfree.core.admission import Admission
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget, StaticBudget, TokenBudget
from stallfree.core.policies import POLICIES
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import StepTimePredictor
from stallfree.engine.arithmetic import arithmetic_for, choose_arithmetic
from stallfree.engine.clock import WallClock
from stallfree.engine.engine import Engine
from stallfree.engine.facts import EngineFacts
from stallfree.engine.iteration_file import IterationFile
from stallfree.engine.load import load_model
from stallfree.engine.memory import ALONE, Neighbours, default_share, free_bytes
from stallfree.engine.profile import Profile, cached_profile, measure_profile
from stallfree.engine.progress import progress
from stallfree.engine.settings import EngineSettings
from stallfree.engine.swapping import Swapping
from stallfree.engine.tokenizer import Tokenizer, load_tokenizer
from stallfree.errors import ConfigError
from stallfree.executor.copier import Copier
from stallfree.executor.distributed import DistributedPipeline
from stallfree.executor.launch import Launcher
from stallfree.executor.output import Executor
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.kernels.int8_matmul import ROWS as INT8_TILE_TOKENS
from stallfree.model.config import ModelConfig
from stallfree.model.loading import Computation
from stallfree.model.source import ModelSource, open_model

# By what computes: the default token budget, and the rows that its matrix kernels round up to.
TOKEN_BUDGETS = {"int8": 96, "cpu": 64, "cuda": 512}
TILE_TOKENS = {"int8": INT8_TILE_TOKENS, "cpu": 16, "cuda": 128}
DEVICES = ("cpu", "cuda")
_SALT_BYTES = 32


def build_engine(
    settings: EngineSettings,
    *,
    show_progress: bool = True,
    launcher: Launcher | None = None,
    neighbours: Neighbours = ALONE,
) -> Engine:
    """Load the model and make an engine for it.

    Args:
        settings: of the engine.
        show_progress: on stderr, if that is a terminal.
        launcher: starts the processes of the model, if there are several; None as settings say.
        neighbours: engines that share this machine.

    Raises:
        ConfigError: the settings do not go together, or with this machine.
        ModelError: the model cannot be used.
        WorkersLostError: a process of the model did not start.
    """
    started = time.monotonic()
    iteration_file = IterationFile(settings.iteration_file) if settings.iteration_file else None
    torch.set_num_threads(settings.threads_each)
    device = _device(settings.device)
    arithmetic = choose_arithmetic(settings, device)
    source = open_model(settings.model, settings.revision)
    config = ModelConfig.from_hf(source.hf_config)
    arithmetic = arithmetic_for(config, arithmetic, settings, device)
    kind = "int8" if arithmetic.int8 else device.type
    tokenizer = load_tokenizer(source)
    context = _context(settings, config)
    computation = Computation(arithmetic, str(device), settings.threads_each, context)
    usual = settings.token_budget or TOKEN_BUDGETS[kind]
    model = load_model(
        settings,
        source,
        config,
        computation,
        usual,
        show_progress=show_progress,
        launcher=launcher,
    )
    with ExitStack() as undo:
        undo.callback(model.close)
        token_bytes = model.footprint.kv_bytes_per_token
        num_blocks = _num_blocks(settings, token_bytes, context, device, neighbours)
        pool = BlockPool(num_blocks, settings.block_size)
        executor = model.make_executor(pool)
        swapping = None
        if settings.swaps:
            swapping = Swapping(settings, executor, pool, token_bytes, device, neighbours)
        copy = None
        if isinstance(executor, TorchExecutor):
            copy = Copier(executor.cache, swapping.store if swapping else None).copy
        max_model_len = min(context, pool.num_tokens)
        facts = EngineFacts(
            model_name=source.name,
            architecture=config.architecture,
            vocab_size=config.vocab_size,
            num_parameters=model.footprint.num_parameters,
            dtype=arithmetic.name,
            device=str(device),
            threads=settings.threads_each,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            weight_bytes=model.footprint.weight_bytes,
            kv_cache_bytes=pool.num_tokens * token_bytes,
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
        profile = None
        if facts.tbt_slo_s is not None or swapping is not None:
            profile = _profile(executor, pool, facts, show_progress)
        budget = _budget(profile, facts)
        scheduler = Scheduler(
            SchedulerConfig(
                settings.scheduler,
                settings.max_num_seqs,
                max_model_len,
                num_stages=settings.pipeline_parallel_size,
                sequence_pipelining=settings.sequence_pipelining,
                prefill_order=settings.prefill_order,
                is_fair=settings.fair,
                prefix_caching=settings.prefix_caching,
                copies_blocks=True,
            ),
            pool,
            budget,
            salt=os.urandom(_SALT_BYTES),
            swap=swapping.space(budget, profile.times) if swapping and profile else None,
        )
        engine = Engine(
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
            pipeline=executor if isinstance(executor, DistributedPipeline) else None,
            copy=copy,
            restarts=settings.restart_workers,
            iteration_file=iteration_file,
        )
        undo.pop_all()
    return engine


def _static_tokens(settings: EngineSettings, kind: str) -> int | None:
    """The static token budget, if that is what decides."""
    if settings.tbt_slo_s is not None or not POLICIES[settings.scheduler].keeps_budget:
        return None
    return settings.token_budget or TOKEN_BUDGETS[kind]


def _profile(
    executor: Executor, pool: BlockPool, facts: EngineFacts, show_progress: bool
) -> Profile:
    """How long iterations take: measured now, if no earlier start has."""
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
    return profile


def _budget(profile: Profile | None, facts: EngineFacts) -> TokenBudget:
    """What decides how many tokens an iteration holds; for a target, from measured step times."""
    if facts.tbt_slo_s is None or profile is None:
        return StaticBudget(facts.token_budget or 1, facts.tile_tokens)
    return SloBudget(
        facts.tbt_slo_s,
        StepTimePredictor(profile.times, relevant_s=facts.tbt_slo_s / 4),
        tile_tokens=max(facts.tile_tokens, profile.tile_tokens),
        num_stages=facts.pipeline_parallel_size,
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


def _num_blocks(
    settings: EngineSettings,
    token_bytes: int,
    context: int,
    device: torch.device,
    neighbours: Neighbours,
) -> int:
    """Blocks of the KV cache: as asked or a share of free memory, and no more than of use."""
    block_size = settings.block_size
    block_bytes = block_size * token_bytes
    memory = settings.kv_cache_memory_bytes or int(default_share(device) * free_bytes(device))
    most_useful = settings.max_num_seqs * -(-context // block_size)
    num_blocks = min(memory // block_bytes, most_useful)
    each = neighbours if device.type == "cpu" else ALONE  # nobody shares a GPU
    if each.num_starting * num_blocks * block_bytes > free_bytes(device):
        raise ConfigError(
            f"kv_cache_memory is {memory} bytes{each.in_each}, but {free_bytes(device)} are free "
            f"on {device}"
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
    return int(num_blocks)
