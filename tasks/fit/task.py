"""From a snapshot and a variant with a limit to the mix that keeps it: the plain function, and its keys."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configs.schema import Calibrate, Gate, Variant
from tasks.calibrate.sequences import Part, load_texts, make_sequences
from tasks.calibrate.task import calibration_inputs
from tasks.download.checkpoint import quantization_of
from tasks.download.text import max_positions
from tasks.fit.allocate import Point
from tasks.fit.limits import Limits, Measure, limits_of
from tasks.fit.search import ALONE, LENGTH, SENSITIVITIES, WHOLE, WINDOWS, Asked, measure, sensitivities
from tasks.fit.table import Table
from tasks.fitted import FitGroup, Fitted
from tasks.quantize.methods import described_by, method_of
from tasks.quantize.run import versions_for
from tasks.quantize.task import quantize
from tasks.runtime.child_process import isolated
from tasks.runtime.device import held, pick
from tasks.runtime.progress import Progress, show
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.values import Calibration, Quantized, Snapshot

VERSION = 5  # of this stage: raise it when the same inputs give other numbers, or another mix
SEARCH = 3  # of what is done with the sensitivities: raise it when the same ones give another mix
IDS, FOUND = "ids.safetensors", "found.json"
Codes = Callable[[list[str], list[str]], tuple[Quantized, Variant]]
"""From the modules in 16 bits, and those in 8, to the checkpoint that has the mix's codes, and what that was made as."""


def fit(
    snapshot: Snapshot,
    variant: Variant,
    gate: Gate,
    spec: Calibrate,
    calibration: Calibration | None = None,
    *,
    device: str = "auto",
    progress: Progress = show,
) -> Fitted:
    """The mix of modules in few and in more bits that keeps the variant's limit: from the store, or found now.

    All that can be quantized is quantized once, as the variant says, and once for each choice of more bits. What every group of
    modules does alone is measured on that, and kept: another limit measures none of it again. Codes that undo what others did are
    chosen again for each mix that is measured.

    Raises:
        BadInputError: no mix keeps the limit, or the model is not run block by block. TameError: as `quantize`.
    """
    limits = limits_of(variant, gate)
    whole = quantize(snapshot, variant.unfitted, calibration, device=device, progress=progress)
    size, wider = _with_more_bits(snapshot, variant.unfitted, calibration, whole, device, progress)
    windows, digest, text = fit_text(snapshot, spec, "fit" if variant.codes_part == "codes" else "all")
    asked = Asked(
        source=Path(snapshot.path),
        quantized=Path(whole.path),
        variant=variant.unfitted,
        ids=windows / IDS,
        device=pick(device),
        trust_remote_code=snapshot.trust_remote_code,
        wider=tuple((Path(one.path) if one else None, of) for one, of in wider),
    )
    checkpoints = [whole, *(one for one, _ in wider if one)]
    inputs = _inputs(snapshot, variant, checkpoints, digest, asked.device.partition(":")[0])

    def codes(modules: list[str], finer: list[str]) -> tuple[Quantized, Variant]:
        """The checkpoint that has a mix's codes, and what it was made as."""
        if not variant.compensates or not modules + finer:
            return whole, variant.unfitted
        mixed = variant.keeping(modules, finer, size)
        return quantize(snapshot, mixed, calibration, device=device, progress=progress), mixed

    known, seconds = _sensitivities(asked, inputs, progress)
    artifact, cached = _search(asked, inputs, known, limits, codes, progress)
    found = json.loads((Path(artifact.path) / FOUND).read_bytes())
    taken, _ = codes(found["modules"], found["in_8_bits"] + found["in_small_groups"])
    return Fitted(
        limit=str(limits),
        groups=[FitGroup(**group) for group in json.loads((known / SENSITIVITIES).read_bytes())["groups"]],
        text=text,
        group_size=size,
        codes=taken.path,
        codes_digest=taken.digest,
        seconds=artifact.meta["seconds"] + seconds,
        cached=cached,
        **found,
    )


def _inputs(
    snapshot: Snapshot, variant: Variant, checkpoints: list[Quantized], text: str, device: str
) -> dict[str, Any]:
    """Everything that decides the sensitivities, for the store's key. `checkpoints` have the least bits first."""
    whole, *wider = checkpoints
    return {
        "source": snapshot.digest,  # a dequantized model quantizes to the bytes of the original, losing nothing
        "quantized": whole.digest,
        **({"wider": [one.digest for one in wider]} if wider else {}),
        "text": text,
        "windows": [each[device] for each in (WHOLE, ALONE)],
        "device": device,
        "stage": VERSION,
        "versions": versions_for(method_of(variant)),
    }


def _search(
    asked: Asked, inputs: dict[str, Any], known: Path, limits: Limits, codes: Codes, progress: Progress
) -> tuple[on_disk.Artifact, bool]:
    """The artifact with the mix that keeps the limits, and whether it was there already."""

    def make(out: Path) -> on_disk.Made:
        started, table = time.monotonic(), Table.read(known / SENSITIVITIES, limits)

        def measured(point: Point) -> Measure:
            made, variant = codes(*table.modules(point))
            own, mix = replace(asked, quantized=Path(made.path), variant=variant), table.mix(point)
            if variant.small_group_modules:  # the checkpoint has them as they are in the mix
                mix = dict.fromkeys(mix, 0)
            with held():
                return isolated(f"fit {variant.label}", measure, own, mix, progress=progress)

        (out / FOUND).write_text(json.dumps(table.fit(measured), indent=1))
        return on_disk.Made(meta={"seconds": time.monotonic() - started})

    return store.build("fit", {**inputs, "limits": asdict(limits), "search": SEARCH}, make)


def _with_more_bits(
    snapshot: Snapshot,
    variant: Variant,
    calibration: Calibration | None,
    whole: Quantized,
    device: str,
    progress: Progress,
) -> tuple[int | None, list[tuple[Quantized | None, Variant]]]:
    """The group size that it was decided to have with all quantized; and checkpoints of the choices with more bits.

    There is none of a choice whose codes undo what others did: they are chosen for each mix.
    """
    described = described_by(quantization_of(Path(whole.path)))
    size = variant.group_size or (described[1].group_size if described else None)
    choices = method_of(variant).choices(variant.model_copy(update={"group_size": size}))

    def made(one: Variant) -> Quantized | None:
        if one.compensates:
            return None
        return quantize(snapshot, one, calibration if one.calibrate else None, device=device, progress=progress)

    return size, [(made(one), one) for one in choices[1:]]


def fit_text(snapshot: Snapshot, spec: Calibrate, part: Part) -> tuple[Path, str, str]:
    """The folder with the fit text's windows, the digest of what they were made from, and a sentence on them.

    They are of a part of the calibration text. Codes do better on the text that they were chosen on than on other text of its
    kind, and on the pages around it; so calibrated mixes are measured on a part that is kept for that.
    """
    folder = Path(snapshot.path)
    texts = load_texts(spec)
    length = min(LENGTH, spec.length, max_positions(folder) or LENGTH)
    windows = Calibrate(text=spec.text, sequences=-(-WINDOWS // len(texts)), length=length)
    inputs = calibration_inputs(snapshot, windows, [text.digest for text in texts], part) | {"fit": VERSION}

    def make(out: Path) -> on_disk.Made:
        isolated("fit", make_sequences, texts, windows, folder, snapshot.trust_remote_code, out, part)
        return on_disk.Made()

    artifact, _ = store.build("fit-text", inputs, make, shared=False)
    names = " and ".join(f"{text.name} (sha256 {text.digest[:12]}…)" for text in texts)
    kept = "a quarter, on which no code is chosen, of " if part == "fit" else ""
    return Path(artifact.path), artifact.digest, f"{kept}the calibration text {names}"


def _sensitivities(asked: Asked, inputs: dict[str, Any], progress: Progress) -> tuple[Path, float]:
    """The folder of what every group does alone, from the store or measured now; and the seconds that it took."""

    def make(out: Path) -> on_disk.Made:
        started = time.monotonic()
        with held():
            isolated(f"fit {asked.variant.label}", sensitivities, asked, out, progress=progress)
        return on_disk.Made(meta={"seconds": time.monotonic() - started})

    artifact, _ = store.build("sensitivity", inputs, make)
    return Path(artifact.path), artifact.meta["seconds"]
