"""Replicas on Ray Serve: where they are placed, and that others come in place of those that die.

Ray starts the processes and looks after them. Requests and answers do not go through Ray: a replica
calls its front, and they talk over that connection (`wire.py`), at one small message an iteration.
"""

from __future__ import annotations

import math
import secrets
import threading
from dataclasses import replace

import torch

from stallfree.engine.settings import EngineSettings, available_cpus
from stallfree.errors import ConfigError, StallfreeError, WorkersLostError
from stallfree.replicas.messages import Place
from stallfree.replicas.ray_cluster import RayCluster
from stallfree.replicas.ray_replica import RayReplica

_CALL_TIMEOUT_S = 120.0  # to place a process and to import PyTorch there, on a busy machine
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 1.0, 10.0  # a third failure in a row is a death
_SHUTDOWN_S = 1.0


class RayFleet:
    """An application of Ray Serve.

    Args:
        count: of the replicas.
        settings: of each one's engine, as they were given.

    Attributes:
        host: where replicas reach this machine.
        settings: of each one's engine, with its share of its machine's processors.
        error: why Ray Serve has given up, if it has.

    Raises:
        ConfigError: Ray Serve cannot be used, or the cluster has no room.
    """

    def __init__(self, count: int, settings: EngineSettings) -> None:
        self.error: StallfreeError | None = None
        self.settings = _shared(settings, available_cpus() // count)
        self._count, self._num_here = count, count
        self._name = f"stallfree-{secrets.token_hex(4)}"
        self._cluster = RayCluster(count * self._cpus_each)
        self.host = self._cluster.host
        nodes = self._cluster.node_cpus
        if nodes is not None:
            self._num_here = math.ceil(count / max(1, len(nodes)))
            self.settings = _shared(settings, min(nodes, default=0) // self._num_here)
            if sum(nodes) < count * self._cpus_each:
                raise ConfigError(
                    f"replicas is {count}, each with {self._cpus_each} CPUs; the Ray cluster has "
                    f"{sum(nodes)}: lower threads, or add machines"
                )

    def start(self, place: Place) -> None:
        """See `Fleet`."""
        serve = self._cluster.serve
        logs = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(proxy_location="Disabled", logging_config=logs)
        deployment = serve.deployment(
            name="replica",
            num_replicas=self._count,
            ray_actor_options=self._needs,
            health_check_period_s=_HEALTH_PERIOD_S,
            health_check_timeout_s=_HEALTH_TIMEOUT_S,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=_SHUTDOWN_S,
            logging_config=logs,
        )(RayReplica)
        application = deployment.bind(place, self.settings, self._num_here)

        def run() -> None:
            try:
                serve.run(application, name=self._name, route_prefix=None)
            except Exception as error:
                self.error = WorkersLostError(f"Ray Serve could not start the replicas: {error}")

        threading.Thread(target=run, name="stallfree-ray-serve", daemon=True).start()

    def check_progress(self, num_called: int, seconds: float) -> None:
        """See `Fleet`."""
        if num_called < self._count and seconds > _CALL_TIMEOUT_S:
            raise ConfigError(
                f"{num_called} of {self._count} replicas were started within {seconds:.0f} s: the "
                f"Ray cluster has no room for one more with {self._needs}; it has "
                f"{self._cluster.ray.available_resources()} free"
            )

    def close(self) -> None:
        """End the replicas; Ray Serve and the cluster too, if they were started for them."""
        self._cluster.close(self._name)

    @property
    def _cpus_each(self) -> int:
        return self.settings.threads_each * self.settings.num_processes

    @property
    def _needs(self) -> dict[str, int]:
        """What Ray reserves for a replica."""
        device = self.settings.device
        is_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        gpus = {"num_gpus": self.settings.num_processes} if is_cuda else {}
        return {"num_cpus": self._cpus_each, **gpus}


def _shared(settings: EngineSettings, cpus: int) -> EngineSettings:
    """With so many processors for all processes of a replica, if nobody said how many."""
    share = max(1, cpus // settings.num_processes)
    return replace(settings, threads=settings.threads or share)
