"""What the quantized checkpoint will be, before any weight is read: which tensor becomes what, decided on the meta device.

What is quantized is what transformers quantizes: its own quantizer replaces the linear layers of a model without weights,
its own conversion mappings rename the checkpoint's keys on the way in and out. Nothing here knows an architecture.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from configs.errors import BadInputError, TameError
from configs.schema import Variant
from tasks.download.checkpoint import Stored
from tasks.quantize.methods import bitsandbytes_4bit, bitsandbytes_8bit
from tasks.quantize.shards import NAMES
from tasks.quantize.skeleton import left_out, skeleton

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
QUANTIZABLE = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Job:
    """One tensor of the source, and what is written for it."""

    source: Stored
    parts: dict[str, str]
    """Names in the output by what the method calls them; "" is the tensor itself, or its codes."""
    quantized: bool
    """Whether the weight is quantized, rather than copied or cast."""
    dtype: torch.dtype
    """What the tensor is cast to before anything else."""
    shape: tuple[int, ...]
    transposed: bool = False
    at: int = 0
    """For a piece of a tensor that is copied: where it begins in the output, in bytes."""

    @property
    def key(self) -> str:
        """Names the job among all others."""
        return f"{self.parts['']}@{self.at}"

    def split(self, size: int) -> list["Job"]:
        """The same as several jobs of at most `size` bytes, if it is a copy; weights are quantized by one thread each."""
        if self.quantized or self.source.end - self.source.start <= size:
            return [self]
        ratio = self.dtype.itemsize / DTYPES[self.source.dtype].itemsize
        return [
            replace(
                self,
                source=self.source._replace(start=start, end=min(start + size, self.source.end)),
                at=int((start - self.source.start) * ratio),
            )
            for start in range(self.source.start, self.source.end, size)
        ]


@dataclass(frozen=True)
class Layout:
    """The whole output."""

    jobs: list[Job]
    outputs: dict[str, torch.Tensor]
    """Every tensor that is written, as a meta tensor, in the order in which `save_pretrained` goes through them."""
    config: dict[str, Any]
    """What config.json needs besides the source's own keys."""
    generation_config: dict[str, Any] | None
    parameters: int
    quantized: set[str]
    """The model's names of the weights that are."""
    quantized_parameters: int
    left: list[dict[str, Any]]
    notes: list[str]


def method_of(variant: Variant) -> ModuleType:
    """The module that knows the variant's format."""
    return bitsandbytes_8bit if variant.method == "int8" else bitsandbytes_4bit


def lay_out(
    folder: Path, variant: Variant, tensors: dict[str, Stored] | None, trust_remote_code: bool = False
) -> Layout:
    """Decide what becomes of every tensor of the checkpoint in `folder`; without `tensors`, of one that has all it needs.

    Raises:
        BadInputError: an architecture that transformers does not know or would not quantize.
        TameError: tensors missing or of unexpected shapes or dtypes.
    """
    model, quantizer, dtype = skeleton(folder, variant, tensors or {}, trust_remote_code)
    if tensors is None:
        tensors = _complete(model)
    sources, fused = _match(model, quantizer, tensors)
    saved = _saved(model, sources, fused, tensors, folder)
    wanted = {name for name in saved if quantizer.param_needs_quantization(model, name)}
    left, notes = left_out(model, saved, wanted, variant)
    if not wanted:
        largest = next((entry for entry in left if entry["reason"] not in ("embedding", "output head")), left[0])
        raise BadInputError(
            f"{folder}: transformers quantizes no layer of {type(model).__name__}: {largest['module']} is "
            f"{largest['reason']}; choose another model"
        )
    notes += _dropped(model, sources, tensors)
    targets = _target_dtypes(model, saved, wanted, dtype)
    jobs, written = _jobs(model, variant, saved, wanted, targets, sources, tensors, folder)
    generation = None
    if model.can_generate() and not (folder / "generation_config.json").exists():
        generation = model.generation_config.to_diff_dict()
    return Layout(
        jobs=jobs,
        outputs=written,
        config={
            "architectures": [type(model).__name__],
            "dtype": str(dtype).removeprefix("torch."),
            "quantization_config": quantizer.quantization_config.to_dict(),
        },
        generation_config=generation,
        parameters=sum(tensor.numel() for tensor in saved.values()),
        quantized=wanted,
        quantized_parameters=sum(saved[name].numel() for name in wanted),
        left=left,
        notes=notes,
    )


def _match(model: Any, quantizer: Any, tensors: dict[str, Stored]) -> tuple[dict[str, list[Stored]], set[str]]:
    """Which tensors each of the model's is loaded from, and which of the model's transformers computes from several.

    The same renaming, in the same order, as transformers' loading of a checkpoint. Tensors that match nothing are dropped,
    as there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix
    sources: dict[str, list[Stored]] = {}
    fused: set[str] = set()
    for original in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(original, renamings, converters, prefix, expected)
        if name not in expected and original in expected:
            name, pattern = rename_source_key(original, [], [], prefix, expected)
        if name not in expected:
            continue
        sources.setdefault(name, []).append(tensors[original])
        if pattern is not None:
            targets = by_pattern[pattern].target_patterns
            fused |= {name.replace(targets[0], target) for target in targets}
    model._weight_conversions = [c for c in conversions if c.was_used()]
    return sources, fused


def _saved(
    model: Any, sources: dict[str, list[Stored]], fused: set[str], tensors: dict[str, Stored], folder: Path
) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would save, under the model's own names, before quantization: without tied duplicates."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(model.state_dict())
    missing = set(state) - sources.keys() - fused
    for name, other in list(model.all_tied_weights_keys.items()):
        if name in sources and other in sources:  # both stored: transformers ties them only if they are equal
            if _same_bytes(folder, sources[name][0], sources[other][0]):
                missing.add(name)
            else:
                model.all_tied_weights_keys.pop(name)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    ignored = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(missing):
        if name in parameters and not any(re.search(pattern, name) for pattern in ignored):
            raise TameError(
                f"{folder}: no tensor for {name} {list(state[name].shape)} of {type(model).__name__}; transformers would "
                "fill it with random numbers. Is it the right architecture in config.json? Download the model again"
            )
    state = remove_tied_weights_from_state_dict(state, model)
    return {name: tensor for name, tensor in state.items() if name not in missing}


def _target_dtypes(
    model: Any, saved: dict[str, torch.Tensor], wanted: set[str], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """What each tensor is cast to on loading: the model's dtype, but for those that insist on another."""
    plan = model._get_dtype_plan(dtype)
    kept = {re.compile(pattern.replace("*", ".*")): kind for pattern, kind in plan.items()}
    targets = {}
    for name, tensor in saved.items():
        insisted = next((kind for pattern, kind in kept.items() if pattern.search(name)), None)
        targets[name] = insisted or (dtype if name in wanted else tensor.dtype)
    return targets


def _jobs(
    model: Any,
    variant: Variant,
    saved: dict[str, torch.Tensor],
    wanted: set[str],
    targets: dict[str, torch.dtype],
    sources: dict[str, list[Stored]],
    tensors: dict[str, Stored],
    folder: Path,
) -> tuple[list[Job], dict[str, torch.Tensor]]:
    """A job for each tensor of the source that is written, and all that is written."""
    from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
    from transformers.pytorch_utils import Conv1D

    outputs = method_of(variant).outputs
    state: dict[str, torch.Tensor] = {}
    origin: dict[int, tuple[str, str]] = {}
    for name, tensor in saved.items():
        parts = {"": torch.empty(tensor.shape, dtype=targets[name], device="meta")}
        if name in wanted:
            parts = outputs(tuple(tensor.shape), targets[name], variant)
        for suffix, part in parts.items():
            written = name + suffix if suffix.startswith(".") or not suffix else name.removesuffix("weight") + suffix
            state[written] = part
            origin[id(part)] = (name, suffix)
    jobs: dict[str, Job] = {}
    if model._weight_conversions:
        reverted = revert_weight_conversion(model, state)
    else:  # it would only sort them, and compile a pattern for each name: as long as all else here
        reverted = {name: state[name] for name in sorted(state, key=dot_natural_key)}
    for written, tensor in reverted.items():
        name, suffix = origin.get(id(tensor), (written, ""))
        if id(tensor) in origin:
            if len(sources[name]) != 1:
                raise TameError(
                    f"{folder}: {', '.join(t.name for t in sources[name])} all become {name}; remove all but one"
                )
            source = sources[name][0]
        elif written in tensors and tensors[written].shape == tuple(tensor.shape):
            source = tensors[written]  # fused on loading and split on saving: the same tensor again
        else:
            raise BadInputError(
                f"{folder}: transformers rewrites {written} of {type(model).__name__} on loading in a way that cannot be "
                "streamed; tame does not quantize this architecture"
            )
        if name in jobs:
            jobs[name].parts[suffix] = written
            continue
        transposed = name in wanted and issubclass(model.get_submodule(name.rpartition(".")[0]).source_cls, Conv1D)
        shape = tuple(saved[name].shape) if name in wanted else tuple(tensor.shape)
        stored = shape[::-1] if transposed else shape
        if source.shape != stored:
            raise TameError(
                f"{folder / source.file}: {source.name} has shape {list(source.shape)}, {type(model).__name__} expects "
                f"{list(stored)}; is it the right config.json?"
            )
        if source.dtype not in (QUANTIZABLE if name in wanted else DTYPES):
            raise TameError(f"{folder / source.file}: {source.name} is {source.dtype}; expected F16, BF16 or F32")
        jobs[name] = Job(
            source,
            {suffix: written},
            name in wanted,
            targets[name] if name in wanted else tensor.dtype,
            shape,
            transposed,
        )
    return list(jobs.values()), reverted


def _dropped(model: Any, sources: dict[str, list[Stored]], tensors: dict[str, Stored]) -> list[str]:
    """A sentence on what transformers does not load, such as heads for predicting several tokens; not on small change."""
    loaded = {tensor.name for several in sources.values() for tensor in several}
    lost = [tensor for name, tensor in tensors.items() if name not in loaded]
    share = sum(t.end - t.start for t in lost) / max(1, sum(t.end - t.start for t in tensors.values()))
    if share < 0.001:
        return []
    return [
        f"{len(lost)} tensors of the source ({share:.1%} of its bytes), such as {lost[0].name}, are no part of "
        f"{type(model).__name__} in transformers and are left out."
    ]


def _complete(model: Any) -> dict[str, Stored]:
    """Tensors for a model whose weights are not there: its own, tied ones once, under its own names."""
    tied = model.all_tied_weights_keys
    return {
        name: Stored(name, NAMES.get(tensor.dtype, "F32"), tuple(tensor.shape), "", 0, tensor.nbytes)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _same_bytes(folder: Path, one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are equal, byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    piece = 1 << 24
    with (folder / one.file).open("rb") as a, (folder / other.file).open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        return all(
            a.read(min(piece, one.end - at)) == b.read(min(piece, one.end - at))
            for at in range(one.start, one.end, piece)
        )
