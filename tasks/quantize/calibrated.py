"""A variant that is calibrated: which weights, in which format, on which sequences, is what quantizing tells tasks/calibrate."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import BadInputError, TameError
from tasks.download.checkpoint import quantization_of, written_tensors
from tasks.quantize.protocols import CodedFormat, Request, TensorFormat
from tasks.runtime.progress import Progress

if TYPE_CHECKING:
    from tasks.quantize.layout import Job, Layout

FOLDER = ".calibrated"
"""Where finished blocks lie, in the folder that is being filled, until all is written."""


def calibrated(
    request: Request, tensor_format: TensorFormat, layout: "Layout", identity: Any, progress: Progress
) -> "tuple[list[Job], list[str]]":
    """The layout's jobs, those that quantize with the codes that were chosen for them; and what to say of it.

    Raises:
        BadInputError: a model or a format that cannot be calibrated.
        TameError: as `choose`; no memory on the GPU.
    """
    import torch
    from safetensors.torch import load_file

    from tasks.calibrate.grid import Grid
    from tasks.calibrate.run import Asked, choose

    variant, calibration = request.variant, request.calibration
    if not isinstance(tensor_format, CodedFormat) or calibration is None:
        raise BadInputError(
            f"{variant.label}: it cannot be calibrated, or there is no text for it; leave calibrate out"
        )
    if quantization_of(request.source):
        raise BadInputError(
            f"{request.source}: it is quantized, and tame calibrates on sources in 16 or 32 bits alone; leave calibrate out"
        )
    coded: CodedFormat = tensor_format
    dtype = getattr(torch, layout.config["dtype"])
    grid = Grid(
        coded.levels(variant),
        coded.block_size(variant),
        as_stored=lambda scales: coded.scales_as_read(scales, variant, dtype),
        signed=coded.signed_scales(variant),
    )
    asked = Asked(
        source=request.source,
        ids=load_file(Path(calibration.path) / "ids.safetensors")["ids"].long(),
        weights=[job.weight for job in layout.jobs if job.quantized and job.variant is None],
        level="true" if isinstance(variant.calibrate, bool) else variant.calibrate,
        device="cuda:0" if request.device == "cuda" else request.device,
        work=request.out / FOLDER,
        identity=identity,
        trust_remote_code=request.trust_remote_code,
    )
    try:
        chosen = choose(asked, grid, variant.label, progress)
    except torch.OutOfMemoryError as error:
        raise TameError(
            f"{request.source}: {asked.device} is out of memory while calibrating; free some, use shorter sequences, or use "
            "--device cpu"
        ) from error
    jobs = [replace(job, chosen=chosen.where.get(job.weight)) for job in layout.jobs]
    return jobs, [*calibration.notes, *chosen.notes]


def taking(folder: Path, jobs: "list[Job]") -> "list[Job]":
    """The jobs, those that quantize as the checkpoint in `folder` does with the place of their codes and scales in it.

    Raises:
        TameError: the checkpoint lacks some.
    """
    written = {name: (folder / found.file, found) for name, found in written_tensors(folder).items()}
    alike = {job.key for job in jobs if job.quantized and job.variant is None}
    lost = [name for job in jobs if job.key in alike for name in job.outputs if name not in written]
    if lost:
        raise TameError(f"{folder}: {lost[0]} is not there; remove the folder, and run again")
    return [replace(job, taken={n: written[n] for n in job.outputs}) if job.key in alike else job for job in jobs]
