"""What happens in the process that fits: the sensitivities of all groups, and the search for the mix that keeps a limit."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import BadInputError, TameError
from configs.schema import Variant
from tasks.fit.allocate import Point, best_within, frontier, predicted, smallest_keeping
from tasks.fit.limits import Limits, Measure, measure_of
from tasks.runtime.progress import Progress, silent
from tasks.runtime.quiet import quieten
from tasks.values import FitGroup, FitPoint

if TYPE_CHECKING:
    import torch

    from tasks.fit.walk import Divergence, Group, Walk

LENGTH = 512
"""Tokens in a window of the fit text."""
WINDOWS = 32
WHOLE = {"cpu": (16, 256), "cuda": (WINDOWS, LENGTH)}
"""Windows on which a whole mix is measured, and tokens in each."""
ALONE = {"cpu": (4, 160), "cuda": (8, LENGTH)}
"""The same for each group alone, which takes a hundred passes through half of the model, and ranks the groups alone."""
TRIES = 5
"""Mixes that are measured at most."""
CLOSE = 0.002
"""A mix is taken when no other that may keep the limit is smaller by more than this share of its bytes."""
ALL, SENSITIVITIES, FOUND = "all quantized", "sensitivities.json", "found.json"


@dataclass(frozen=True)
class Asked:
    """A model, a checkpoint in which all that can be quantized is, and the text on which they are compared."""

    source: Path
    quantized: Path
    variant: Variant
    """What the checkpoint was made as."""
    ids: Path
    """The file with the windows of the fit text, Int32 [windows, tokens]."""
    device: str
    trust_remote_code: bool = False


def sensitivities(asked: Asked, out: Path, progress: Progress = silent) -> None:
    """Measure every group quantized alone, and all of them together. Writes sensitivities.json into `out`.

    Raises:
        BadInputError: a model that is not run block by block. TameError: no memory, or numbers that are not finite.
    """
    walks = _Walks(asked)
    restorer, found = walks.restorer, walks.alone(progress)
    groups = [
        FitGroup(
            block=group.block,
            modules=[name.removesuffix(".weight") for name in group.weights],
            bits=[restorer.method.bits(asked.variant), 16],
            bytes=[sum(restorer.stored[n] for n in group.weights), sum(map(restorer.plain_bytes, group.weights))],
            kl=[float(one.kl.mean()), 0.0],
        )
        for group, one in found
    ]
    whole = walks.measure({name: 0 for group, _ in found for name in group.weights}, progress)
    content = {
        "groups": [group.model_dump() for group in groups],
        "whole": asdict(whole),
        "bytes": sum(file.stat().st_size for file in asked.quantized.glob("*.safetensors")),
    }
    (out / SENSITIVITIES).write_text(json.dumps(content, indent=1))


def search(asked: Asked, known: Path, limits: Limits, out: Path, progress: Progress = silent) -> None:
    """Find the mix that keeps `limits`, by measuring at most TRIES of them. Writes found.json into `out`.

    Args:
        asked: What is compared.
        known: The folder of `sensitivities`.
        limits: What the mix must keep.
        out: Where the result goes: taken, measured, curve, error, next and modules, as `Fitted` has them.
        progress: Told what is done.

    Raises:
        BadInputError: no mix keeps the limits; it says what is the best that is possible, and what that costs.
        TameError: as `sensitivities`.
    """
    content = json.loads((known / SENSITIVITIES).read_bytes())
    groups = [FitGroup(**group) for group in content["groups"]]
    whole = Measure(**{name: tuple(value) for name, value in content["whole"].items()})
    table = Table(groups, content["bytes"], whole, limits)
    walks = _Walks(asked)

    def measured(point: Point) -> Measure:
        mix = {
            f"{name}.weight": choice
            for group, choice in zip(groups, point.chosen, strict=True)
            if choice < len(group.bits) - 1
            for name in group.modules
        }
        return walks.measure(mix, progress)

    (out / FOUND).write_text(json.dumps(table.fit(measured), indent=1))


class Table:
    """Everything that is known of the mixes of a model: predictions, and what was measured."""

    def __init__(self, groups: list[FitGroup], size: int, whole: Measure, limits: Limits) -> None:
        self.groups, self.limits = groups, limits
        self.choices = [list(zip(group.bytes, group.kl, strict=True)) for group in groups]
        self.points = frontier(self.choices)
        self.rest = size - sum(group.bytes[0] for group in groups)
        """Bytes of all that is in no group, and of the headers where all is quantized: no mix has more of these."""
        everything = Point((0,) * len(groups), size - self.rest, sum(group.kl[0] for group in groups))
        self.measured = [(everything, whole)]
        self.said: dict[tuple[int, ...], float | None] = {everything.chosen: None}
        self.original = Point(tuple(len(group.bits) - 1 for group in groups), sum(g.bytes[-1] for g in groups), 0.0)

    def fit(self, measure: Callable[[Point], Measure]) -> dict[str, Any]:
        """The mix that keeps the limits, as `Fitted` has it, measured by `measure`."""
        taken = self._within_bytes(measure) if self.limits.max_bytes is not None else self._within_damage(measure)
        names = [
            name
            for group, choice in zip(self.groups, taken.chosen, strict=True)
            if choice == len(group.bits) - 1
            for name in group.modules
        ]
        told = {point.chosen: self._told(number, point) for number, (point, _) in enumerate(self.measured)}
        return {
            "modules": names,
            "taken": told[taken.chosen].model_dump(),
            "measured": [point.model_dump() for point in told.values()],
            "curve": [self._predicted(point).model_dump() for point in self.points],
            "error": self._error(),
            "next": self._next(taken),
        }

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
            point = smallest_keeping(self.points, wanted, knots)
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
        kept = _kept(self.groups, point)
        return FitPoint(name="", bytes=point.bytes + self.rest, kept=kept, predicted=self._kl(point))

    def _next(self, taken: Point) -> str:
        """Where one more megabyte would buy most."""
        behind = [point for point in self.points if point.bytes > taken.bytes and point.sum < taken.sum]
        best: tuple[float, str] = (0.0, "")
        for group, choice in zip(self.groups, taken.chosen, strict=True):
            if choice == len(group.bits) - 1:
                continue
            more, gain = group.bytes[-1] - group.bytes[choice], group.kl[choice] - group.kl[-1]
            if more > 0 and gain / more > best[0]:
                scale = self._kl(taken) / taken.sum if taken.sum else 0.0
                bought = f"{1e6 * scale * gain / more:.2g} of KL a megabyte"
                best = (
                    gain / more,
                    f"{group.kind} of block {group.block} in {group.bits[-1]} bits: {bought}, {_mb(more)}",
                )
        return best[1] if behind else ""


class _Walks:
    """Walks through a model, and what its quantized weights stand for."""

    def __init__(self, asked: Asked) -> None:
        from safetensors.torch import load_file

        quieten()
        from tasks.fit.weights import Restorer

        self.asked = asked
        self.device = "cuda:0" if asked.device == "cuda" else asked.device
        self.restorer = Restorer(asked.source, asked.quantized, asked.variant, asked.trust_remote_code)
        self.ids: torch.Tensor = load_file(asked.ids)["ids"].long()
        self.whole: Walk | None = None

    def alone(self, progress: Progress) -> "list[tuple[Group, Divergence]]":
        """Each group quantized alone, on a few windows from all over the text."""
        walk = self._walk(ALONE)
        found = self._within_memory(lambda: walk.alone(progress, f"sensitivity {self.asked.variant.label}"))
        return [(group, one) for group, _, one in found]

    def measure(self, mix: dict[str, int], progress: Progress) -> Measure:
        """A mix on the whole text.

        Raises:
            TameError: it gives NaN or infinite numbers.
        """
        walk = self.whole = self.whole or self._walk(WHOLE)
        (found,) = self._within_memory(lambda: walk.measure([mix], progress, f"fit {self.asked.variant.label}"))
        if not bool(found.kl.isfinite().all()):
            raise TameError(
                f"{self.asked.source}: the fit text gives NaN or infinite logits; does the model itself work? Leave fit out, or "
                "fit on another text"
            )
        return measure_of(found)

    def _walk(self, text: dict[str, tuple[int, int]]) -> "Walk":
        """A walk on so many windows, from all over the text, and so many tokens of each, as the device has time for."""
        from tasks.fit.walk import Walk

        asked, (windows, length) = self.asked, text[self.device.partition(":")[0]]
        ids = self.ids[:: max(1, len(self.ids) // windows)][:windows, :length]
        level = [lambda name: self.restorer.weight(name, self.device)]
        return Walk(asked.source, ids, set(self.restorer.jobs), level, self.device, asked.trust_remote_code)

    def _within_memory(self, run: "Callable[[], list[Any]]") -> list[Any]:
        import torch

        try:
            return run()
        except torch.OutOfMemoryError as error:
            raise TameError(
                f"{self.asked.source}: {self.device} is out of memory while fitting; free some, or use --device cpu"
            ) from error


def _kept(groups: list[FitGroup], point: Point) -> int:
    return sum(choice == len(group.bits) - 1 for group, choice in zip(groups, point.chosen, strict=True))


def _of(groups: list[FitGroup], point: Point) -> str:
    """The modules that a mix quantizes."""
    left = [group for group, choice in zip(groups, point.chosen, strict=True) if choice < len(group.bits) - 1]
    return " and ".join(group.modules[0] for group in left)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
