"""Taking the samples: in every round each contender has its turn, so that a noisy minute hits all alike."""

from __future__ import annotations

import sys
import time
from typing import List

from .errors import ProbeFailed
from .measurements import Contender, Measurement
from .results import Result
from .servers import Fleet
from .trial import Sample, Settings, Trial

_BREATHER = 0.05
"""Seconds before each sample, so that it does not pay for what the one before has left to tidy up."""


def measure(measurements: List[Measurement], fleet: Fleet, settings: Settings) -> List[Result]:
    """All *measurements*, one after the other; says on stderr how far it has got."""
    results = []
    for number, measurement in enumerate(measurements, 1):
        print(f"[{number}/{len(measurements)}] {measurement.title}", file=sys.stderr, flush=True)
        results.append(_measure_one(measurement, fleet, settings))
    return results


def _measure_one(measurement: Measurement, fleet: Fleet, settings: Settings) -> Result:
    names = list(measurement.contenders)
    result = Result(
        name=measurement.name,
        title=measurement.title,
        unit=measurement.unit,
        goal=measurement.goal,
        panel=measurement.panel,
        contenders=names,
        samples={name: [] for name in names},
        references=list(measurement.references),
    )
    for round_ in range(min(settings.rounds, measurement.most_rounds)):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(_BREATHER)
            sample = _take(measurement.contenders[name], fleet, settings, round_)
            if "error" in sample:
                print(f"    {name}: {sample['error']}", file=sys.stderr, flush=True)
            result.samples[name].append(sample)
    return result


def _take(contender: Contender, fleet: Fleet, settings: Settings, round_: int) -> Sample:
    try:
        if contender.server is None:
            return contender.probe(Trial(settings, None, round_))
        with fleet.lend(contender.server) as server:
            return contender.probe(Trial(settings, server, round_))
    except ProbeFailed as failure:
        return {"error": str(failure)}
