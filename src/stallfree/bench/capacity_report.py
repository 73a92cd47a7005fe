"""Capacities in words and as JSON. Nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from stallfree.bench.capacity import Capacity, Criterion, SeedCapacity
from stallfree.bench.probe import Probe


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
        if any(seed.failed_qps is None for seed in each.seeds):
            notes.append(f"{name}, nothing failed up to the highest rate that was tried.")
        if any(seed.qps is None for seed in each.seeds):
            notes.append(f"{name}, nothing passed down to the lowest rate that was tried.")
        notes += [
            f"{name}, seed {seed.seed} passed {seed.passed_above_qps:g} although it failed "
            f"{seed.failed_qps:g}: its runs scatter, and the lower rate was taken as the limit."
            for seed in each.seeds
            if seed.passed_above_qps is not None
        ]
    delays = [probe for each in found for probe in each.probes if probe.delay_s is not None]
    if any(not probe.is_delay_told for probe in delays):
        notes.append(
            "the server does not tell when it begins with a request; delays are times to the first "
            "token less those of prompts of that size without load."
        )
    return notes


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
    if found.qps is None:
        return f"below {found.failed_qps:.4g}"
    return f"{found.qps:.4g}" if found.failed_qps is not None else f"at least {found.qps:.4g}"


def time_text(seconds: float) -> str:
    """A time with three digits, in its unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
