"""The draws of one workload that a search for a capacity runs: any seed, at any rate."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from stallfree.bench.arrivals import parse_arrivals
from stallfree.bench.workload import Workload
from stallfree.bench.workloads import stretched
from stallfree.cli.workload_options import MAX_REQUESTS, WorkloadSettings
from stallfree.errors import ConfigError


class DrawnWorkload:
    """One workload, drawn with any seed.

    Args:
        settings: of the workload; its rate is not looked at.
        max_model_len: tokens that the model's context holds; None if that is not known.
        min_duration_s: least time over which the requests of a rate arrive. Where they would
            arrive sooner there are more of them, unless they are those of a file.

    Raises:
        ConfigError: the workload is a closed loop, or wrong.
    """

    def __init__(
        self,
        settings: WorkloadSettings,
        max_model_len: int | None = None,
        min_duration_s: float = 0.0,
    ) -> None:
        if settings.clients is not None:
            raise ConfigError(f"clients is {settings.clients}; a capacity needs an open loop")
        self._settings = replace(settings, qps=None)
        self._max_model_len = max_model_len
        self._min_duration_s = min_duration_s
        self.first()  # what is wrong is said at once

    def first(self) -> Workload:
        """The requests of the seed that is set."""
        return self._draw(self._settings.workload_seed)

    def check_seeds(self, seeds: Sequence[int]) -> None:
        """Check that several seeds are several draws: of one there is no confidence.

        Raises:
            ConfigError: they are all the same.
        """
        if len(seeds) > 1 and self._draw(seeds[0]).arrivals == self._draw(seeds[1]).arrivals:
            raise ConfigError(
                f"seeds is {len(seeds)}, but each seed draws the same requests at the same times "
                "from this workload: take --seeds 1"
            )

    def at_rate(self, qps: float, seed: int) -> Workload:
        """The requests of a seed.

        The draw's own rate is made `qps` exactly, so that draws differ in less than they might.

        Raises:
            ConfigError: they all arrive at once.
        """
        return stretched(self._draw(seed, math.ceil(qps * self._min_duration_s)), qps)

    def facts(self) -> Mapping[str, object]:
        """What all draws depend on but their seed, as far as that can be known."""
        arrivals = [asdict(each) for each in self._draw(0).arrivals]
        return {
            "workload": self._settings.lengths,
            "arrivals": self._settings.arrivals,
            "requests": len(arrivals),
            "min_duration_s": self._min_duration_s,
            "requests_hash": hashlib.sha256(json.dumps(arrivals).encode()).hexdigest()[:16],
        }

    def _draw(self, seed: int, least: int = 0) -> Workload:
        """At least so many requests of a seed; those of a replay are the same for all."""
        settings = self._settings
        if settings.replay is None:
            settings = replace(settings, workload_seed=seed)
            if parse_arrivals(settings.arrivals) is not None:
                most = min(max(settings.num_requests, least), MAX_REQUESTS)
                settings = replace(settings, num_requests=most)
        return settings.workload(self._max_model_len)
