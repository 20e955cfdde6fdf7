"""Which groups to quantize, and how far: pure arithmetic on what each choice costs and damages.

What single groups do does not add up to what a mix does. So damage is predicted as a multiple of the sum, and the multiple is
taken from the mixes that were measured: between two of them it is interpolated.
"""

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise

LEVELS = 20_000
"""Into so many what is left of a limit is divided; there are fewer groups."""
Choice = tuple[int, float]
"""Bytes, and the KL divergence of this group alone in that state, in nats a token."""


@dataclass(frozen=True)
class Step:
    """A group that goes from one of its choices to a larger and better one."""

    group: int
    to: int
    """The number of the choice."""
    bytes: int
    """How many more it takes."""
    gain: float
    """How much less the sum of the groups' KL divergences is."""


@dataclass(frozen=True)
class Point:
    """A mix: the number of each group's choice, its bytes, and the sum of its groups' KL divergences."""

    chosen: tuple[int, ...]
    bytes: int
    sum: float


def steps(groups: list[list[Choice]]) -> tuple[list[int], list[Step]]:
    """The smallest choice of each group; and the steps up from there, those first that gain most for a byte.

    A group's steps go along the lower convex hull of its choices, so that they are in their order by themselves. A choice that
    is larger than another and no better is none; nothing is gained from a group that is measured as better when quantized.
    """
    smallest, found = [], list[Step]()
    for number, choices in enumerate(groups):
        order = sorted(range(len(choices)), key=lambda i: (choices[i][0], choices[i][1]))
        hull = [order[0]]
        for i in order[1:]:
            if choices[i][1] >= choices[hull[-1]][1]:
                continue
            while len(hull) > 1 and _slope(choices, hull[-2], hull[-1]) <= _slope(choices, hull[-1], i):
                hull.pop()
            hull.append(i)
        smallest.append(hull[0])
        for one, other in pairwise(hull):
            (small, worse), (large, better) = choices[one], choices[other]
            found.append(Step(number, other, large - small, worse - better))
    found.sort(key=lambda step: (-step.gain / max(step.bytes, 1), step.group, step.to))
    return smallest, found


def _slope(choices: list[Choice], one: int, other: int) -> float:
    """Gain for a byte between two choices."""
    (small, worse), (large, better) = choices[one], choices[other]
    return (worse - better) / max(large - small, 1)


def _point(groups: list[list[Choice]], chosen: list[int]) -> Point:
    taken = [choices[i] for choices, i in zip(groups, chosen, strict=True)]
    return Point(tuple(chosen), sum(size for size, _ in taken), sum(kl for _, kl in taken))


def frontier(groups: list[list[Choice]]) -> list[Point]:
    """Mixes from the smallest on, each a step larger than the one before it: the lower hull of all that there are."""
    smallest, found = steps(groups)
    first = _point(groups, smallest)
    chosen, size, total = smallest, first.bytes, first.sum
    points = [first]
    for step in found:
        chosen[step.group] = step.to
        size, total = size + step.bytes, total - step.gain
        points.append(Point(tuple(chosen), size, total))
    return points


def best_within(groups: list[list[Choice]], most: int) -> Point | None:
    """The mix of at most so many bytes with the least sum; None where the smallest takes more."""
    chosen = _least([[(kl, size) for size, kl in choices] for choices in groups], most)
    return None if chosen is None else _point(groups, chosen)


def smallest_within(groups: list[list[Choice]], total: float) -> Point | None:
    """The smallest mix whose sum is at most `total`; None where the least sum is more."""
    chosen = _least([[(size, kl) for size, kl in choices] for choices in groups], total)
    return None if chosen is None else _point(groups, chosen)


def _least(groups: list[list[tuple[float, float]]], most: float) -> list[int] | None:
    """Of all mixes whose second numbers add up to at most `most`, the choices of the one with the least sum of first numbers.

    By dynamic programming over LEVELS levels of what is left of `most`. What a choice takes is rounded up to a level, and a
    level for each group is granted for that; where the mix then takes too much, none is, and what is found keeps `most`.
    """
    needed = [min(takes for _, takes in choices) for choices in groups]
    room = most - sum(needed)
    if room < 0:
        return None
    levels = [
        [_level(takes - least, room) for _, takes in choices] for choices, least in zip(groups, needed, strict=True)
    ]
    for granted in (len(groups), 0):
        chosen = _least_of_levels([[costs for costs, _ in choices] for choices in groups], levels, LEVELS + granted)
        if sum(choices[i][1] for choices, i in zip(groups, chosen, strict=True)) <= most:
            break
    return chosen


def _least_of_levels(costs: list[list[float]], levels: list[list[int]], most: int) -> list[int]:
    """The choices with the least sum of `costs` whose `levels` add up to at most `most`."""
    import numpy as np

    best, taken = np.zeros(most + 1), np.zeros((len(costs), most + 1), dtype=np.uint8)
    for number, choices in enumerate(costs):
        tried = np.full((len(choices), most + 1), np.inf)
        for choice, (cost, level) in enumerate(zip(choices, levels[number], strict=True)):
            if level <= most:
                tried[choice, level:] = best[: most + 1 - level] + cost
        taken[number], best = tried.argmin(0), tried.min(0)
    chosen, left = [0] * len(costs), most
    for number in reversed(range(len(costs))):
        chosen[number] = int(taken[number, left])
        left -= levels[number][chosen[number]]
    return chosen


def _level(takes: float, room: float) -> int:
    """How many levels of the room this takes, rounded up; more than there are where it takes more than the room."""
    if takes <= 0:
        return 0
    return math.ceil(takes / room * LEVELS - 1e-9) if takes <= room else 2 * LEVELS


def predicted(total: float, measured: list[tuple[float, float]]) -> float:
    """The damage of a mix with this sum, from (sum, damage) of the mixes that were measured; at least one has both.

    Damage is taken for a power of the sum between two neighbours, and for a multiple of it where only one is known.
    """
    known = sorted((one, damage) for one, damage in dict(measured).items() if one > 0 and damage > 0)
    if total <= 0 or not known:
        return 0.0
    right = min(max(bisect.bisect(known, (total, math.inf)), 1), len(known) - 1)
    (low, less), (high, more) = known[right - 1], known[right] if len(known) > 1 else known[0]
    power = math.log(more / less) / math.log(high / low) if high > low else 1.0
    return less * math.exp(min(max(power, 0.3), 3.0) * math.log(total / low))


def smallest_keeping(groups: list[list[Choice]], limit: float, measured: list[tuple[float, float]]) -> Point | None:
    """The smallest mix whose predicted damage is at most `limit`; None where none has."""
    low, high = 0.0, sum(max(kl for _, kl in choices) for choices in groups)
    if predicted(high, measured) <= limit:
        return smallest_within(groups, high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle, measured) <= limit else (low, middle)
    return smallest_within(groups, low)
