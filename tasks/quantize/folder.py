"""`tame quantize SOURCE OUT`: a folder in, a folder out, no store."""

import errno
import fcntl
import os
import re
import shutil
import time
from pathlib import Path

from configs.errors import BadInputError, TameError
from configs.schema import Variant
from tasks import store
from tasks.device import pick
from tasks.isolate import isolated
from tasks.progress import Progress, show
from tasks.quantize.source import check_source
from tasks.quantize.stage import Quantized, summarize
from tasks.quantize.work import work

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def quantize_folder(
    source: Path,
    out: Path,
    variant: Variant,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_shard_size: str = "50GB",
    trust_remote_code: bool = False,
    progress: Progress = show,
) -> Quantized:
    """Quantize the checkpoint in `source` into `out`, which must be absent or empty.

    It is built beside `out` and renamed when it is complete; what a killed run left there is taken up.

    Raises:
        BadInputError: `out` is in use, or `source` cannot be quantized.
        TameError: a damaged or broken source, no space left, no memory left.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInputError(f"{out}: exists and is not an empty folder; remove it or give another")
    limit = parse_size(max_shard_size)
    chosen = pick(device)
    check_source(source)
    partial = out.parent / f".{out.name}.partial"
    started = time.monotonic()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (out.parent / f".{out.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TameError(f"{out}: another tame is writing it; wait for it, or give another folder") from None
            made = isolated(
                f"quantize {variant.label}",
                work,
                source,
                partial,
                variant,
                device=chosen,
                workers=workers,
                max_shard_size=limit,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            for path in partial.iterdir():
                _fsync(path)
            names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
            files = (
                store.sha256_files(partial, [name for name in names if name not in made["digests"]]) | made["digests"]
            )
            partial.rename(out)
            _fsync(out.parent)
            Path(lock.name).unlink()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(out.parent).free
            raise TameError(
                f"{out}: no space left ({free / 1e9:.1f} GB free); make room, or give another folder"
            ) from error
        raise TameError(f"{error.filename or out}: {error.strerror or error}; make it readable or writable") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return summarize(
        str(out),
        files,
        sum((out / name).stat().st_size for name in files),
        store.digest_of(files),
        {**made, "seconds": time.monotonic() - started},
        cached=False,
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


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
