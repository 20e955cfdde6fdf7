"""For a calibrated variant: quantizing tells tasks/calibrate which weights to choose codes for, in which format, on which text."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import BadInputError, TameError
from configs.schema import Variant
from tasks.download.checkpoint import quantization_of, written_tensors
from tasks.quantize.protocols import CodedFormat, Request, TensorFormat
from tasks.runtime.progress import Progress

if TYPE_CHECKING:
    import torch

    from tasks.calibrate.grid import Grid
    from tasks.quantize.layout import Job, Layout

FOLDER = ".calibrated"
"""Where finished blocks lie, in the folder that is being filled, until all is written."""


def calibrated(
    request: Request,
    tensor_format: TensorFormat,
    jobs: "list[Job]",
    config: dict[str, Any],
    identity: Any,
    progress: Progress,
) -> "tuple[list[Job], list[str]]":
    """The jobs, those that quantize, and are not taken, with the codes that were chosen for them; and what to say of it.

    `config` is the checkpoint's config.json.

    Raises:
        BadInputError: a model or a format that cannot be calibrated.
        TameError: as `choose`; no memory on the GPU.
    """
    import torch
    from safetensors.torch import load_file

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
    asked = Asked(
        source=request.source,
        ids=load_file(Path(calibration.path) / "ids.safetensors")["ids"].long(),
        grids=_grids(tensor_format, variant, jobs, getattr(torch, config["dtype"])),
        level="true" if isinstance(variant.calibrate, bool) else variant.calibrate,
        device="cuda:0" if request.device == "cuda" else request.device,
        work=request.out / FOLDER,
        identity=identity,
        trust_remote_code=request.trust_remote_code,
    )
    try:
        chosen = choose(asked, variant.label, progress)
    except torch.OutOfMemoryError as error:
        raise TameError(
            f"{request.source}: {asked.device} is out of memory while calibrating; free some, use shorter sequences, or use "
            "--device cpu"
        ) from error
    jobs = [replace(job, chosen=chosen.where.get(job.weight)) for job in jobs]
    return jobs, [*calibration.notes, *chosen.notes]


def _grids(coded: CodedFormat, variant: Variant, jobs: "list[Job]", dtype: "torch.dtype") -> "dict[str, Grid]":
    """The weights whose codes are to be chosen, as the model calls them, with the levels and groups of each."""
    from tasks.calibrate.grid import Grid

    @functools.cache
    def grid(size: int) -> Grid:
        return Grid(
            coded.levels(variant),
            size,
            as_stored=lambda scales: coded.scales_as_read(scales, variant, dtype),
            signed=coded.signed_scales(variant),
        )

    own = {job.weight: job.variant or variant for job in jobs if job.quantized and not job.taken}
    return {name: grid(coded.block_size(each)) for name, each in own.items() if each.calibrate}


def taking(folder: Path, layout: "Layout") -> "list[Job]":
    """The layout's jobs, those that quantize as the checkpoint in `folder` does with the place of their codes and scales in it.

    Raises:
        TameError: the checkpoint lacks some.
    """
    written = {name: (folder / found.file, found) for name, found in written_tensors(folder).items()}

    def alike(name: str) -> bool:
        if name not in written:
            return False
        return name in layout.growing or written[name][1].shape == tuple(layout.outputs[name].shape)

    jobs = []
    for job in layout.jobs:
        if not job.quantized or not all(map(alike, job.outputs)):
            if job.quantized and job.variant is None:
                raise TameError(
                    f"{folder}: {job.output} is not there as it should be; remove the folder, and run again"
                )
            jobs.append(job)
            continue
        jobs.append(replace(job, taken={name: written[name] for name in job.outputs}))
    return jobs
