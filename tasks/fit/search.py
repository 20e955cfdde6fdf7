"""What happens in the process that fits: the sensitivities of all groups, and the search for the mix that keeps a limit."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import TameError
from configs.schema import Variant
from tasks.fit.allocate import Point
from tasks.fit.limits import Limits, Measure, check_no_experts, measure_of
from tasks.fit.table import Table
from tasks.fitted import FitGroup
from tasks.runtime.progress import Progress, silent
from tasks.runtime.quiet import quieten

if TYPE_CHECKING:
    import torch

    from tasks.fit.walk import Divergence, Group, Walk
    from tasks.fit.weights import Restorer

LENGTH = 512
"""Tokens in a window of the fit text."""
WINDOWS = 32
WHOLE = {"cpu": (WINDOWS, 256), "cuda": (WINDOWS, LENGTH)}
"""Windows on which a whole mix is measured, and tokens in each."""
ALONE = {"cpu": (4, 160), "cuda": (8, LENGTH)}
"""The same for each group alone, which takes a hundred passes through half of the model, and ranks the groups alone."""
SENSITIVITIES, FOUND = "sensitivities.json", "found.json"


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
    wider: tuple[tuple[Path, Variant], ...] = ()
    """Checkpoints of the same model with more bits, that a weight can have instead, and what they were made as."""


def sensitivities(asked: Asked, out: Path, progress: Progress = silent) -> None:
    """Measure every group quantized alone, and all of them together. Writes sensitivities.json into `out`.

    Raises:
        BadInputError: a model that is not run block by block. TameError: no memory, or numbers that are not finite.
    """
    walks = _Walks(asked)
    found = walks.alone(progress)
    groups = [walks.choices(group, float(one.kl.mean())) for group, one in found]
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


class _Walks:
    """Walks through a model, and what its quantized weights stand for."""

    def __init__(self, asked: Asked) -> None:
        from safetensors.torch import load_file

        quieten()
        from tasks.fit.weights import Restorer

        self.asked = asked
        self.device = "cuda:0" if asked.device == "cuda" else asked.device
        self.restorers = [
            Restorer(asked.source, folder, variant, asked.trust_remote_code)
            for folder, variant in ((asked.quantized, asked.variant), *asked.wider)
        ]
        """One for each choice but the original, least bits first."""
        if any(".experts." in name for name in self.restorers[0].jobs):
            check_no_experts(asked.variant, asked.source)
        self.ids: torch.Tensor = load_file(asked.ids)["ids"].long()
        self.whole: Walk | None = None

    def alone(self, progress: Progress) -> "list[tuple[Group, Divergence]]":
        """Each group quantized alone, on a few windows from all over the text."""
        walk = self._walk(ALONE, self.restorers[:1])
        found = self._within_memory(lambda: walk.alone(progress, f"sensitivity {self.asked.variant.label}"))
        return [(group, one) for group, _, one in found]

    def choices(self, group: "Group", kl: float) -> FitGroup:
        """A group's choices; `kl` is what it does alone with the least bits.

        With more bits it does so little that it would not be told from noise: KL goes with the square of the error.
        """
        restorers, plain = self.restorers, self.restorers[0]
        first, *others = [
            sum(one.squared_error(name) for name in group.weights) if restorers[1:] else 1.0 for one in restorers
        ]
        return FitGroup(
            block=group.block,
            modules=[name.removesuffix(".weight") for name in group.weights],
            bits=[*(one.method.bits(one.variant) for one in restorers), 16],
            bytes=[
                *(sum(one.stored[name] for name in group.weights) for one in restorers),
                sum(map(plain.plain_bytes, group.weights)),
            ],
            kl=[kl, *(max(kl, 0.0) * other / first if first else 0.0 for other in others), 0.0],
        )

    def measure(self, mix: dict[str, int], progress: Progress) -> Measure:
        """A mix on the whole text.

        Raises:
            TameError: it gives NaN or infinite numbers.
        """
        walk = self.whole = self.whole or self._walk(WHOLE, self.restorers)
        (found,) = self._within_memory(lambda: walk.measure([mix], progress, f"fit {self.asked.variant.label}"))
        if not bool(found.kl.isfinite().all()):
            raise TameError(
                f"{self.asked.source}: the fit text gives NaN or infinite logits; does the model itself work? Leave fit out, or "
                "fit on another text"
            )
        return measure_of(found)

    def _walk(self, text: dict[str, tuple[int, int]], restorers: "list[Restorer]") -> "Walk":
        """A walk on so many windows, from all over the text, and so many tokens of each, as the device has time for."""
        from tasks.fit.walk import Walk

        asked, (windows, length) = self.asked, text[self.device.partition(":")[0]]
        ids = self.ids[:: max(1, len(self.ids) // windows)][:windows, :length]
        levels = [functools.partial(one.weight, device=self.device) for one in restorers]
        return Walk(asked.source, ids, set(restorers[0].jobs), levels, self.device, asked.trust_remote_code)

    def _within_memory(self, run: "Callable[[], list[Any]]") -> list[Any]:
        import torch

        try:
            return run()
        except torch.OutOfMemoryError as error:
            raise TameError(
                f"{self.asked.source}: {self.device} is out of memory while fitting; free some, or use --device cpu"
            ) from error
