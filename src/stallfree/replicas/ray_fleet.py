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
        settings: of each one's engine.

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
        self._has_own_cluster = not ray.is_initialized() and not _join_cluster(ray)
        if self._has_own_cluster:
            here = count
            cpus: float = available_cpus()
        else:
            nodes = [each["Resources"].get("CPU", 0) for each in ray.nodes() if each["Alive"]]
            nodes = [each for each in nodes if each] or [0]
            here, cpus = math.ceil(count / len(nodes)), min(nodes)
        share = max(1, int(cpus) // (here * settings.num_processes))
        self.settings = replace(settings, threads=settings.threads or share)
        self._num_here = here
        cpus_each = self.settings.threads_each * settings.num_processes
        self._needs: dict[str, float] = {"num_cpus": cpus_each}
        if settings.device.startswith("cuda") or (
            settings.device == "auto" and torch.cuda.is_available()
        ):
            self._needs["num_gpus"] = settings.num_processes
        if self._has_own_cluster:
            _start_cluster(ray, count * cpus_each)
            self.host = "127.0.0.1"
        else:
            self.host = ray.util.get_node_ip_address()
            self._refuse_if_small(cpus_each)
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

    def _refuse_if_small(self, cpus_each: int) -> None:
        total = self._ray.cluster_resources()
        if total.get("CPU", 0) < self._count * cpus_each:
            raise ConfigError(
                f"replicas is {self._count}, each with {cpus_each} CPUs; the Ray cluster has "
                f"{total.get('CPU', 0):g}"
            )


def _join_cluster(ray: Any) -> bool:
    """Connect to a cluster that runs; False if none does."""
    try:
        ray.init(address="auto", log_to_driver=True, logging_level="warning")
    except ConnectionError:
        return False
    return True


def _start_cluster(ray: Any, cpus: float) -> None:
    """A cluster of this machine that ends with this process; it reports to nobody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=True,
        logging_level="warning",
    )


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
