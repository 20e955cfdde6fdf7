"""`tame quantize --fit`: the request of a variant with a limit becomes that of the mix which keeps it."""

from dataclasses import replace
from pathlib import Path

from configs.schema import Calibrate, Gate
from tasks.fit.task import fit
from tasks.quantize.protocols import Request
from tasks.runtime.progress import Progress, say, show
from tasks.values import Snapshot


def fitted(request: Request, snapshot: Snapshot, spec: Calibrate, progress: Progress = show) -> Request:
    """The request for the mix that keeps the limit of the request's variant. What is measured for it is kept in the store.

    Raises:
        BadInputError, TameError: as `fit`.
    """
    found = fit(snapshot, request.variant, Gate(), spec, request.calibration, device=request.device, progress=progress)
    say(f"{request.variant.label}: {found.sentence}")
    codes = Path(found.codes) if request.variant.calibrate else None
    return replace(request, variant=found.mix(request.variant), codes=codes)
