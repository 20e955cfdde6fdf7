"""Which device to work on, and what this machine is, known without importing torch."""

import ctypes
import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError

DECIDING = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "lm_eval", "datasets")


class Gpu(BaseModel):
    """A CUDA device that this process may use. Memory in bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    memory_bytes: int


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
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        found.append(Gpu(name=name.value.decode(errors="replace"), memory_bytes=size.value))
    return tuple(found)


def pick(device: str = "auto") -> str:
    """`cpu` or `cuda:N` for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        BadInputError: a device that is not there, or no device at all.
    """
    known = gpus()
    if device == "auto":
        return "cuda:0" if known else "cpu"
    if device == "cpu":
        return "cpu"
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise BadInputError(f"device {device!r} is not known; give auto, cpu, cuda or cuda:N")
    if int(index or 0) >= len(known):
        seen = f"{len(known)} CUDA device(s)" if known else "no CUDA device"
        raise BadInputError(f"device {device!r} is not there: this process sees {seen}; give auto or cpu")
    return f"cuda:{int(index or 0)}"


def name_of(device: str) -> str:
    """What stands beside a measured number: the GPU's name, or the CPU's and its cores."""
    if device.startswith("cuda"):
        return gpus()[int(device.partition(":")[2] or 0)].name
    return f"{_cpu()}, {cores()} cores"


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


def versions() -> dict[str, str]:
    """Of Python, tame, and the libraries that decide bytes and numbers."""
    installed = {name: found for name in ("tame", *DECIDING) if (found := _version(name))}
    return {"python": platform.python_version(), **installed}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
