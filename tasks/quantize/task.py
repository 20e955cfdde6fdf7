"""Turns a snapshot and a variant into a quantized checkpoint in the artifact store."""

import logging
import time
from pathlib import Path
from typing import Any

from configs.schema import Variant
from tasks.fitted import Fitted
from tasks.quantize.methods import method_of, method_of_source
from tasks.quantize.protocols import Request, Written
from tasks.quantize.run import versions_for
from tasks.runtime.child_process import isolated
from tasks.runtime.device import held, pick_all
from tasks.runtime.progress import Progress, show
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.values import Calibration, Quantized, Snapshot

log = logging.getLogger("tame.quantize")

VERSION = 5  # of this stage: raise it when the same inputs give other bytes

CALIBRATE = 3  # of tasks/calibrate: raise it when the same sequences give other codes


def quantize_inputs(
    snapshot: Snapshot,
    variant: Variant,
    device: str,
    calibration: Calibration | None = None,
    fitted: Fitted | None = None,
) -> dict[str, Any]:
    """Everything that decides the quantized bytes, for the store's key. CPU and CUDA need not round alike."""
    chosen = {"calibration": calibration.digest, "calibrate": CALIBRATE} if variant.calibrate and calibration else {}
    taken = {"codes": fitted.codes_digest} if variant.calibrate and fitted else {}
    variant = fitted.mix(variant) if fitted else variant
    return {
        **chosen,
        **taken,
        "snapshot": snapshot.digest,
        "variant": variant.identity,
        "trust_remote_code": snapshot.trust_remote_code,
        "device": device.partition(":")[0],
        "stage": VERSION,
        "versions": versions_for(method_of(variant)),
    }


def quantize(
    snapshot: Snapshot,
    variant: Variant,
    calibration: Calibration | None = None,
    fitted: Fitted | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress = show,
) -> Quantized:
    """The quantized checkpoint of `snapshot`: from the store, or made now; a killed run is taken up where it was.

    With `fitted`, it is the mix that keeps the variant's limit; calibrated codes are those of the checkpoint that was measured.

    Raises:
        BadInputError: the source cannot be quantized, or is quantized already.
        TameError: a damaged or broken source, no space left, no memory left.
    """
    chosen = pick_all(device)
    inputs = quantize_inputs(snapshot, variant, chosen, calibration, fitted)
    codes = fitted if variant.calibrate else None
    variant = fitted.mix(variant) if fitted else variant

    def make(folder: Path) -> on_disk.Made:
        source = Path(snapshot.path)
        request = Request(
            source=source,
            out=folder,
            variant=variant,
            device=chosen,
            workers=workers,
            names=list(snapshot.files),
            trust_remote_code=snapshot.trust_remote_code,
            source_method=method_of_source(source),
            calibration=calibration if variant.calibrate else None,
            codes=Path(codes.codes) if codes else None,
        )
        with held():
            started = time.monotonic()
            written = isolated(f"quantize {variant.label}", method_of(variant).quantize, request, progress=progress)
            seconds = time.monotonic() - started
        meta = written.model_dump(mode="json", exclude={"digests"})
        return on_disk.Made(meta={**meta, "seconds": seconds}, digests=written.digests)

    artifact, cached = store.build("quantized", inputs, make, keep_partial=True)
    written, seconds = Written(digests={}, **artifact.meta), artifact.meta["seconds"]
    quantized = written.quantized_in(artifact.path, artifact.files, artifact.bytes, artifact.digest, seconds, cached)
    quantized = quantized.model_copy(update={"calibration": calibration if variant.calibrate else None})
    for note in [] if cached else quantized.notes:
        log.warning("%s: %s", variant.label, note)
    return quantized
