"""Memory of the device that a model is measured on: how much is free, whether it ran out, and how it is kept."""

import ctypes
from contextlib import suppress

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def reuse_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MB. By default it returns each to the kernel, which must zero the next one."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 1024 * 1024)
        libc.mallopt(M_TRIM_THRESHOLD, 1024 * 1024 * 1024)


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


def synchronize(device: str) -> None:
    """Wait until a GPU has finished the work that was queued on it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on a GPU or on the host."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
