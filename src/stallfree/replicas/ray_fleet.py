"""Replicas on Ray Serve: where they are placed, and that others come in place of those that die.

Ray starts the processes and looks after them. Requests and answers do not go through Ray: a replica
calls its front, and they talk over that connection (`wire.py`), at one small message an iteration.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from stallfree.engine.settings import EngineSettings, available_cpus
from stallfree.errors import ConfigError, StallfreeError, WorkersLostError
from stallfree.replicas.messages import Place
from stallfree.replicas.ray_replica import RayReplica

_CALL_TIMEOUT_S = 120.0  # to place a process and to import PyTorch there, on a busy machine
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 1.0, 10.0  # a third failure in a row is a death
_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes: nothing goes through it
_SHUTDOWN_S = 1.0
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
_NAMESPACE = "serve"


class RayFleet:
    """An application of Ray Serve, on a running cluster or one of this machine alone.

    Args:
        count: of the replicas.
        settings: of each one's engine, as they were given.

    Attributes:
        host: where replicas reach this machine.
        settings: of each one's engine, with its share of its machine's processors.
        error: why Ray Serve has given up, if it has.

    Raises:
        ConfigError: Ray Serve is not installed, or the cluster has no room.
    """

    def __init__(self, count: int, settings: EngineSettings) -> None:
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise ConfigError(
                f"replicas is {count}, but Ray Serve is not installed ({error}): "
                "pip install 'stallfree[ray]'"
            ) from error
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._ray, self._serve, self._count = ray, serve, count
        self.error: StallfreeError | None = None
        self._name = f"stallfree-{secrets.token_hex(4)}"
        self.settings = _shared(settings, available_cpus() // count)
        is_running = ray.is_initialized()
        self._has_own_cluster = not is_running and _start_cluster(ray, count * self._cpus_each)
        self.host, self._num_here = "127.0.0.1", count
        if not self._has_own_cluster:
            if not is_running:
                _join_cluster(ray)
            self.host = ray.util.get_node_ip_address()
            nodes = [each["Resources"].get("CPU", 0) for each in ray.nodes() if each["Alive"]]
            nodes = [each for each in nodes if each] or [0]
            self._num_here = math.ceil(count / len(nodes))
            self.settings = _shared(settings, int(min(nodes)) // self._num_here)
            self._refuse_if_small()
        self._needs: dict[str, float] = {"num_cpus": self._cpus_each}
        if settings.device.startswith("cuda") or (
            settings.device == "auto" and torch.cuda.is_available()
        ):
            self._needs["num_gpus"] = settings.num_processes
        self._has_own_serve = not _has_serve(ray)

    def start(self, place: Place) -> None:
        """See `Fleet`."""
        logs = {"log_level": "WARNING", "enable_access_log": False}
        self._serve.start(proxy_location="Disabled", logging_config=logs)
        deployment = self._serve.deployment(
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
                self._serve.run(application, name=self._name, route_prefix=None)
            except Exception as error:
                self.error = WorkersLostError(f"Ray Serve could not start the replicas: {error}")

        threading.Thread(target=run, name="stallfree-ray-serve", daemon=True).start()

    def check_progress(self, num_called: int, seconds: float) -> None:
        """See `Fleet`."""
        if num_called < self._count and seconds > _CALL_TIMEOUT_S:
            raise ConfigError(
                f"{num_called} of {self._count} replicas were started within {seconds:.0f} s: the "
                f"Ray cluster has no room for one more with {self._needs}; it has "
                f"{self._ray.available_resources()} free"
            )

    def close(self) -> None:
        """End the replicas; Ray Serve and the cluster too, if they were started for them."""
        if self._has_own_cluster:
            self._ray.shutdown()
            return
        _try(lambda: self._serve.delete(self._name))
        if self._has_own_serve and not _try(lambda: self._serve.status().applications):
            _try(self._serve.shutdown)

    @property
    def _cpus_each(self) -> int:
        return self.settings.threads_each * self.settings.num_processes

    def _refuse_if_small(self) -> None:
        cpus = self._ray.cluster_resources().get("CPU", 0)
        if cpus < self._count * self._cpus_each:
            raise ConfigError(
                f"replicas is {self._count}, each with {self._cpus_each} CPUs; the Ray cluster has "
                f"{cpus:g}: lower threads, or add machines"
            )


def _shared(settings: EngineSettings, cpus: int) -> EngineSettings:
    """With so many processors for all processes of a replica, if nobody said how many."""
    share = max(1, cpus // settings.num_processes)
    return replace(settings, threads=settings.threads or share)


def _start_cluster(ray: Any, cpus: float) -> bool:
    """Start a cluster that ends with this process; False if one is to be joined instead.

    That is what `RAY_ADDRESS` names, or else what `ray start` has started on this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to nobody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            num_cpus=cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=True,
            logging_level="warning",
        )
    except ValueError as error:
        if "existing cluster" not in str(error):
            raise
        return False
    return True


def _join_cluster(ray: Any) -> None:
    try:
        ray.init(log_to_driver=True, logging_level="warning")
    except ConnectionError as error:
        raise ConfigError(
            f"the Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')} does not answer "
            f"({error}); with RAY_ADDRESS=local, one is started"
        ) from error


def _has_serve(ray: Any) -> bool:
    """Whether Ray Serve runs on the cluster."""
    with suppress(ValueError):
        ray.get_actor(_CONTROLLER, namespace=_NAMESPACE)
        return True
    return False


def _try(work: Callable[[], Any]) -> Any:
    """The result of `work`; None, with a line in the log, if the cluster fails it."""
    try:
        return work()
    except Exception as error:
        logging.getLogger(__name__).warning("Ray Serve could not be told to end: %s", error)
        return None
