"""The search for the mix that keeps a limit: what is predicted of mixes, and what was measured of them. No model is loaded here."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from configs.errors import BadInputError, TameError
from tasks.fit.allocate import Point, best_within, frontier, predicted, smallest_keeping
from tasks.fit.limits import Limits, Measure
from tasks.fitted import FitGroup, FitPoint

TRIES = 5
"""Mixes that are measured at most."""
CLOSE = 0.002
"""A mix is taken when no other that may keep the limit is smaller by more than this share of its bytes."""
ALL = "all quantized"


class Table:
    """Everything that is known of the mixes of a model: predictions, and what was measured."""

    def __init__(self, groups: list[FitGroup], size: int, whole: Measure, limits: Limits) -> None:
        self.groups, self.limits = groups, limits
        self.choices = [list(zip(group.bytes, group.kl, strict=True)) for group in groups]
        self.points = frontier(self.choices)
        small = any(len(set(group.bits)) < len(group.bits) for group in groups)
        self.between = "in_small_groups" if small else "in_8_bits"
        """What the choices between the first and the last are called in results."""
        self.rest = size - sum(group.bytes[0] for group in groups)
        """Bytes of all that is in no group, and of the headers where all is quantized: no mix has more of these."""
        everything = Point((0,) * len(groups), size - self.rest, sum(group.kl[0] for group in groups))
        self.measured = [(everything, whole)]
        self.said: dict[tuple[int, ...], float | None] = {everything.chosen: None}
        self.original = Point(tuple(len(group.bits) - 1 for group in groups), sum(g.bytes[-1] for g in groups), 0.0)

    @classmethod
    def read(cls, file: Path, limits: Limits) -> Self:
        """What is known at the beginning: the file with the sensitivities."""
        content = json.loads(file.read_bytes())
        whole = Measure(**{name: tuple(value) for name, value in content["whole"].items()})
        return cls([FitGroup(**group) for group in content["groups"]], content["bytes"], whole, limits)

    def mix(self, point: Point) -> dict[str, int]:
        """The weights that a mix quantizes, by the model's names, and which of their choices it takes."""
        return {
            f"{name}.weight": choice
            for group, choice in zip(self.groups, point.chosen, strict=True)
            if choice < len(group.bits) - 1
            for name in group.modules
        }

    def modules(self, point: Point) -> tuple[list[str], list[str]]:
        """The modules that stay in 16 bits, and those that have more than the least."""
        kept = self._modules(point, lambda group, choice: choice == len(group.bits) - 1)
        return kept, self._modules(point, lambda group, choice: 0 < choice < len(group.bits) - 1)

    def fit(self, measure: Callable[[Point], Measure]) -> dict[str, Any]:
        """The mix that keeps the limits, as `Fitted` has it, measured by `measure`."""
        taken = self._within_bytes(measure) if self.limits.max_bytes is not None else self._within_damage(measure)
        told = {point.chosen: self._told(number, point) for number, (point, _) in enumerate(self.measured)}
        kept, between = self.modules(taken)
        return {
            "modules": kept,
            "in_8_bits": [],
            "in_small_groups": [],
            self.between: between,
            "taken": told[taken.chosen].model_dump(),
            "measured": [point.model_dump() for point in told.values()],
            "curve": [self._predicted(point).model_dump() for point in self.points],
            "error": self._error(),
            "next": self._next(taken),
        }

    def _modules(self, point: Point, wanted: Callable[[FitGroup, int], bool]) -> list[str]:
        """The modules of the groups whose choice is wanted."""
        chosen = zip(self.groups, point.chosen, strict=True)
        return [name for group, choice in chosen if wanted(group, choice) for name in group.modules]

    def _within_bytes(self, measure: Callable[[Point], Measure]) -> Point:
        most = self.limits.max_bytes
        assert most is not None
        if self.original.bytes + self.rest <= most:
            raise BadInputError(
                f"fit: {self.limits}: the model takes {_mb(self.original.bytes + self.rest)} as it is; lower max_bytes, or leave "
                "the variant out"
            )
        point = best_within(self.choices, most - self.rest)
        if point is None:
            all_quantized, whole = self.measured[0]
            raise BadInputError(
                f"fit: {self.limits}: no mix fits; with all quantized the weights take {_mb(all_quantized.bytes + self.rest)}, "
                f"with KL {whole.kl[0]:.4f}; raise max_bytes"
            )
        return self._measure(point, measure)

    def _within_damage(self, measure: Callable[[Point], Measure]) -> Point:
        """The smallest mix that keeps the limits: predict, measure, correct."""
        if self.measured[0][1].damage(self.limits) <= 1:
            return self.measured[0][0]
        largest = [point for point in self.points if point.sum > 0][-1]
        if self._predict(largest) > 1:
            raise BadInputError(
                f"fit: {self.limits}: no mix keeps it; the one with the least damage quantizes {_of(self.groups, largest)} alone, "
                f"takes {_mb(largest.bytes + self.rest)} of the model's {_mb(self.original.bytes + self.rest)}, and comes to "
                f"about {self._predict(largest):.3g} times the limit; raise the limit, or publish the original"
            )
        for number in range(TRIES):
            # A try that only just fails helps nobody, and the last one has to hold.
            wanted = 1.0 if number < TRIES - 2 else 0.97 if number < TRIES - 1 else 0.85
            knots = [(point.sum, found.damage(self.limits)) for point, found in self.measured]
            point = smallest_keeping(self.choices, wanted, knots)
            holding = self._holding()
            if point is None or point.chosen in self.said:
                break
            if holding and holding.bytes - point.bytes <= CLOSE * (holding.bytes + self.rest):
                break
            self._measure(point, measure)
        holding = self._holding()
        if holding is None:
            least = min(self.measured, key=lambda one: one[1].damage(self.limits))
            raise TameError(
                f"fit: {self.limits}: none of {len(self.measured)} measured mixes keeps it; the nearest takes "
                f"{_mb(least[0].bytes + self.rest)} and comes to {least[1].damage(self.limits):.3g} times the limit; raise it"
            )
        return holding

    def _holding(self) -> Point | None:
        """The smallest measured mix that keeps the limits."""
        kept = [point for point, found in self.measured if found.damage(self.limits) <= 1]
        return min(kept, key=lambda point: point.bytes, default=None)

    def _measure(self, point: Point, measure: Callable[[Point], Measure]) -> Point:
        if point.chosen not in self.said:
            self.said[point.chosen] = self._kl(point)
            self.measured.append((point, measure(point)))
        return point

    def _predict(self, point: Point) -> float:
        """The damage, as a multiple of the limits, at the pessimistic end."""
        return predicted(point.sum, [(known.sum, found.damage(self.limits)) for known, found in self.measured])

    def _kl(self, point: Point) -> float:
        return predicted(point.sum, [(known.sum, found.kl[0]) for known, found in self.measured])

    def _error(self) -> float | None:
        """The mean of what the predictions were off."""
        tested = [(self.said[point.chosen], found.kl[0]) for point, found in self.measured]
        off = [abs(said - there) / there for said, there in tested if said is not None and there > 0]
        return sum(off) / len(off) if off else None

    def _told(self, number: int, point: Point) -> FitPoint:
        found = self.measured[number][1]
        return FitPoint(
            name=f"mix {number}" if number else ALL,
            bytes=point.bytes + self.rest,
            kept=_kept(self.groups, point),
            **{self.between: _between(self.groups, point)},
            predicted=self.said[point.chosen],
            kl_mean=found.kl[0],
            kl_mean_low=found.kl[1],
            kl_mean_high=found.kl[2],
            top1_agreement=found.agreement[0],
            perplexity_ratio=math.exp(found.loss[0]),
            holds=self._keeps(point, found),
        )

    def _keeps(self, point: Point, found: Measure) -> bool:
        most = self.limits.max_bytes
        return point.bytes + self.rest <= most if most is not None else found.damage(self.limits) <= 1

    def _predicted(self, point: Point) -> FitPoint:
        kept, between = _kept(self.groups, point), _between(self.groups, point)
        size = point.bytes + self.rest
        return FitPoint(name="", bytes=size, kept=kept, **{self.between: between}, predicted=self._kl(point))

    def _next(self, taken: Point) -> str:
        """Where one more megabyte would buy most."""
        behind = [point for point in self.points if point.bytes > taken.bytes and point.sum < taken.sum]
        best: tuple[float, str] = (0.0, "")
        scale = self._kl(taken) / taken.sum if taken.sum else 0.0
        for group, choice in zip(self.groups, taken.chosen, strict=True):
            for other in range(choice + 1, len(group.bits)):
                more, gain = group.bytes[other] - group.bytes[choice], group.kl[choice] - group.kl[other]
                if more > 0 and gain / more > best[0]:
                    bought = f"{1e6 * scale * gain / more:.2g} of KL a megabyte, {_mb(more)}"
                    best = (gain / more, f"{group.kind} of block {group.block} {group.called(other)}: {bought}")
        return best[1] if behind else ""


def _kept(groups: list[FitGroup], point: Point) -> int:
    return sum(choice == len(group.bits) - 1 for group, choice in zip(groups, point.chosen, strict=True))


def _between(groups: list[FitGroup], point: Point) -> int:
    chosen = zip(groups, point.chosen, strict=True)
    return sum(0 < choice < len(group.bits) - 1 for group, choice in chosen)


def _of(groups: list[FitGroup], point: Point) -> str:
    """The modules that a mix quantizes."""
    left = [group for group, choice in zip(groups, point.chosen, strict=True) if choice < len(group.bits) - 1]
    return " and ".join(group.modules[0] for group in left)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
