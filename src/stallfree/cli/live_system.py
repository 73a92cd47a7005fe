"""A server under load, as a capacity search sees it: a rate and a seed in, a run out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from stallfree.bench.client import run_workload
from stallfree.bench.endpoint import Endpoint, prepare
from stallfree.bench.probe import PrefillTimes
from stallfree.bench.progress import OnProgress
from stallfree.bench.records import Results
from stallfree.bench.workload import Workload
from stallfree.cli.bench_serve import CONTEXT_SHARE
from stallfree.cli.drawn_workload import DrawnWorkload
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.errors import EndpointError

UNLOADED_REQUESTS = 12
_UNAVAILABLE = "unavailable"
_LOAD_FAILURES = {"refused", "timeout", _UNAVAILABLE}  # what a working server does under load


class LiveSystem:
    """A server that runs of one workload are measured on: any draw of it, at any rate.

    Args:
        endpoint: the server; what is not known of it is found out.
        settings: of the workload; its rate is not looked at.
        min_duration_s: see `DrawnWorkload`.

    Raises:
        ConfigError: the workload is a closed loop, or wrong.
        EndpointError: the server cannot be measured.
    """

    def __init__(
        self, endpoint: Endpoint, settings: WorkloadSettings, min_duration_s: float = 0.0
    ) -> None:
        # what is wrong is said before the server is asked
        self._drawn = DrawnWorkload(settings, None, min_duration_s)
        self._endpoint = asyncio.run(prepare(endpoint))
        if self._endpoint.max_model_len is not None:
            longest = int(self._endpoint.max_model_len * CONTEXT_SHARE)
            self._drawn = DrawnWorkload(settings, longest, min_duration_s)

    def facts(self) -> Mapping[str, object]:
        """All that a probe depends on, as far as that can be known."""
        endpoint = self._endpoint
        return {
            "endpoint": endpoint.base_url,
            "model": endpoint.model,
            "api": endpoint.api,
            "extra_body": dict(endpoint.extra_body),
            "timeout_s": endpoint.timeout_s,
            **self._drawn.facts(),
        }

    def measure_unloaded(self) -> PrefillTimes | None:
        """Warm the server up, one request at a time; None if it tells when it begins with one.

        Raises:
            EndpointError: a request failed.
        """
        by_size = sorted(self._drawn.first().arrivals, key=lambda each: each.prompt_tokens)
        last, count = len(by_size) - 1, min(UNLOADED_REQUESTS, len(by_size))
        places = {round(place * last / max(1, count - 1)) for place in range(count)}
        chosen = tuple(replace(by_size[place], output_tokens=1) for place in sorted(places))
        results = asyncio.run(run_workload(self._endpoint, Workload(chosen, clients=1)))
        for record in results.records:
            if record.failure is not None:
                raise EndpointError(f"without any load, {record.failure.message}")
        if any(record.scheduled_s is not None for record in results.records):
            return None
        return PrefillTimes.of(results.records)

    def measure(self, qps: float, seed: int, on_progress: OnProgress | None = None) -> Results:
        """One run, to the end of its last request, so that the next one finds the server idle.

        Raises:
            EndpointError: the server is gone, or a request failed for a reason that is not load:
                a server that dies in the middle of a run has no limit at that rate.
        """
        workload = self._drawn.at_rate(qps, seed)
        results = asyncio.run(run_workload(self._endpoint, workload, on_progress))
        failures = [each.failure for each in results.records if each.failure is not None]
        others = [each for each in failures if each.kind not in _LOAD_FAILURES]
        if others or not results.is_complete:
            reason = others[0].message if others else "it ended early"
            raise EndpointError(f"the run at {qps:g}/s with seed {seed} shows nothing: {reason}")
        if any(each.kind == _UNAVAILABLE for each in failures):
            self._check_is_alive()
        return results

    def _check_is_alive(self) -> None:
        """Send one request to the idle server: one that stops is unavailable without load too.

        Raises:
            EndpointError: it failed.
        """
        one = replace(self._drawn.first().arrivals[0], at_s=0.0, output_tokens=1)
        (record,) = asyncio.run(run_workload(self._endpoint, Workload((one,)))).records
        if record.failure is not None:
            raise EndpointError(f"after the load, {record.failure.message}")
