"""From settings to running replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stallfree.engine.progress import progress
from stallfree.engine.settings import EngineSettings, ServerSettings
from stallfree.engine.tokenizer import load_tokenizer
from stallfree.errors import ConfigError
from stallfree.model.source import open_model
from stallfree.replicas.front import ReplicatedEngine
from stallfree.replicas.ray_fleet import RayFleet
from stallfree.replicas.roster import Roster


def launch(
    settings: EngineSettings, server: ServerSettings, *, show_progress: bool = True
) -> ReplicatedEngine:
    """Start as many replicas as the settings say, on Ray Serve, and wait until all are ready.

    Raises:
        ConfigError: the settings do not go together, or Ray has no room.
        ModelError: the model cannot be used.
        WorkersLostError: a replica did not start.
    """
    count = server.replicas
    for name, value in (
        ("iteration_file", settings.iteration_file),
        ("trace_file", settings.trace_file),
    ):
        if value is not None:
            raise ConfigError(f"{name} is {value}, but replicas is {count}: all would write there")
    if settings.distributed_executor != "mp":
        raise ConfigError(
            f"distributed_executor is {settings.distributed_executor}, but replicas is {count}: "
            "the processes of a replica are on its own machine; leave it out"
        )
    tokenizer = load_tokenizer(open_model(settings.model, settings.revision))
    if settings.model is not None and Path(settings.model).exists():
        settings = replace(settings, model=str(Path(settings.model).resolve()))
    with progress(show_progress) as bar:
        bar.add_task(f"starting {count} copies of the model", total=None)
        fleet = RayFleet(count, settings)
        roster = Roster(fleet, count, server.replica_timeout_s)
    return ReplicatedEngine(roster, fleet.settings, tokenizer)
