"""Placing the processes of a model on the machines of a Ray cluster.

Ray starts them and says where; from then on they talk to the driver as local ones do, over a
connection that they open. The model's files must be at the same path on every machine.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from stallfree.errors import ConfigError, WorkersLostError
from stallfree.executor.messages import WorkerSpec
from stallfree.executor.worker import main

_PLACEMENT_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 120.0  # importing PyTorch on a busy machine
_POLL_S = 0.5


class RayLauncher:
    """Reserves room in a running cluster (`ray start`), and starts workers there.

    The shares of a stage are on one machine; stages are on several, if there are.

    Args:
        num_stages: of the model's pipeline.
        tp_size: workers of each stage.
        threads: CPUs that each worker needs.
        is_cuda: whether each needs a GPU too.

    Attributes:
        host: where workers reach this machine.

    Raises:
        ConfigError: Ray is not installed, no cluster runs, or it has no room.
    """

    def __init__(self, num_stages: int, tp_size: int, threads: int, *, is_cuda: bool) -> None:
        try:
            import ray
            from ray.util.placement_group import placement_group
        except ImportError as error:
            raise ConfigError(
                "distributed_executor is ray, which is not installed: pip install 'stallfree[ray]'"
            ) from error
        if not ray.is_initialized():
            try:
                ray.init(address="auto", log_to_driver=True, logging_level="warning")
            except ConnectionError as error:
                raise ConfigError(
                    "distributed_executor is ray, but no cluster runs here: `ray start --head`"
                ) from error
        self._ray = ray
        self.host: str = ray.util.get_node_ip_address()
        self._needs = {"num_cpus": threads, "num_gpus": int(is_cuda)}
        bundle = {"CPU": threads * tp_size, **({"GPU": tp_size} if is_cuda else {})}
        bundles = [dict(bundle) for _ in range(num_stages)]
        self._group = placement_group(bundles, strategy="SPREAD")
        if not self._group.wait(_PLACEMENT_TIMEOUT_S):
            self._ray.util.remove_placement_group(self._group)
            raise ConfigError(
                f"the Ray cluster has no room for {num_stages} stages of {bundle} within "
                f"{_PLACEMENT_TIMEOUT_S:g} s: it has {ray.cluster_resources()}"
            )
        self._key = secrets.token_bytes(32)
        self._listener = Listener((self.host, 0), authkey=self._key)
        self._accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        threading.Thread(target=self._accept, name="stallfree-accept", daemon=True).start()

    def close(self) -> None:
        """Give back the room in the cluster."""
        self._listener.close()
        self._ray.util.remove_placement_group(self._group)

    def start(self, spec: WorkerSpec) -> RayProcess:
        """Start a worker, and wait until it has called back.

        Raises:
            WorkersLostError: it could not be started.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=spec.rank // spec.part.tp_size
        )
        task = self._ray.remote(_work).options(
            **self._needs,
            scheduling_strategy=place,
            max_retries=0,
        )
        reference = task.remote(self._listener.address, self._key)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                connection = self._accepted.get(timeout=_POLL_S)
            except queue.Empty:
                self._refuse_if_ended(spec, reference)
                continue
            connection.send(spec)
            return RayProcess(self._ray, reference, connection)
        self._ray.cancel(reference, force=True)
        raise WorkersLostError(
            f"{spec.name} has not called back within {_START_TIMEOUT_S:g} s: the cluster may have "
            "lost the machine it was on"
        )

    def _accept(self) -> None:
        """Take the calls of workers until the launcher is closed; others do not know the key."""
        with suppress(OSError):
            while True:
                with suppress(AuthenticationError, EOFError, ConnectionError):
                    self._accepted.put(self._listener.accept())

    def _refuse_if_ended(self, spec: WorkerSpec, reference: Any) -> None:
        ended, _ = self._ray.wait([reference], timeout=0)
        if not ended:
            return
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise WorkersLostError(f"{spec.name} could not be started: {error}") from error
        raise WorkersLostError(f"{spec.name} has ended before it called back")


class RayProcess:
    """A worker on a machine of the cluster."""

    def __init__(self, ray: Any, reference: Any, connection: Connection) -> None:
        self._ray, self._reference = ray, reference
        self.connection = connection

    def how_it_ended(self) -> str:
        """As Ray tells it, if it knows yet."""
        ended, _ = self._ray.wait([self._reference], timeout=1)
        if not ended:
            return "its connection ended"
        try:
            self._ray.get(self._reference)
        except self._ray.exceptions.RayError as error:
            return f"Ray says: {error}"
        return "it ended by itself"

    def kill(self) -> None:
        """End it: it ends with its connection, and if it cannot, Ray ends it."""
        self.connection.close()
        self._ray.cancel(self._reference, force=True)


def _work(address: Any, key: bytes) -> None:
    """What Ray runs: the worker, in a process of Ray's."""
    main(Client(address, authkey=key))
