"""From a snapshot and a variant to a quantized checkpoint in the artifact store."""

import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import Completed, State

from configs.schema import Variant
from tasks.download.checkpoint import check_source
from tasks.quantize.run import work
from tasks.runtime.child_process import isolated
from tasks.runtime.device import held, pick
from tasks.runtime.progress import Progress, show
from tasks.store import artifacts as store
from tasks.values import Quantized, Snapshot

log = logging.getLogger("tame.quantize")

VERSION = 3  # of this stage: raise it when the same inputs give other bytes
LIBRARIES = ("torch", "transformers", "bitsandbytes", "safetensors")


def quantize_inputs(snapshot: Snapshot, variant: Variant, device: str) -> dict[str, Any]:
    """Everything that decides the quantized bytes, for the store's key. CPU and CUDA need not round alike."""
    return {
        "snapshot": snapshot.digest,
        "variant": variant.model_dump(mode="json", exclude={"name"}),
        "trust_remote_code": snapshot.trust_remote_code,
        "device": device.partition(":")[0],
        "stage": VERSION,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def quantize(
    snapshot: Snapshot,
    variant: Variant,
    *,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress = show,
) -> Quantized:
    """The quantized checkpoint of `snapshot`: from the store, or made now; a killed run is taken up where it was.

    Raises:
        BadInputError: the source cannot be quantized, or is quantized already.
        TameError: a damaged or broken source, no space left, no memory left.
    """
    chosen = pick(device) if device != "cuda" else pick(device).partition(":")[0]  # cuda: all GPUs

    def make(folder: Path) -> store.Made:
        source = Path(snapshot.path)
        check_source(source)
        with held():
            started = time.monotonic()
            made = isolated(
                f"quantize {variant.label}",
                work,
                source,
                folder,
                variant,
                device=chosen,
                workers=workers,
                names=list(snapshot.files),
                trust_remote_code=snapshot.trust_remote_code,
                progress=progress,
            )
            seconds = time.monotonic() - started
        digests = made.pop("digests")
        return store.Made(meta={**made, "seconds": seconds}, digests=digests)

    inputs = quantize_inputs(snapshot, variant, chosen)
    artifact, cached = store.build("quantized", inputs, make, keep_partial=True)
    quantized = summarize(artifact.path, artifact.files, artifact.bytes, artifact.digest, artifact.meta, cached)
    for note in [] if cached else quantized.notes:
        log.warning("%s: %s", variant.label, note)
    return quantized


def summarize(
    path: str, files: dict[str, str], size: int, digest: str, made: dict[str, Any], cached: bool
) -> Quantized:
    """A `Quantized` from what `work` returned, with the `seconds` it took."""
    return Quantized(
        path=path,
        digest=digest,
        bytes=size,
        files=files,
        parameters=made["parameters"],
        bits_per_weight=8 * made["weight_bytes"] / made["parameters"],
        quantized_share=made["quantized"] / made["parameters"],
        left=made["left"],
        notes=made["notes"],
        seconds=made["seconds"],
        cached=cached,
    )


@task(name="quantize", task_run_name="quantize {variant.label}")
def quantize_task(snapshot: Snapshot, variant: Variant) -> State[Quantized]:
    """`quantize` in the flow."""
    quantized = quantize(snapshot, variant)
    return Completed(name="Cached" if quantized.cached else "Completed", data=quantized)
