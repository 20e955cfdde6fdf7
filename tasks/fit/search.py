"""What happens in the processes that fit: the sensitivities of all groups are measured, and mixes as a whole."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import TameError
from configs.schema import Variant
from tasks.fit.limits import Measure, check_no_experts, measure_of
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
SMALLER = 0.8
"""KL of calibrated codes with 32 weights to a scale, of that with 64: 0.77 to 0.82 (benchmarks/RESULTS.md)."""
SENSITIVITIES = "sensitivities.json"


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
    wider: tuple[tuple[Path | None, Variant], ...] = ()
    """Checkpoints of the same model with more bits, that a weight can have instead, and what they were made as; None where there
    is none, as codes are chosen for each mix."""


def sensitivities(asked: Asked, out: Path, progress: Progress = silent) -> None:
    """Measure what quantizing each group does, and all of them together. Writes sensitivities.json into `out`.

    Raises:
        BadInputError: a model that is not run block by block. TameError: no memory, or numbers that are not finite.
    """
    walks = _Walks(asked)
    found = walks.each_alone(progress)
    groups = [walks.choices(group, kl) for group, kl in found]
    whole = walks.measure({name: 0 for group, _ in found for name in group.weights}, progress)
    content = {
        "groups": [group.model_dump() for group in groups],
        "whole": asdict(whole),
        "bytes": sum(file.stat().st_size for file in asked.quantized.glob("*.safetensors")),
    }
    (out / SENSITIVITIES).write_text(json.dumps(content, indent=1))


def measure(asked: Asked, mix: dict[str, int], progress: Progress = silent) -> Measure:
    """Measure a mix on the whole text: the weights that are quantized, by the model's names, and which of their choices it is.

    Raises:
        TameError: as `sensitivities`.
    """
    return _Walks(asked).measure(mix, progress)


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

    def each_alone(self, progress: Progress) -> "list[tuple[Group, float]]":
        """The damage of each group, on a few windows from all over the text: the KL divergence where it alone is quantized.

        Where the codes of a variant undo the errors of modules before them, that says little of a group among the others. For
        such a variant the damage is the mean of two numbers: that divergence, and how much smaller the divergence of everything
        quantized becomes when this group keeps its original weights.
        """
        walk, what = self._walk(ALONE, self.restorers[:1]), f"sensitivity {self.asked.variant.label}"
        found = self._within_memory(lambda: walk.each_alone(progress, what))
        self._check(*(one for _, _, one in found))
        alone = [(group, float(one.kl.mean())) for group, _, one in found]
        if not self.asked.variant.compensates:
            return alone
        (_, _, whole), *others = self._within_memory(lambda: walk.without(progress, what))
        self._check(whole, *(one for _, _, one in others))
        more = {group.weights: float((whole.kl - one.kl).mean()) for group, _, one in others}
        return [(group, max((kl + more[group.weights]) / 2, 0.0)) for group, kl in alone]

    def choices(self, group: "Group", kl: float) -> FitGroup:
        """A group's choices; `kl` is what it does alone with the least bits.

        With more bits it does so little that it would not be told from noise: KL goes with the square of the error.
        """
        restorers, plain = self.restorers, self.restorers[0]
        shares = [self._share(group, one) for one in restorers[1:]]
        return FitGroup(
            block=group.block,
            modules=[name.removesuffix(".weight") for name in group.weights],
            bits=[*(one.method.bits(one.variant) for one in restorers), 16],
            bytes=[
                *(sum(one.stored[name] for name in group.weights) for one in restorers),
                sum(map(plain.plain_bytes, group.weights)),
            ],
            kl=[kl, *(max(kl, 0.0) * share for share in shares), 0.0],
        )

    def _share(self, group: "Group", other: "Restorer") -> float:
        """How large a group's squared error is with more bits, relative to that with the least."""
        if other.folder is None:
            return SMALLER
        first, second = [sum(one.squared_error(name) for name in group.weights) for one in (self.restorers[0], other)]
        return second / first if first else 0.0

    def measure(self, mix: dict[str, int], progress: Progress) -> Measure:
        """A mix on the whole text.

        Raises:
            TameError: it gives NaN or infinite numbers.
        """
        walk = self.whole = self.whole or self._walk(WHOLE, self.restorers)
        (found,) = self._within_memory(lambda: walk.measure([mix], progress, f"fit {self.asked.variant.label}"))
        self._check(found)
        return measure_of(found)

    def _check(self, *found: "Divergence") -> None:
        if not all(bool(one.kl.isfinite().all()) for one in found):
            raise TameError(
                f"{self.asked.source}: the fit text gives NaN or infinite logits; does the model itself work? Leave fit out, or "
                "fit on another text"
            )

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
