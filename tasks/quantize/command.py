"""`tame quantize SOURCE OUT`: a folder in, a folder out, no store."""

import errno
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from configs.errors import BadInputError, KilledError, TameError, line
from configs.schema import bytes_of
from tasks.download.checkpoint import check_source
from tasks.quantize.check import runs
from tasks.quantize.lean_imports import only_make_models
from tasks.quantize.methods import method_of, method_of_source
from tasks.quantize.protocols import Request, Written
from tasks.runtime.child_process import isolated, spawned
from tasks.runtime.device import pick_all
from tasks.runtime.progress import Progress, show
from tasks.store import on_disk
from tasks.store.digests import sha256_files
from tasks.values import Quantized

log = logging.getLogger("tame.quantize")


def quantize_folder(request: Request, *, check: bool = False, progress: Progress = show) -> Quantized:
    """Quantize the checkpoint in `request.source` into `request.out`, which must be absent or empty.

    It is built beside `out` and renamed when it is complete; what a killed run left there is taken up. With `check`, it must
    also give finite numbers for a few tokens, where it can be run. The device may be `auto`.

    Raises:
        BadInputError: `out` is in use, or the source cannot be quantized.
        TameError: a damaged or broken source, no space left, no memory left.
    """
    out = request.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInputError(f"{out}: exists and is not an empty folder; remove it or give another")
    device = pick_all(request.device)
    check_source(request.source)
    partial = out.parent / f".{out.name}.partial"
    started = time.monotonic()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{partial}.lock", timeout=0):
            request = replace(request, out=partial, device=device, source_method=method_of_source(request.source))
            written, files = _build(request, out, check, progress)
        Path(f"{partial}.lock").unlink(missing_ok=True)
    except Timeout:
        raise TameError(f"{out}: another process is writing it; wait for it, or give another folder") from None
    except OSError as error:
        raise TameError(_os_error(error, out)) from error
    size = sum((out / name).stat().st_size for name in files)
    seconds = time.monotonic() - started
    return written.quantized_in(str(out), files, size, on_disk.digest_of(files), seconds, cached=False)


def _build(request: Request, out: Path, check: bool, progress: Progress) -> tuple[Written, dict[str, str]]:
    """Fill the folder of the request, and rename it to `out` once it is complete and on the disk. Returns all sha256, too."""
    partial, variant = request.out, request.variant
    try:
        written = _written(f"quantize {variant.label}", request, check, progress)
        if check:
            _run_once(request)
        names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        for name in [*names, "."]:
            on_disk.fsync(partial / name)
        files = sha256_files(partial, [name for name in names if name not in written.digests]) | written.digests
        partial.rename(out)
        on_disk.fsync(out.parent)
        return written, files
    except KilledError:  # what is finished is taken up by the next run
        raise
    except (TameError, OSError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _written(what: str, request: Request, check: bool, progress: Progress) -> Written:
    """Quantize in a process that imports little, or in one that imports everything."""
    whole = method_of(request.variant).quantize
    if check:  # runs the model afterwards, in another that begins with the same imports
        return isolated(what, whole, request, progress=progress)
    if request.calibration is not None or request.trust_remote_code:  # which run more
        return spawned(what, whole, request, progress=progress)
    try:
        return spawned(what, _lean, request, progress=progress)
    except (TameError, OSError):
        raise
    except Exception as error:
        log.warning("%s: once more with all of transformers (%s)", what, line(error))
        return spawned(what, whole, request, progress=progress)


def _lean(request: Request, progress: Progress = show) -> Written:
    only_make_models()
    return method_of(request.variant).quantize(request, progress)


def _os_error(error: OSError, out: Path) -> str:
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(out.parent).free
        return f"{out}: no space left ({free / 1e9:.1f} GB free); make room, or give another folder"
    return f"{error.filename or out}: {error.strerror or error}; make it readable or writable"


def _run_once(request: Request) -> None:
    """Run the written checkpoint on a few tokens. If it cannot be run, that is logged and no fault of the checkpoint.

    Raises:
        TameError: the checkpoint gives NaN or infinite logits.
    """
    label = request.variant.label
    try:
        finite, why = isolated(f"check {label}", runs, request.out, request.device, request.trust_remote_code)
    except TameError as error:  # a kernel that crashes says nothing of the checkpoint
        finite, why = None, str(error)
    if finite is None:
        log.warning("%s was written, and not run: %s", label, why)
    elif not finite:
        raise TameError(
            f"{request.out}: {why} gives NaN or infinite numbers; try another method, and see whether the source itself does"
        )


def parse_size(text: str) -> int:
    """Bytes, from `500MB`, `5GB` or a plain number.

    Raises:
        BadInputError: not a size.
    """
    size = bytes_of(text)
    if size < 1:
        raise BadInputError(f"--max-shard-size {text!r} is not a size; write it as 500MB or 5GB")
    return size
