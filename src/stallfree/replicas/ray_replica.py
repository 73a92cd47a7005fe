"""What Ray Serve runs: a replica, in a process of Ray's."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import replace

import torch

from stallfree.engine.memory import default_share, free_bytes
from stallfree.engine.settings import EngineSettings
from stallfree.replicas.messages import Place
from stallfree.replicas.replica import Replica
from stallfree.replicas.wire import has_ended

_FORGET_S = 5.0


class RayReplica:
    """A replica that ends with its connection to the front: Ray Serve then starts another.

    If the front has ended, nothing is to be started any more.

    Args:
        place: of the front.
        settings: of the engine.
        num_here: replicas that share this machine.

    Raises:
        ConnectionRefusedError: the front has ended.
        OSError: the front cannot be reached.
        StallfreeError: the engine cannot be built.
    """

    def __init__(self, place: Place, settings: EngineSettings, num_here: int) -> None:
        from ray import serve

        self._place = place
        self._application: str = serve.get_replica_context().app_name
        try:
            self._replica = Replica(place, _shared(settings, num_here), self._end, num_here)
        except ConnectionRefusedError:
            self._forget()
            raise

    async def check_health(self) -> None:
        """For Ray Serve: raises if the engine has died."""
        if self._replica.error is not None:
            raise self._replica.error

    def _end(self) -> None:
        if has_ended(self._place):
            self._forget()
        os._exit(1)

    def _forget(self) -> None:
        """Have Ray Serve end the application, as far as it can be reached."""
        from ray import serve

        def delete() -> None:
            serve.delete(self._application, _blocking=False)

        thread = threading.Thread(target=delete, daemon=True)
        thread.start()
        thread.join(_FORGET_S)


def _shared(settings: EngineSettings, num_here: int) -> EngineSettings:
    """With a share of the memory that one engine would take, if nobody said how much."""
    is_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.kv_cache_memory_bytes is not None or num_here == 1 or not is_cpu:
        return settings
    device = torch.device("cpu")
    memory = math.floor(default_share(device) * free_bytes(device) / num_here)
    return replace(settings, kv_cache_memory_bytes=memory)
