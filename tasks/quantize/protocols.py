"""What tame asks of a method: everything that differs between formats, and nothing else, is behind these two protocols.

A `Method` is what the rest of tame sees. A `TensorFormat` is what the engine needs of a format whose checkpoint is written
tensor by tensor. A new format is one file in methods/ that answers both, its tests, and a line in `methods.METHODS` and in
configs/method_names.py. Importing this file, or methods/, imports no torch: a run that finds everything in the cache needs none.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from configs.schema import Variant
from tasks.runtime.progress import Progress, silent
from tasks.values import Calibration, Quantized, Unquantized

if TYPE_CHECKING:
    import torch

    from tasks.transformers_adapter import Selection


@dataclass(frozen=True)
class Request:
    """What is to be quantized, into what, and how. It is pickled to reach the process that works."""

    source: Path
    """The folder of a checkpoint in 16 or 32 bits."""
    out: Path
    """The folder to fill; it is empty, or holds what a killed run left."""
    variant: Variant
    device: str
    """`cpu`, `cuda:N`, or `cuda` for all GPUs."""
    workers: int | None = None
    """Tensors in flight; None takes what the device is good for."""
    max_shard_size: int | None = None
    """Largest output file, in bytes; None takes what is quick to hash and to upload."""
    names: list[str] | None = None
    """The source's files that may be carried along; None allows all."""
    trust_remote_code: bool = False
    source_method: "SourceReader | None" = None
    """What reads the source, where that is quantized already."""
    calibration: Calibration | None = None
    """What codes are chosen on, for a variant that is calibrated."""
    codes: Path | None = None
    """A checkpoint of the same source and method that has more quantized: its codes and scales are taken as they are."""


class Written(BaseModel):
    """A quantized checkpoint that was written into a folder."""

    model_config = ConfigDict(frozen=True)

    digests: dict[str, str]
    """sha256 of each weight file."""
    parameters: int
    quantized: int
    """How many of the parameters are quantized."""
    weight_bytes: int
    """Size of the weight files."""
    left: list[Unquantized]
    """What is not quantized, largest first."""
    notes: list[str]
    """Sentences that a user of the model should know."""

    def quantized_in(
        self, path: str, files: dict[str, str], size: int, digest: str, seconds: float, cached: bool
    ) -> Quantized:
        """The value that the next stages get, of this checkpoint in `path`: `size` is that of all files, which `digest` covers."""
        return Quantized(
            path=path,
            digest=digest,
            bytes=size,
            files=files,
            parameters=self.parameters,
            bits_per_weight=8 * self.weight_bytes / self.parameters,
            quantized_share=self.quantized / self.parameters,
            left=self.left,
            notes=self.notes,
            seconds=seconds,
            cached=cached,
        )


@dataclass(frozen=True)
class Home:
    """A program that a format's authors made it for."""

    runtime: str
    """As recipes call it, so that the card can say whether it was tried: vllm, peft."""
    title: str
    """The program, and what it needs for this format."""
    command: str
    """How it is started; {repo} is replaced."""
    plain_experts: bool = True
    """Whether it opens a mixture whose experts stay in 16 bits."""


@dataclass(frozen=True)
class CardText:
    """What a model card says of a format."""

    quantized_to: str
    """Ends the sentence "This model was quantized to …"."""
    install: tuple[str, ...]
    """Packages that are needed besides transformers and accelerate."""
    tags: tuple[str, ...]
    """For the Hub's search."""
    limits: tuple[str, ...]
    """Sentences on what this format cannot do."""
    homes: tuple[Home, ...] = ()
    """What it is served and trained with, besides transformers."""


@dataclass(frozen=True)
class Restored:
    """The weights that a stored tensor stands for, in float32 and piece by piece."""

    piece: "Callable[[int, int], torch.Tensor]"
    """From (start, count) to that many weights, counted through the whole weight row by row."""
    multiple: int
    """Pieces begin at a multiple of this, and all but the last have a multiple of it."""


@dataclass(frozen=True)
class Dense:
    """How a model computes after its quantized layers were replaced by plain ones."""

    weights: str
    """For the protocol: "4-bit weights dequantized once to bfloat16"."""
    difference: str
    """Goes on from `weights` where plain products are rounded otherwise than those of the stored layers; may be empty."""


class SourceReader(Protocol):
    """What is needed of a format to start from a checkpoint in it, and to measure one."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """Packages that decide the bytes or the arithmetic, besides torch, transformers and safetensors: part of every key."""
        ...

    def restore(self, parts: "dict[str, torch.Tensor]", shape: tuple[int, int], device: str) -> Restored:
        """The weights [out, in] that `parts`, keyed as in `TensorFormat.outputs`, stand for."""
        ...

    def densify(self, model: Any, free: int) -> Dense | str | None:
        """Replace the layers of a loaded model by plain ones with the same weights, where that is the same arithmetic.

        `free` is the memory that may be used, in bytes. Returns a sentence where the layers stay for want of it, and None
        where there are no such layers, or where they compute in another way.
        """
        ...

    def altered(self, model: Any) -> bool:
        """Whether a forward pass has changed the stored weights of a loaded model, so that it must be loaded again."""
        ...


class Method(SourceReader, Protocol):
    """One method of quantizing, under one name of configs/method_names.py. It is pickled to reach the process that works."""

    @property
    def family(self) -> str:
        """What the field calls the checkpoint's format."""
        ...

    def bits(self, variant: Variant) -> int:
        """Bits of a quantized weight, without its scales."""
        ...

    def card(self, variant: Variant) -> CardText:
        """What the model card says of the format."""
        ...

    def describes(self, quantization_config: dict[str, Any]) -> Variant | None:
        """The variant that a checkpoint's `quantization_config` describes, or None where it is not this method's."""
        ...

    def quantize(self, request: Request, progress: Progress = silent) -> Written:
        """Do what is requested; this runs in a process of its own."""
        ...

    def tensor_format(self) -> "TensorFormat | None":
        """The format of a checkpoint that is written tensor by tensor; None where it is not."""
        ...

    def choices(self, variant: Variant) -> list[Variant]:
        """What a weight can be beside others of this variant in one checkpoint, least bits first, the variant itself included."""
        ...


class TensorFormat(Protocol):
    """A format whose tensors are each made from one tensor of the source, a few rows at a time."""

    def select(self, model: Any, variant: Variant, skip: list[str] | None, dtype: "torch.dtype") -> "Selection":
        """Choose what is quantized of a model without weights; `skip` names modules that are not, None leaves the usual ones.

        May replace the model's modules by those that the checkpoint will be loaded into.
        """
        ...

    def reselect(self, model: Any, quantization_config: Any, dtype: "torch.dtype") -> "Selection":
        """The same for a checkpoint that is written: what a loader would load as quantized."""
        ...

    def outputs(self, shape: tuple[int, int], dtype: "torch.dtype", variant: Variant) -> "dict[str, torch.Tensor]":
        """What is stored for a weight [out, in], as meta tensors, by name below the module. The codes come first."""
        ...

    def grows(self, name: str, variant: Variant) -> bool:
        """Whether the length of the output `name` depends on the values of the weights; it is then 1-D."""
        ...

    def row_multiple(self, columns: int, variant: Variant) -> int:
        """Rows that are quantized together: calls of `quantize_rows` get a multiple of these, but for a weight's last rows."""
        ...

    def scale_count(self, shape: tuple[int, int], variant: Variant) -> int:
        """How many scales a weight, or some of its rows, has."""
        ...

    def quantize_rows(self, block: "torch.Tensor", variant: Variant) -> "tuple[torch.Tensor, torch.Tensor]":
        """Quantize whole rows: their codes as they are stored, and their scales, F32 and 1-D; on the block's device."""
        ...

    def plausible(self, scales: "torch.Tensor") -> bool:
        """Whether the scales of a whole weight say that nothing is wrong with it. If not, `fault` is asked block by block."""
        ...

    def fault(self, block: "torch.Tensor", scales: "torch.Tensor") -> tuple[int, str] | None:
        """The first of finite rows that the format cannot hold, and a sentence on it that begins with "has"; or None."""
        ...

    def pack(
        self, scales: "torch.Tensor", shape: tuple[int, int], dtype: "torch.dtype", variant: Variant
    ) -> "dict[str, torch.Tensor]":
        """What is stored besides the codes, by name below the module, from the scales of the whole weight."""
        ...


@runtime_checkable
class WholeFormat(TensorFormat, Protocol):
    """A format that has to know the largest magnitude in a weight, and in others that kernels fuse with it, before its rows."""

    def fused(self, weights: Iterable[str]) -> list[list[str]]:
        """Which of a model's weights, by their names, have to be known together; one that needs no other is alone."""
        ...

    def knowing(self, largest: "torch.Tensor") -> TensorFormat:
        """What quantizes weights of which this is the largest magnitude, a scalar in the weights' dtype on the host."""
        ...


@runtime_checkable
class CodedFormat(TensorFormat, Protocol):
    """A format whose weights are codes of levels, times the scale of a block: codes and scales can be chosen, by calibrating."""

    def levels(self, variant: Variant) -> "torch.Tensor":
        """The values of the codes, F32 [codes], each at the place of its code; the largest magnitude is 1."""
        ...

    def block_size(self, variant: Variant) -> int:
        """How many weights, one after the other, share a scale."""
        ...

    def signed_scales(self, variant: Variant) -> bool:
        """Whether a scale may be negative."""
        ...

    def scales_as_read(self, scales: "torch.Tensor", variant: Variant, dtype: "torch.dtype") -> "torch.Tensor":
        """What the scales of a whole weight of this dtype, F32 [blocks], are when they were stored and are read again."""
        ...

    def scales_to_pack(self, scales: "torch.Tensor", variant: Variant) -> "torch.Tensor":
        """The scales that `pack` takes, from those that `levels` are multiplied with."""
        ...

    def pack_codes(self, codes: "torch.Tensor") -> "torch.Tensor":
        """Codes, U8 [rows, columns], as they are stored."""
        ...
