"""A cluster that replicas are placed on: one that runs, or one of this machine alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from stallfree.errors import ConfigError

_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes: nothing goes through it
_CONTROLLER, _NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"

logger = logging.getLogger(__name__)


class RayCluster:
    """What this process is connected to with Ray, or connects to now.

    That is the cluster which `RAY_ADDRESS` names, or else the one that `ray start` has started on
    this machine. If there is none, one is started that ends with this process.

    Args:
        cpus: that a cluster of this process's own has to give.

    Attributes:
        ray, serve: the libraries.
        host: where its machines reach this one.
        node_cpus: of each machine that has any; None in a cluster of this process's own.

    Raises:
        ConfigError: Ray Serve is not installed, or the cluster does not answer.
    """

    def __init__(self, cpus: int) -> None:
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise ConfigError(
                f"replicas need Ray Serve, which is not installed ({error}): "
                "pip install 'stallfree[ray]'"
            ) from error
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self.ray, self.serve = ray, serve
        self.host = "127.0.0.1"
        self.node_cpus: list[int] | None = None
        is_connected = ray.is_initialized()
        self._is_own = not is_connected and _start(ray, cpus)
        if not self._is_own:
            if not is_connected:
                _join(ray)
            self.host = ray.util.get_node_ip_address()
            cpus_of = [
                int(each["Resources"].get("CPU", 0)) for each in ray.nodes() if each["Alive"]
            ]
            self.node_cpus = [each for each in cpus_of if each]
        self._has_own_serve = not self._has_serve()

    def close(self, application: str) -> None:
        """End an application; Ray Serve and the cluster too, if they were started for it."""
        if self._is_own:
            self.ray.shutdown()
            return
        _try(lambda: self.serve.delete(application))
        if self._has_own_serve and not _try(lambda: self.serve.status().applications):
            _try(self.serve.shutdown)

    def _has_serve(self) -> bool:
        with suppress(ValueError):
            self.ray.get_actor(_CONTROLLER, namespace=_NAMESPACE)
            return True
        return False


def _start(ray: Any, cpus: int) -> bool:
    """Start a cluster; False if there is one to be joined."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to nobody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of a change
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


def _join(ray: Any) -> None:
    try:
        ray.init(log_to_driver=True, logging_level="warning")
    except ConnectionError as error:
        raise ConfigError(
            f"the Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')} does not answer "
            f"({error}); with RAY_ADDRESS=local, one is started"
        ) from error


def _try(work: Callable[[], Any]) -> Any:
    """The result of `work`; None, with a line in the log, if the cluster fails it."""
    try:
        return work()
    except Exception as error:
        logger.warning("Ray Serve could not be told to end: %s", error)
        return None
