"""`tame quantize SOURCE OUT`: a folder in, a folder out, no store."""

import errno
import logging
import re
import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout

from configs.errors import BadInputError, KilledError, TameError
from configs.schema import Variant
from tasks.download.checkpoint import check_source
from tasks.quantize.check import runs
from tasks.quantize.methods import method_of
from tasks.quantize.protocols import Request
from tasks.quantize.task import summarize
from tasks.runtime.child_process import isolated
from tasks.runtime.device import pick
from tasks.runtime.progress import Progress, show
from tasks.store import artifacts as store
from tasks.store.digests import sha256_files
from tasks.values import Quantized

log = logging.getLogger("tame.quantize")

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def quantize_folder(
    source: Path,
    out: Path,
    variant: Variant,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
    forward: bool = True,
    progress: Progress = show,
) -> Quantized:
    """Quantize the checkpoint in `source` into `out`, which must be absent or empty.

    It is built beside `out` and renamed when it is complete; what a killed run left there is taken up. With `forward`, it
    must also give finite numbers for a few tokens, where it can be run.

    Raises:
        BadInputError: `out` is in use, or `source` cannot be quantized.
        TameError: a damaged or broken source, no space left, no memory left.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInputError(f"{out}: exists and is not an empty folder; remove it or give another")
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    chosen = pick(device) if device != "cuda" else pick(device).partition(":")[0]  # cuda: all GPUs
    check_source(source)
    partial = out.parent / f".{out.name}.partial"
    started = time.monotonic()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{partial}.lock", timeout=0):
            try:
                request = Request(
                    source=source,
                    out=partial,
                    variant=variant,
                    device=chosen,
                    workers=workers,
                    max_shard_size=limit,
                    trust_remote_code=trust_remote_code,
                )
                quantize = method_of(variant).quantize
                written = isolated(f"quantize {variant.label}", quantize, request, progress=progress)
                if forward:
                    _forward(partial, chosen, variant, trust_remote_code)
                names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
                for name in [*names, "."]:
                    store.fsync(partial / name)
                files = sha256_files(partial, [name for name in names if name not in written.digests])
                files |= written.digests
                partial.rename(out)
                store.fsync(out.parent)
            except KilledError:  # what is finished is taken up by the next run
                raise
            except (TameError, OSError):
                shutil.rmtree(partial, ignore_errors=True)
                raise
        Path(f"{partial}.lock").unlink(missing_ok=True)
    except Timeout:
        raise TameError(f"{out}: another process is writing it; wait for it, or give another folder") from None
    except OSError as error:
        raise TameError(_os_error(error, out)) from error
    return summarize(
        str(out),
        files,
        sum((out / name).stat().st_size for name in files),
        store.digest_of(files),
        written,
        time.monotonic() - started,
        cached=False,
    )


def _os_error(error: OSError, out: Path) -> str:
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(out.parent).free
        return f"{out}: no space left ({free / 1e9:.1f} GB free); make room, or give another folder"
    return f"{error.filename or out}: {error.strerror or error}; make it readable or writable"


def _forward(folder: Path, device: str, variant: Variant, trust_remote_code: bool) -> None:
    try:
        finite, why = isolated(f"check {variant.label}", runs, folder, device, trust_remote_code)
    except TameError as error:  # a kernel that crashes says nothing of the checkpoint
        finite, why = None, str(error)
    if finite is None:
        log.warning("%s was not run: %s", variant.label, why)
    elif not finite:
        raise TameError(
            f"{folder}: {why} gives NaN or infinite numbers; try another method, and see whether the source itself does"
        )


def parse_size(text: str) -> int:
    """Bytes, from `500MB`, `5GB` or a plain number.

    Raises:
        BadInputError: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", text.strip().upper())
    if not found or float(found[1]) <= 0:
        raise BadInputError(f"--max-shard-size {text!r} is not a size; write it as 500MB or 5GB")
    return int(float(found[1]) * UNITS[found[2]])
