"""The settings of a model that runs in several processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stallfree.engine.flags import Flag, check_choice, check_range, parse_duration
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.errors import ConfigError

DISTRIBUTED_EXECUTORS = ("mp", "ray")
MAX_PROCESSES = 1024


@dataclass(frozen=True, slots=True)
class ParallelSettings(SchedulingSettings):
    """The part of `EngineSettings` that splits a model; it follows that of scheduling.

    Raises:
        ConfigError: a value is out of range; names it and the limit.
    """

    tensor_parallel_size: Annotated[
        int,
        Flag(
            "Processes that share each layer's matrices.",
            "SHARES",
            panel="Several processes",
        ),
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        Flag(
            "Processes that the layers are split over, each with some of them. As many batches are "
            "in flight.",
            "STAGES",
            panel="Several processes",
        ),
    ] = 1
    distributed_executor: Annotated[
        str,
        Flag(
            f"Who starts the processes: {', '.join(DISTRIBUTED_EXECUTORS)}. mp is this machine; "
            "ray is a running Ray cluster, with the model at the same path everywhere.",
            "NAME",
            panel="Several processes",
        ),
    ] = "mp"
    sequence_pipelining: Annotated[
        bool,
        Flag(
            "Let consecutive chunks of one prompt be in different stages at once, which shortens "
            "the time to its first token.",
            "",
            panel="Several processes",
        ),
    ] = True
    restart_workers: Annotated[
        bool,
        Flag(
            "Start processes of the model anew when one is lost, and compute again what they held. "
            "Otherwise the server ends.",
            "",
            panel="Several processes",
        ),
    ] = False
    trace_file: Annotated[
        Path | None,
        Flag(
            "Write when each stage ran which batch, and why it idled, as Chrome's trace events: "
            "open it in Perfetto or chrome://tracing.",
            "FILE",
            unset="nothing is written",
            panel="Several processes",
        ),
    ] = None
    worker_timeout_s: Annotated[
        float,
        Flag(
            "How long a batch may take before a process that does not answer counts as lost.",
            "TIME",
            name="worker_timeout",
            parse=parse_duration,
            panel="Several processes",
        ),
    ] = 60.0

    def __post_init__(self) -> None:
        SchedulingSettings.__post_init__(self)
        check_range("tensor_parallel_size", self.tensor_parallel_size, 1, MAX_PROCESSES)
        check_range("pipeline_parallel_size", self.pipeline_parallel_size, 1, MAX_PROCESSES)
        check_choice("distributed_executor", self.distributed_executor, DISTRIBUTED_EXECUTORS)
        check_range("worker_timeout_s", self.worker_timeout_s, 1)
        if self.trace_file is not None and not self.uses_processes:
            raise ConfigError(
                f"trace_file is {self.trace_file}, but there is one process, which is never idle "
                "while there is work: give pipeline_parallel_size too"
            )
        if self.trace_file is not None and self.distributed_executor == "ray":
            raise ConfigError(
                f"trace_file is {self.trace_file}; it compares clocks, so all processes must be on "
                "this machine: use distributed_executor mp"
            )
        if self.restart_workers and not self.uses_processes:
            raise ConfigError(
                "restart_workers is given, but the model runs in this process alone: give "
                "pipeline_parallel_size too"
            )

    @property
    def num_processes(self) -> int:
        """That the model runs in."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def uses_processes(self) -> bool:
        """Whether the model runs in others than this one."""
        return self.num_processes > 1 or self.distributed_executor != "mp"
