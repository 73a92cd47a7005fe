"""The flags that say what is simulated: a device and a model, or a profile of this machine."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from stallfree.engine.flags import Flag, check_range, check_types
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.errors import ConfigError
from stallfree.sim.data import load_device, load_model_shape

if TYPE_CHECKING:
    from stallfree.sim.system import System

PROFILED_KV_TOKENS, PROFILED_CONTEXT = 262_144, 32_768
_PANEL = "System"
_ROOFLINE_ONLY = (
    *("device", "model", "tensor_parallel_size", "pipeline_parallel_size", "is_one_node"),
    "launch_us",
)


@dataclass(frozen=True, slots=True)
class SystemSettings:
    """What is simulated.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or two exclude each other.
    """

    model: Annotated[
        str | None,
        Flag(
            "Sizes of a model: mistral-7b, yi-34b, llama2-70b, falcon-180b, or a TOML file like "
            "those.",
            "NAME",
            unset="none; a profile knows its own",
            panel=_PANEL,
        ),
    ] = None
    device: Annotated[
        str | None,
        Flag(
            "What it runs on: a100-80gb, a100-80gb-pcie, a40-48gb, h100-80gb, or a TOML file.",
            "NAME",
            unset="none",
            panel=_PANEL,
        ),
    ] = None
    tensor_parallel_size: Annotated[
        int, Flag("Devices that share each layer.", "DEVICES", panel=_PANEL)
    ] = 1
    pipeline_parallel_size: Annotated[
        int, Flag("Stages that share the layers.", "STAGES", panel=_PANEL)
    ] = 1
    is_one_node: Annotated[
        bool,
        Flag(
            "All devices are in one node. Otherwise each stage has a node of its own, and a single "
            "stage is spread over two.",
            "",
            name="one_node",
            panel=_PANEL,
        ),
    ] = True
    profile: Annotated[
        Path | None,
        Flag(
            "Step times that `stallfree profile --output` measured, instead of a device.",
            "FILE.json",
            unset="none",
            panel=_PANEL,
        ),
    ] = None
    times: Annotated[
        Path | None,
        Flag(
            "Measured iterations, instead of a device: the column seconds, and prefill_tokens, "
            "prefill_start, decodes and decode_context (their mean) of what each held, or what "
            "`stallfree serve --iteration-file` wrote.",
            "FILE.csv",
            unset="none",
            panel=_PANEL,
        ),
    ] = None
    launch_us: Annotated[
        float,
        Flag(
            "Microseconds of the processor to launch a layer, which takes at least that.",
            "US",
            panel=_PANEL,
        ),
    ] = 0.0
    sequence_us: Annotated[
        float,
        Flag(
            "Microseconds of the processor for each request of an iteration, beside the devices.",
            "US",
            panel=_PANEL,
        ),
    ] = 0.0
    kv_cache_tokens: Annotated[
        int | None,
        Flag(
            "Tokens that the KV cache of a replica holds.",
            "TOKENS",
            unset=f"what nine tenths of the memory leave; {PROFILED_KV_TOKENS:,} with a profile",
            panel=_PANEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range("tensor_parallel_size", self.tensor_parallel_size, 1, 64)
        check_range("pipeline_parallel_size", self.pipeline_parallel_size, 1, 64)
        check_range("launch_us", self.launch_us, 0, 1e6)
        check_range("sequence_us", self.sequence_us, 0, 1e6)
        check_range("kv_cache_tokens", self.kv_cache_tokens, 16)
        if self.profile is not None and self.times is not None:
            raise ConfigError(f"profile is {self.profile} and times is {self.times}; give one")
        if self.measured is None:
            if self.model is None or self.device is None:
                raise ConfigError(
                    "nothing to simulate: give --model and --device, such as --model yi-34b "
                    "--device a100-80gb --tensor-parallel-size 2, or --profile FILE.json, or "
                    "--times FILE.csv"
                )
            return
        blank = {"device": None, "model": None, "is_one_node": True, "launch_us": 0.0}
        for name in _ROOFLINE_ONLY:
            if getattr(self, name) != blank.get(name, 1):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; step times have their own")

    @property
    def measured(self) -> Path | None:
        """The file of step times, if there is one."""
        return self.profile or self.times

    def system(self, scheduling: SchedulingSettings) -> System:
        """The system, with these settings of scheduling.

        Raises:
            ConfigError: a name or a file is not known, or the model does not fit the devices.
        """
        return self._roofline(scheduling) if self.measured is None else self._timed(scheduling)

    def _roofline(self, scheduling: SchedulingSettings) -> System:
        from stallfree.sim.roofline import Efficiency, Roofline
        from stallfree.sim.system import System, fitted

        device, model = load_device(self.device or ""), load_model_shape(self.model or "")
        efficiency = Efficiency(launch_s=self.launch_us * 1e-6, sequence_s=self.sequence_us * 1e-6)
        times = Roofline(
            device,
            model,
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            efficiency,
            is_one_node=self.is_one_node,
        )
        context = scheduling.max_model_len or model.max_context
        if times.kv_cache_tokens < context and self.kv_cache_tokens is None:
            raise ConfigError(
                f"{model.name} on {times.num_devices} x {device.name} leaves room for "
                f"{times.kv_cache_tokens:,} tokens of KV cache, and the context is {context:,}: "
                "take more devices"
            )
        has_target = scheduling.tbt_slo_s is not None
        return System(
            lambda _: times,
            scheduling,
            self.kv_cache_tokens or times.kv_cache_tokens,
            context,
            tile_tokens=efficiency.tile_tokens,
            known_times=fitted(times, context) if has_target else None,  # once for all replicas
        )

    def _timed(self, scheduling: SchedulingSettings) -> System:
        from stallfree.engine.profile import Profile, read_profile
        from stallfree.sim.measured import read_times
        from stallfree.sim.system import System
        from stallfree.sim.times import ProfiledTimes

        if self.profile is not None:
            profile = read_profile(self.profile)
        else:
            assert self.times is not None, "there is a file of one kind or the other"
            profile = Profile(read_times(self.times))
        sequence_s = self.sequence_us * 1e-6
        return System(
            lambda seed: ProfiledTimes(profile.times, seed, sequence_s),
            scheduling,
            self.kv_cache_tokens or PROFILED_KV_TOKENS,
            scheduling.max_model_len or PROFILED_CONTEXT,
            tile_tokens=profile.tile_tokens,
            known_times=profile.times,
        )

    @property
    def num_devices(self) -> int:
        """Of a replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def about(self) -> dict[str, object]:
        """What is simulated, for people."""
        if self.measured is not None:
            return {"step_times": str(self.measured), "sequence_us": self.sequence_us}
        split = f"TP{self.tensor_parallel_size} x PP{self.pipeline_parallel_size}"
        overhead = {"launch_us": self.launch_us, "sequence_us": self.sequence_us}
        place = {"device": self.device, "split": split, "one_node": self.is_one_node}
        return {"model": self.model, **place, **overhead}

    def facts(self) -> dict[str, object]:
        """All that its step times depend on, with what is in the files; plain enough for JSON.

        Raises:
            ConfigError: a name or a file is not known.
        """
        own = asdict(self)
        if self.measured is not None:
            return own | {"step_times": hashlib.sha256(self.measured.read_bytes()).hexdigest()}
        device, model = load_device(self.device or ""), load_model_shape(self.model or "")
        return own | {"device": asdict(device), "model": asdict(model)}
