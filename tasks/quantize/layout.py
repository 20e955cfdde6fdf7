"""What the quantized checkpoint will be, before any weight is read: which tensor becomes what, decided on the meta device."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from configs.errors import BadInputError, TameError
from configs.schema import Variant
from tasks import transformers_adapter
from tasks.download.checkpoint import Stored
from tasks.quantize.protocols import Method, TensorFormat, WholeFormat
from tasks.quantize.shards import NAMES
from tasks.quantize.skeleton import Skeleton, left_out, skeleton
from tasks.values import Unquantized

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
QUANTIZABLE = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Job:
    """One tensor of the source, and what is written for it."""

    source: Stored
    output: str
    """The output that is the tensor itself, or its codes."""
    quantized: bool
    """Whether the weight is quantized, rather than copied or cast."""
    dtype: torch.dtype
    """What the tensor is cast to before anything else."""
    shape: tuple[int, ...]
    transposed: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    """For a quantized weight: all outputs by what the format calls them, the codes first."""
    at: int = 0
    """For a piece of a tensor that is copied: where it begins in the output, in bytes."""
    weight: str = ""
    """For a quantized weight: what the model calls it."""
    known_with: tuple[Stored, ...] = ()
    """The weights of the source, itself included, whose largest magnitude has to be known first; for a `WholeFormat`."""
    chosen: tuple[Path, str] | None = None
    """The file in which calibrating has put its codes and scales, and their name there; None where it has chosen none."""
    variant: Variant | None = None
    """What the weight is quantized as, where that is another variant than the checkpoint's."""
    taken: dict[str, tuple[Path, Stored]] = field(default_factory=dict)
    """For a weight that another checkpoint has quantized alike: where each output lies in it, to be copied as it is."""

    @property
    def outputs(self) -> list[str]:
        """All that is written, the codes first."""
        return list(self.parts.values()) or [self.output]

    @property
    def key(self) -> str:
        """Names the job among all others."""
        return f"{self.output}@{self.at}"

    @property
    def bytes_read(self) -> int:
        """What is read of the source."""
        return self.source.end - self.source.start

    def split(self, size: int) -> list["Job"]:
        """The same as several jobs of at most `size` bytes, if it is a copy; weights are quantized by one thread each."""
        if self.quantized or self.bytes_read <= size:
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
    variant: Variant
    """With all decided that the recipe's had left open."""
    generation_config: dict[str, Any] | None
    parameters: int
    quantized: set[str]
    """The model's names of the weights that are."""
    quantized_parameters: int
    left: list[Unquantized]
    notes: list[str]
    growing: set[str]
    """Outputs whose length is known only when they are made."""
    weight_of: dict[str, str]
    """For each output that is a part of a quantized weight, the weight: its parts are of no use without each other."""


def lay_out(
    folder: Path,
    method: Method,
    variant: Variant,
    tensors: dict[str, Stored] | None,
    trust_remote_code: bool = False,
) -> Layout:
    """Decide what becomes of every tensor of the checkpoint in `folder`; without `tensors`, of one that has all it needs.

    Raises:
        BadInputError: an architecture that transformers does not know, or of which nothing would be quantized.
        TameError: tensors missing or of unexpected shapes or dtypes.
    """
    tensor_format = method.tensor_format()
    assert tensor_format is not None
    whole = skeleton(folder, tensor_format, variant, tensors or {}, trust_remote_code)
    model = whole.model
    if tensors is None:
        tensors = _complete(model)
    variant = whole.selection.variant or variant
    sources, fused = transformers_adapter.match(model, whole.selection.quantizer, tensors)
    saved = _saved(model, sources, fused, folder)
    wanted = {name for name in saved if whole.selection.includes(name)}
    left, notes = left_out(whole, saved, wanted, variant, method.family)
    if not wanted:
        largest = next((entry for entry in left if entry.reason not in ("embedding", "output head")), left[0])
        raise BadInputError(
            f"{folder}: transformers quantizes no layer of {type(model).__name__}: {largest.module} is "
            f"{largest.reason}; choose another model"
        )
    notes += _dropped(model, sources, tensors)
    written = _written(whole, tensor_format, variant, saved, wanted)
    jobs = _jobs(whole, written, saved, sources, tensors, folder)
    if isinstance(tensor_format, WholeFormat):
        jobs = _known_together(jobs, tensor_format)
    generation = None
    if model.can_generate() and not (folder / "generation_config.json").exists():
        generation = model.generation_config.to_diff_dict()
    return Layout(
        jobs=jobs,
        outputs={name: output.tensor for name, output in written.items()},
        config={
            "architectures": [type(model).__name__],
            "dtype": str(whole.dtype).removeprefix("torch."),
            "quantization_config": _with_stored_names(whole),
        },
        variant=variant,
        generation_config=generation,
        parameters=sum(tensor.numel() for tensor in saved.values()),
        quantized=wanted,
        quantized_parameters=sum(saved[name].numel() for name in wanted),
        left=left,
        notes=notes,
        growing={name for name, output in written.items() if output.part and tensor_format.grows(output.part, variant)},
        weight_of={name: output.weight or output.split for name, output in written.items() if output.part},
    )


def _saved(model: Any, sources: dict[str, list[Stored]], fused: set[str], folder: Path) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would save, under the model's own names, before quantization: without tied duplicates."""
    state = dict(model.state_dict())
    missing = set(state) - sources.keys() - fused
    tied = transformers_adapter.tied(model)
    for name, other in list(tied.items()):
        if name in sources and other in sources:  # both stored: transformers ties them only if they are equal
            if _same_bytes(folder, sources[name][0], sources[other][0]):
                missing.add(name)
            else:
                tied.pop(name)
    transformers_adapter.tie(model, missing)
    for name in transformers_adapter.made_up(model, missing):
        raise TameError(
            f"{folder}: no tensor for {name} {list(state[name].shape)} of {type(model).__name__}; transformers would "
            "fill it with random numbers. Is it the right architecture in config.json? Download the model again"
        )
    state = transformers_adapter.without_tied(model, state)
    return {name: tensor for name, tensor in state.items() if name not in missing}


@dataclass(frozen=True)
class _Output:
    """A tensor that is written."""

    tensor: torch.Tensor
    """A meta tensor."""
    weight: str | None
    """The weight of the model that it is, or that it belongs to; None for one that transformers splits off on saving."""
    dtype: torch.dtype
    """What the weight is cast to before anything else."""
    part: str = ""
    """What the format calls it, below the module; empty where the weight is not quantized."""
    split: str = ""
    """For a part of what transformers splits off on saving: the name that this has where it is not quantized."""
    shape: tuple[int, ...] = ()
    """For a part: the shape of its weight."""
    codes: bool = True
    """Whether it is the weight itself, or its codes."""


def _written(
    whole: Skeleton, tensor_format: TensorFormat, variant: Variant, saved: dict[str, torch.Tensor], wanted: set[str]
) -> dict[str, _Output]:
    """All that is written, by name, in the order in which `save_pretrained` goes through it."""
    kept = transformers_adapter.kept_dtypes(whole.model, whole.dtype)
    state: dict[str, torch.Tensor] = {}
    outputs: dict[int, _Output] = {}
    split: set[str] = set()
    for name, tensor in saved.items():
        if name not in wanted or tensor.ndim > 2:
            state[name] = torch.empty(tensor.shape, dtype=kept(name) or tensor.dtype, device="meta")
            outputs[id(state[name])] = _Output(state[name], name, state[name].dtype)
            if name in wanted:
                split |= transformers_adapter.reverted(whole.model, {name: state[name]}).keys()
            continue
        module, dtype = name.rpartition(".")[0], kept(name) or whole.dtype
        own = whole.selection.variants.get(name, variant)
        parts = tensor_format.outputs((tensor.shape[0], tensor.shape[1]), dtype, own)
        for number, (part, stored) in enumerate(parts.items()):
            state[f"{module}.{part}"] = stored
            outputs[id(stored)] = _Output(stored, name, dtype, part, shape=tensor.shape, codes=number == 0)
    written: dict[str, _Output] = {}
    for name, tensor in transformers_adapter.reverted(whole.model, state).items():
        if name not in split:
            written[name] = outputs.get(id(tensor), _Output(tensor, None, tensor.dtype))
            continue
        parts = tensor_format.outputs((tensor.shape[0], tensor.shape[1]), tensor.dtype, variant)
        for number, (part, stored) in enumerate(parts.items()):
            written[f"{name.rpartition('.')[0]}.{part}"] = _Output(
                stored, None, tensor.dtype, part, split=name, shape=tensor.shape, codes=number == 0
            )
    return written


def _with_stored_names(whole: Skeleton) -> dict[str, Any]:
    """The quantization_config; its lists of modules have their names in the model and in the checkpoint."""
    state = whole.model.state_dict()

    def named(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {own: named(inner, own) for own, inner in value.items()}
        if key not in whole.selection.lists:
            return value
        weights = {f"{module}.weight": state[f"{module}.weight"] for module in value if f"{module}.weight" in state}
        stored = transformers_adapter.reverted(whole.model, weights)
        return list(dict.fromkeys([*value, *(name.removesuffix(".weight") for name in stored)]))

    config: dict[str, Any] = named(whole.selection.quantization_config)
    return config


def _jobs(
    whole: Skeleton,
    written: dict[str, _Output],
    saved: dict[str, torch.Tensor],
    sources: dict[str, list[Stored]],
    tensors: dict[str, Stored],
    folder: Path,
) -> list[Job]:
    """A job for each tensor of the source that is written."""
    model_name = type(whole.model).__name__
    parts: dict[str, dict[str, str]] = {}
    for name, output in sorted(written.items(), key=lambda item: not item[1].codes):
        if output.part:
            parts.setdefault(output.weight or output.split, {})[output.part] = name
    jobs = []
    for name, output in written.items():
        if not output.codes:
            continue
        if output.weight:
            if len(sources[output.weight]) != 1:
                several = ", ".join(tensor.name for tensor in sources[output.weight])
                raise TameError(f"{folder}: {several} all become {output.weight}; remove all but one")
            source = sources[output.weight][0]
        elif (plain := output.split or name) in tensors and tensors[plain].shape == tuple(
            output.shape or output.tensor.shape
        ):
            source = tensors[plain]  # fused on loading and split on saving: the same tensor again
        else:
            raise BadInputError(
                f"{folder}: transformers rewrites {name} of {model_name} on loading in a way that cannot be "
                "streamed; tame does not quantize this architecture"
            )
        quantized = bool(output.part)
        shape = tuple(output.shape if quantized else output.tensor.shape)
        transposed = quantized and str(output.weight).rpartition(".")[0] in whole.transposed
        stored = shape[::-1] if transposed else shape
        if source.shape != stored:
            raise TameError(
                f"{folder / source.file}: {source.name} has shape {list(source.shape)}, {model_name} expects "
                f"{list(stored)}; is it the right config.json?"
            )
        if source.dtype not in (QUANTIZABLE if quantized else DTYPES):
            raise TameError(f"{folder / source.file}: {source.name} is {source.dtype}; expected F16, BF16 or F32")
        belongs = parts.get(str(output.weight or output.split), {})
        weight = str(output.weight or output.split) if quantized else ""
        own = whole.selection.variants.get(weight)
        jobs.append(Job(source, name, quantized, output.dtype, shape, transposed, belongs, weight=weight, variant=own))
    return jobs


def _known_together(jobs: list[Job], tensor_format: WholeFormat) -> list[Job]:
    """The jobs, each quantized weight with those that have to be known together with it."""
    by_name = {job.weight: job for job in jobs if job.quantized}
    sets = {
        name: tuple(by_name[one].source for one in names) for names in tensor_format.fused(by_name) for name in names
    }
    return [replace(job, known_with=sets.get(job.weight, ())) for job in jobs]


def _dropped(model: Any, sources: dict[str, list[Stored]], tensors: dict[str, Stored]) -> list[str]:
    """A sentence on what transformers does not load: heads for predicting several tokens, a bias that it has no place for."""
    loaded = {tensor.name for several in sources.values() for tensor in several}
    lost = [t for name, t in tensors.items() if name not in loaded and not transformers_adapter.computed(name, t.shape)]
    share = sum(t.end - t.start for t in lost) / max(1, sum(t.end - t.start for t in tensors.values()))
    if not lost:
        return []
    return [
        f"{len(lost)} tensors of the source ({share:.1%} of its bytes), such as {lost[0].name}, are no part of "
        f"{type(model).__name__} in transformers and are left out."
    ]


def _complete(model: Any) -> dict[str, Stored]:
    """Tensors for a model whose weights are not there: its own, tied ones once, under the names that checkpoints have."""
    tied = transformers_adapter.tied(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {
        name: Stored(name, NAMES.get(tensor.dtype, "F32"), tuple(tensor.shape), "", 0, tensor.nbytes)
        for name, tensor in transformers_adapter.as_saved(model, state).items()
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
