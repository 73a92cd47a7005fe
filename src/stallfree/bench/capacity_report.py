"""Capacities in words and as JSON. Nothing here prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from stallfree.bench.capacity import Capacity, Criterion, SeedCapacity
from stallfree.bench.probe import Probe
from stallfree.bench.report import MAX_CPU_SHARE, MAX_LATENESS_S, MIN_RUN_S

MIN_DELAYS = 20  # that may be, one after the other, in the time in which a run offers its requests


def probe_line(probe: Probe, criteria: Sequence[Criterion]) -> str:
    """A probe in a line, and which of the criteria it passes."""
    quantile = criteria[0].quantile
    parts = [] if probe.is_complete else ["given up"]
    parts += [f"{count:,} {kind}" for kind, count in probe.failures.items()]
    if probe.tbt_s is not None:
        parts.append(f"P{100 * quantile:g} TBT {time_text(probe.tbt_s[quantile])}")
    if probe.delay_s is not None:
        parts.append(
            f"median delay {'' if probe.is_delay_told else 'about '}{time_text(probe.delay_s)}"
        )
    if _is_late(probe):
        parts.append(f"sent {time_text(probe.lateness_s or 0.0)} late")
    verdicts = [
        f"{'passes' if each.is_met(probe) else 'fails'} {time_text(each.tbt_s)}"
        for each in criteria
    ]
    numbers = ", ".join(parts) or "no token came"
    return f"seed {probe.seed}  {probe.qps:>9.5g}/s  {numbers}: {', '.join(verdicts)}"


def capacity_notes(found: Sequence[Capacity]) -> list[str]:
    """What to think of capacities, in sentences."""
    notes = []
    for each in found:
        name = f"with {time_text(each.criterion.tbt_s)}"
        settled = [seed for seed in each.seeds if seed.is_settled]
        if len(settled) < len(each.seeds):
            notes.append(f"{name}, the search ended early: what is known so far is no capacity.")
        if any(seed.failed_qps is None for seed in settled):
            notes.append(f"{name}, nothing failed up to the highest rate that was tried.")
        if any(seed.qps is None for seed in settled):
            notes.append(f"{name}, nothing passed down to the lowest rate that was tried.")
        notes += [
            f"{name}, seed {seed.seed} passed {seed.passed_above_qps:g} although it failed "
            f"{seed.failed_qps:g}: its runs scatter, and the lower rate was taken as the limit."
            for seed in each.seeds
            if seed.passed_above_qps is not None
        ]
        if short := _shortness_note(each):
            notes.append(f"{name}, {short}")
    notes += _client_notes(found[0].probes if found else ())
    delays = [probe for each in found for probe in each.probes if probe.delay_s is not None]
    if any(not probe.is_delay_told for probe in delays):
        notes.append(
            "the server does not tell when it begins with a request; delays are times to the first "
            "token less those of prompts of that size without load."
        )
    return notes


def _shortness_note(found: Capacity) -> str | None:
    """A sentence if the runs that decided were too short to show an overload; None if not.

    Requests wait a time that grows with the run: at q times the rate that can be served, the median
    of a run in which they arrive for T seconds is about T / 2 * (q - 1).
    """
    decisive = {(seed.seed, seed.qps) for seed in found.seeds if seed.is_settled}
    runs = [each for each in found.probes if (each.seed, each.qps) in decisive]
    shortest = min(runs, key=lambda each: each.num_requests / each.qps, default=None)
    max_delay_s = found.criterion.max_delay_s
    if shortest is None or shortest.num_requests / shortest.qps >= MIN_DELAYS * max_delay_s:
        return None
    lasted_s = shortest.num_requests / shortest.qps
    wanted = max(math.ceil(MIN_DELAYS * max_delay_s * each.qps) for each in runs)
    return (
        f"runs of {shortest.num_requests:,} requests last {time_text(lasted_s)}, in which a median "
        f"delay of {time_text(max_delay_s)} takes an overload of {2 * max_delay_s / lasted_s:.0%}: "
        f"the capacity may be less; take {wanted:,} requests or more, or a longer --min-duration."
    )


def _client_notes(probes: Sequence[Probe]) -> list[str]:
    """Sentences on a load generator that was itself at its limit."""
    notes = []
    late = [probe for probe in probes if _is_late(probe)]
    if late:
        most_s = max(probe.lateness_s or 0.0 for probe in late)
        notes.append(
            f"this client sent requests late in {len(late):,} of {len(probes):,} runs, from "
            f"{min(probe.qps for probe in late):g}/s on, by up to {time_text(most_s)} at P99: what "
            "was not offered does not pass; use more machines."
        )
    shares = [probe.client_cpu or 0.0 for probe in probes if (probe.duration_s or 0.0) >= MIN_RUN_S]
    if max(shares, default=0.0) > MAX_CPU_SHARE:
        notes.append(
            f"this client used up to {max(shares):.0%} of a core: times may be its own; use more "
            "machines."
        )
    return notes


def _is_late(probe: Probe) -> bool:
    return probe.lateness_s is not None and probe.lateness_s > MAX_LATENESS_S


def capacity_json(found: Sequence[Capacity], facts: Mapping[str, object]) -> dict[str, Any]:
    """Capacities, the probes that all of them are judged by, and what they were measured on."""
    capacities = [
        {
            "criterion": asdict(each.criterion),
            "mean_qps": each.mean_qps,
            "interval_qps": each.interval_qps,
            "seeds": [asdict(seed) for seed in each.seeds],
        }
        for each in found
    ]
    probes = [probe.as_json() for probe in (found[0].probes if found else ())]
    return {"facts": dict(facts), "capacities": capacities, "probes": probes}


def seed_text(found: SeedCapacity) -> str:
    """The capacity of a seed in a few words."""
    if not found.is_settled:
        known = {"over": found.qps, "below": found.failed_qps}
        limits = [f"{word} {qps:.4g}" for word, qps in known.items() if qps is not None]
        return f"{' and '.join(limits)} so far" if limits else "not known"
    if found.qps is None:
        return f"below {found.failed_qps:.4g}"
    return f"{found.qps:.4g}" if found.failed_qps is not None else f"at least {found.qps:.4g}"


def time_text(seconds: float) -> str:
    """A time with three digits, in its unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
