"""From single measurements to what is shown: medians, their spread, and ratios by round.

A record is the JSON of one workload: who took part, and one entry in `turns` for each turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Spread:
        """Returns what was measured once."""
        return cls(value, value, value)


def spread(values: Iterable[float]) -> Spread | None:
    """Returns the median and quartiles; None of no values."""
    values = list(values)
    if not values:
        return None
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(low), float(median), float(high))


def by_round(record: Record, peer: str, measure: str) -> dict[int, float]:
    """Returns what was measured of a peer, by round."""
    return {
        turn["round"]: turn["figures"][measure]
        for turn in record["turns"]
        if turn["peer"] == peer and measure in turn["figures"]
    }


def of(record: Record, peer: str, measure: str) -> Spread | None:
    """Returns the spread of a measure of a peer."""
    return spread(by_round(record, peer, measure).values())


def ratios(record: Record, measure: str, above: str, below: str) -> list[float]:
    """Returns `above / below` for each round in which both were measured.

    Two turns of one round lie close together in time, so that a slow minute hits both.
    """
    tops, bottoms = by_round(record, above, measure), by_round(record, below, measure)
    return [tops[number] / bottoms[number] for number in tops if bottoms.get(number)]


def ratio(record: Record, measure: str, above: str, below: str) -> Spread | None:
    """Returns the spread of `ratios`."""
    return spread(ratios(record, measure, above, below))


def floors(record: Record) -> list[str]:
    """Returns the names of the raw peers that were measured."""
    return [
        name
        for name, about in record["peers"].items()
        if about["is_floor"] and of(record, name, "committed")
    ]


def slope(sizes: Iterable[float], values: Iterable[float]) -> float:
    """Returns the exponent of growth: 1 is linear, by least squares on the logarithms."""
    x, y = np.log(list(sizes)), np.log(list(values))
    return float(np.polyfit(x, y, 1)[0])


def geometric_mean(values: Iterable[float]) -> float:
    """Returns the mean of ratios."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))
