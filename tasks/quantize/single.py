"""What quantizing writes for a single tensor, in memory, of a source that is read in parts."""

from collections.abc import Callable
from pathlib import Path

from configs.schema import Variant
from tasks.quantize.layout import Job
from tasks.quantize.methods import method_of
from tasks.quantize.packed import Packed
from tasks.quantize.shards import Shard
from tasks.quantize.tensor import Sources, Worker


class _PartlyRead(Sources):
    """A source of which only what is asked for is read."""

    def __init__(self, name: str, read: Callable[[str, int, int], bytes], packed: dict[str, Packed]) -> None:
        super().__init__(Path(name), packed)
        self.part = read

    def fill(self, name: str, start: int, data: memoryview) -> None:
        """Fill `data` from byte `start` of a file."""
        data[:] = self.part(name, start, len(data))


class _InMemory(Shard):
    """Stands where the engine has a file: keeps what is written of one tensor, from byte `begin` on."""

    def __init__(self, begin: int) -> None:
        self.begin, self.data_of_tensor = begin, bytearray()
        self.late = {}

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Keep bytes of the tensor, `start` bytes from its beginning."""
        assert start - self.begin == len(self.data_of_tensor), name
        self.data_of_tensor += data


class SingleTensors:
    """Quantizes tensors of a source one by one."""

    def __init__(
        self,
        name: str,
        read: Callable[[str, int, int], bytes],
        variant: Variant,
        device: str,
        packed: dict[str, Packed] | None = None,
    ) -> None:
        """`name` is the source's, for errors; `read` gives the bytes of (file, start, count) of it, `packed` is what is of its
        weights."""
        self.written: dict[str, Shard] = {}
        tensor_format = method_of(variant).tensor_format()
        assert tensor_format is not None
        self.worker = Worker(_PartlyRead(name, read, packed or {}), self.written, tensor_format, variant, device)

    def outputs(self, job: Job) -> dict[str, bytes]:
        """What is written for one tensor, by the name of each output; of a piece of a tensor, from the piece's beginning.

        Raises:
            TameError: as `Worker.write`.
        """
        kept = {name: _InMemory(job.at if name == job.output else 0) for name in job.outputs}
        self.written.clear()
        self.written.update(kept)
        self.worker.write(job)
        return {name: bytes(memory.data_of_tensor) for name, memory in kept.items()}
