"""Which device to work on, and what this machine is, known without importing torch."""

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from typing import Any
from uuid import UUID

import psutil
from pydantic import BaseModel, ConfigDict, Field

from configs.errors import BadInputError, TameError, line
from configs.settings import DEVICE_LIMIT, device_limit
from tasks.runtime.flow_run_ownership import PATIENCE, PAUSE
from tasks.runtime.retry import retry

log = logging.getLogger("tame.device")

DECIDING = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "lm_eval", "datasets")
AMPERE, COMPUTE_CAPABILITY_MAJOR = 8, 75  # the latter a CUdevice_attribute of cuda.h
LEASE = 60.0
"""Seconds after which Prefect takes back the device of a process that died with it."""


class Gpu(BaseModel):
    """A CUDA device that this process may use. Memory in bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    memory_bytes: int
    bfloat16: bool = Field(True, exclude=True)
    """Whether it computes in bfloat16 by itself: those before Ampere, such as the T4, only pretend to, slowly."""
    uuid: str | None = Field(None, exclude=True)
    """GPU-…, as nvidia-smi and CUDA_VISIBLE_DEVICES write it."""


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that torch would see, asked of the driver, which respects CUDA_VISIBLE_DEVICES."""
    if "+cpu" in (_version("torch") or "+cpu"):
        return ()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        major = ctypes.c_int(AMPERE)
        uuid = ctypes.create_string_buffer(16)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        uuid_text = None if cuda.cuDeviceGetUuid(uuid, device) else f"GPU-{UUID(bytes=uuid.raw)}"
        called = name.value.decode(errors="replace")
        found.append(Gpu(name=called, memory_bytes=size.value, bfloat16=major.value >= AMPERE, uuid=uuid_text))
    return tuple(found)


def pick(device: str = "auto") -> str:
    """`cpu` or `cuda:N` for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        BadInputError: a device that is not there, or no device at all.
    """
    devices = gpus()
    if device == "auto":
        return "cuda:0" if devices else "cpu"
    if device == "cpu":
        return "cpu"
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise BadInputError(f"device {device!r} is not known; give auto, cpu, cuda or cuda:N")
    if int(index or 0) >= len(devices):
        seen = f"{len(devices)} CUDA device(s)" if devices else "no CUDA device"
        raise BadInputError(f"device {device!r} is not there: this process sees {seen}; give auto or cpu")
    return f"cuda:{int(index or 0)}"


def pick_all(device: str) -> str:
    """The same for work that all GPUs can share: `cuda` means all that this process sees, and stays `cuda`."""
    return pick(device) if device != "cuda" else pick(device).partition(":")[0]


def instead_of_bfloat16(device: str) -> str | None:
    """The dtype that a model in bfloat16 is measured in on `device`: float16 where it has no bfloat16; None for its own."""
    if not device.startswith("cuda"):
        return None
    return None if gpus()[int(device.partition(":")[2] or 0)].bfloat16 else "float16"


def name_of(device: str) -> str:
    """What stands beside a measured number: the GPU's name, or the CPU's and its cores."""
    if device.startswith("cuda"):
        return gpus()[int(device.partition(":")[2] or 0)].name
    return f"{_cpu()}, {cores()} cores"


@contextmanager
def held() -> Iterator[None]:
    """Have this worker's device alone, across all processes and machines; without a worker there is nothing to wait for.

    Prefect's server says who has it. One that is away is waited for; once the device is held, it may go and come.

    Raises:
        TameError: the limit does not exist, or the server did not answer for PATIENCE.
    """
    limit = device_limit()
    if not limit:
        yield
        return
    from httpx import HTTPError

    stack = ExitStack()
    _take(limit, stack)
    try:
        yield
    finally:
        try:
            stack.close()
        except HTTPError as error:
            log.warning("%s could not be given back (%s); the server takes it back within %.0f s", limit, error, LEASE)


def _take(limit: str, stack: ExitStack) -> None:
    """Wait until the limit is free, and for a server that is away; `stack` gives it back."""
    from prefect.concurrency.sync import concurrency

    def warn(_error: Exception, _pause: float, _spent: float) -> None:
        log.warning("Prefect's server does not answer; waiting for it before taking %s", limit)

    def take() -> None:  # what is done while it is held is not in here
        stack.enter_context(concurrency(limit, lease_duration=LEASE, strict=True, raise_on_lease_renewal_failure=False))

    try:
        retry(take, repeat(PAUSE), _away, warn, PATIENCE)
    except Exception as error:  # whatever Prefect throws
        if _away(error):
            raise TameError(f"Prefect's server did not answer for {PATIENCE:.0f} s; run it again") from error
        raise TameError(f"{DEVICE_LIMIT.name} {limit}: {line(error)}; start it with tame worker") from error


def _away(failure: Exception) -> bool:
    """Whether an error comes from a server that cannot be reached, or that cannot reach its database."""
    from httpx import HTTPStatusError, TransportError

    error: BaseException | None = failure
    while error is not None:
        if isinstance(error, TransportError) or (isinstance(error, HTTPStatusError) and error.response.is_server_error):
            return True
        error = error.__cause__
    return False


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """{device, cpu, cores, memory_bytes, gpus} of this machine."""
    return {
        "device": pick(),
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [gpu.model_dump() for gpu in gpus()],
    }


def versions(*more: str) -> dict[str, str]:
    """Of Python, tame, and the libraries that decide bytes and numbers: those of every run, and `more`."""
    installed = {name: found for name in ("tame", *DECIDING, *more) if (found := _version(name))}
    return {"python": platform.python_version(), **installed}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16; True where nobody knows."""
    flags = _cpuinfo("flags")
    return not flags or any(name in flags.split() for name in ("avx512_bf16", "amx_bf16"))


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpuinfo(field: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next((line.partition(":")[2].strip() for line in file if line.startswith(field)), "")
    except OSError:
        return ""
