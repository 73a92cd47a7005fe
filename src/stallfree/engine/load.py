"""Loading a model, in this process or in several: what the engine is then built on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rich.progress import Progress, TaskID

from stallfree.core.blocks import BlockPool
from stallfree.engine.progress import progress
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError
from stallfree.executor.distributed import DistributedPipeline
from stallfree.executor.launch import Launcher, LocalLauncher
from stallfree.executor.messages import WorkerSpec
from stallfree.executor.ray_launch import RayLauncher
from stallfree.executor.stage_log import StageLog
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.kernels.jit import are_kept
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8_cache import int8_weights
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.loading import Computation, Footprint, compile_kernels, load_decoder
from stallfree.model.part import ModelPart, balanced_layers, parts_of
from stallfree.model.source import ModelSource
from stallfree.model.weights import WeightSource

_DECODES_SHARE = 8  # of a usual batch's rows, one in so many samples a token


class LoadedModel(Protocol):
    """A model whose weights are in memory."""

    @property
    def footprint(self) -> Footprint:
        """What it takes, wherever that is."""
        ...

    def close(self) -> None:
        """End the processes that were started for it."""
        ...

    def make_executor(self, pool: BlockPool) -> TorchExecutor | DistributedPipeline:
        """Allocate the KV cache; what runs batches with it.

        Raises:
            ConfigError: the memory is not there.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Here:
    """A model in this process."""

    decoder: Decoder | Int8Decoder

    @property
    def footprint(self) -> Footprint:
        return Footprint.of(self.decoder)

    def close(self) -> None:
        pass

    def make_executor(self, pool: BlockPool) -> TorchExecutor:
        try:
            cache = self.decoder.make_cache(pool.num_blocks, pool.block_size)
        except (RuntimeError, MemoryError) as error:
            raise _no_memory(pool, self.footprint) from error
        return TorchExecutor(self.decoder, cache)


@dataclass(frozen=True, slots=True)
class _InProcesses:
    """A model in processes of its own."""

    pipeline: DistributedPipeline

    @property
    def footprint(self) -> Footprint:
        return self.pipeline.footprint

    def close(self) -> None:
        self.pipeline.close()

    def make_executor(self, pool: BlockPool) -> DistributedPipeline:
        try:
            self.pipeline.make_cache(pool.num_blocks, pool.block_size)
        except MemoryError as error:
            raise _no_memory(pool, self.footprint) from error
        return self.pipeline


def load_model(
    settings: EngineSettings,
    source: ModelSource,
    config: ModelConfig,
    computation: Computation,
    tokens: int,
    *,
    show_progress: bool,
    launcher: Launcher | None = None,
) -> LoadedModel:
    """Load a model as the settings say.

    Args:
        settings: of the engine.
        source: the model's files.
        config: its shape.
        computation: how it runs, in each process.
        tokens: of a usual batch.
        show_progress: on stderr, if that is a terminal.
        launcher: starts processes; None as the settings say.

    Raises:
        ConfigError: the model cannot be split as asked.
        ModelError: the model cannot be used.
        WorkersLostError: a process did not start.
    """
    with progress(show_progress) as bar:
        if settings.uses_processes:
            parts = _parts(settings, config, tokens)
            log = StageLog(settings.pipeline_parallel_size, settings.trace_file)
            launcher = launcher or _launcher(settings, computation)
            return _start_processes(settings, source, parts, computation, bar, launcher, log)
        return _load_here(source, config, computation, bar)


def _load_here(
    source: ModelSource, config: ModelConfig, computation: Computation, bar: Progress
) -> LoadedModel:
    weights = _rounded(source, bar) if computation.arithmetic.int8 else source.weights
    loading = bar.add_task(f"loading layers of {source.name}", total=config.num_layers)
    decoder = load_decoder(
        config,
        weights,
        computation,
        on_layer=lambda layer: bar.update(loading, completed=layer + 1),
    )
    bar.remove_task(loading)
    if computation.arithmetic.int8:
        how = "loading kernels" if are_kept() else "compiling kernels for this processor, once"
        bar.add_task(how, total=None)
        compile_kernels(decoder)
    return _Here(decoder)


def _start_processes(
    settings: EngineSettings,
    source: ModelSource,
    parts: list[ModelPart],
    computation: Computation,
    bar: Progress,
    launcher: Launcher,
    log: StageLog,
) -> LoadedModel:
    if computation.arithmetic.int8:
        _rounded(source, bar)  # once, before all of them look for it
    specs = [
        WorkerSpec(
            rank=rank,
            world_size=len(parts),
            part=part,
            previous=None if part.is_first else rank - part.tp_size,
            following=None if part.is_last else rank + part.tp_size,
            model=str(source.path.resolve()),
            computation=computation,
            store=("", 0),
            timeout_s=settings.worker_timeout_s,
        )
        for rank, part in enumerate(parts)
    ]
    bar.add_task(f"starting {len(specs)} processes of {source.name}", total=None)
    pipeline = DistributedPipeline(
        specs,
        launcher,
        timeout_s=settings.worker_timeout_s,
        log=log,
    )
    return _InProcesses(pipeline)


def _launcher(settings: EngineSettings, computation: Computation) -> Launcher:
    """What starts the processes."""
    if settings.distributed_executor == "mp":
        return LocalLauncher()
    is_cuda = computation.device.startswith("cuda")
    return RayLauncher(
        settings.pipeline_parallel_size,
        settings.tensor_parallel_size,
        computation.threads,
        is_cuda=is_cuda,
    )


def _parts(settings: EngineSettings, config: ModelConfig, tokens: int) -> list[ModelPart]:
    """What each process holds, by rank."""
    num_stages = settings.pipeline_parallel_size
    if num_stages > config.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size is {num_stages}; the model has {config.num_layers} layers"
        )
    sampled = max(1, tokens // _DECODES_SHARE)
    layers = balanced_layers(config, num_stages, rows=tokens, sampled_rows=sampled)
    stages = parts_of(config, layers, settings.tensor_parallel_size)
    return [part for stage in stages for part in stage]


def _rounded(source: ModelSource, bar: Progress) -> WeightSource:
    """The weights in int8."""
    rounding: TaskID | None = None

    def show(done: int, total: int) -> None:
        nonlocal rounding
        if rounding is None:  # they are not in the cache
            rounding = bar.add_task(f"rounding {source.name} to int8, once")
        bar.update(rounding, completed=done, total=total)

    weights = int8_weights(source.path, source.weights, on_tensor=show)
    if rounding is not None:
        bar.remove_task(rounding)
    return weights


def _no_memory(pool: BlockPool, footprint: Footprint) -> ConfigError:
    num_bytes = pool.num_tokens * footprint.kv_bytes_per_token
    return ConfigError(
        f"the KV cache of {num_bytes} bytes cannot be allocated: lower kv_cache_memory"
    )
