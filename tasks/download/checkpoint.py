"""What a folder of safetensors holds, from its headers alone: no torch, no tensor data.

The format: 8 bytes, little-endian, with the length of a JSON header; the header; then the tensors, back to back, at the
`data_offsets` that the header gives relative to its end (https://github.com/huggingface/safetensors#format).
"""

import fnmatch
import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import BadInputError, TameError, line

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; what safetensors itself allows
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZED_NAMES = (".SCB", ".absmax", ".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv")
CARRIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "tekken.json", "vocab*",
    "merges*", "encoder.json", "bpe.codes", "*.model", "*.spm", "*.tiktoken", "chat_template*", "*.jinja",
    "*processor_config.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
MODULE = "[0-9]*_*"
"""The folders of the parts that an embedding model of sentence-transformers has beside the model itself, such as 1_Pooling."""
MODULE_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
CODE = ("*.py",)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Stored(NamedTuple):
    """A tensor in a file: bytes `start` to `end` of `file`, counted from the file's beginning."""

    name: str
    dtype: str
    """As safetensors writes it: BF16, F32, …"""
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


def check_source(folder: Path) -> None:
    """Check that `folder` holds a checkpoint that can be quantized: complete, well-formed, not quantized by just any method.

    Raises:
        BadInputError: no config.json, no safetensors, or already quantized.
        TameError: a file is damaged, or the index and the files disagree; it names file and tensor.
    """
    read_config(folder)
    read_tensors(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model that is not quantized yet, or in a way that tame reads."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInputError(f"{folder}: no config.json; give the folder of a transformers checkpoint")
    config = _json(path)
    if not isinstance(config, dict):
        raise BadInputError(f"{path}: expected a JSON object, got {type(config).__name__}")
    refuse_quantized(config, str(path))
    for name in ("quantize_config.json", "hf_quant_config.json"):
        if (folder / name).exists():
            raise BadInputError(f"{folder / name}: the model is already quantized; give the original, in 16 or 32 bits")
    return config


def refuse_quantized(config: dict[str, Any], where: str) -> None:
    """Refuse a config.json that says that the model is quantized, by any method but those that are read as sources.

    Raises:
        BadInputError: the config says so. `where` names the model or file in the message.
    """
    for at, part in [("", config), *((f"{key}.", value) for key, value in config.items() if isinstance(value, dict))]:
        for key in ("quantization_config", "compression_config"):
            if key == "quantization_config" and not at and _is_read(part.get(key)):
                continue
            if marker := part.get(key):
                method = f" ({marker['quant_method']})" if isinstance(marker, dict) and "quant_method" in marker else ""
                raise BadInputError(
                    f"{where}: {at}{key} says that the model is already quantized{method}; give the original, in 16 or 32 bits"
                )
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        raise BadInputError(
            f"{where}: quantization says that the model is already quantized (MLX, {mlx['bits']} bits); give the original, in 16 "
            "or 32 bits"
        )


def _is_read(quantization_config: Any) -> bool:
    """Whether it is of blocks of 8-bit floats, of fused experts in 4-bit ones, or of groups of modules with a scheme each."""
    config = quantization_config if isinstance(quantization_config, dict) else {}
    return config.get("quant_method") in ("fp8", "mxfp4") or "config_groups" in config


def unread(quantization: dict[str, Any], where: object) -> BadInputError:
    """What is said of a `quantization_config` of which no method reads the scheme; `where` names the model or file."""
    return BadInputError(
        f"{where}: quantization_config is a scheme of {quantization.get('quant_method')} that tame does not read (asymmetric, "
        "mixed, of other blocks, or with scales for activations); give the original, in 16 or 32 bits"
    )


def quantization_of(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of the checkpoint in `folder`; empty where there is none."""
    path = folder / "config.json"
    found = json.loads(path.read_bytes()).get("quantization_config") if path.is_file() else None
    return found if isinstance(found, dict) else {}


def refuse_wrapped(names: Collection[str], where: str) -> None:
    """Refuse tensors with names of which transformers would load none: it would fill the model with random numbers instead.

    Raises:
        BadInputError: all names begin with `module.`, as torch's DataParallel saves them; `where` names the model.
    """
    if names and all(name.startswith("module.") for name in names):
        raise BadInputError(
            f"{where}: the name of every tensor, such as {min(names)}, begins with module., as torch's DataParallel saves them, "
            "and transformers would load none; save the model that is wrapped (model.module.save_pretrained)"
        )


def top_tensors(names: Iterable[str]) -> list[str]:
    """Of the names of tensors, those that belong to no numbered layer: embeddings, the last norm, heads."""
    return sorted(name for name in names if not any(part.isdecimal() for part in name.split(".")))


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `folder`, by name, from one file or from the index's files, as they are stored."""
    path = folder / "config.json"
    config = _json(path) if path.is_file() else {}
    packed = isinstance(config, dict) and _is_read(config.get("quantization_config"))
    tensors: dict[str, Stored] = {}
    for file, expected in weight_files(folder).items():
        found = read_header(_inside(folder, file), file)
        for name in expected - found.keys():
            raise TameError(
                f"{folder / INDEX}: places {name} in {file}, which does not hold it; download the model again"
            )
        for name, tensor in found.items():
            if name in tensors:
                raise TameError(f"{folder}: {name} is in both {tensors[name].file} and {file}; remove one")
            tensors[name] = tensor
    for name, tensor in tensors.items():
        if tensor.dtype == "U32" and f"{name.rpartition('.')[0]}.scales" in tensors:
            raise BadInputError(
                f"{folder / tensor.file}: {name} is packed as MLX packs it, so the model is already quantized; give the original, "
                "in 16 or 32 bits"
            )
        if packed:
            continue
        if tensor.dtype.startswith("F8") or name.endswith(QUANTIZED_NAMES) or ".quant_state." in name:
            raise BadInputError(
                f"{folder / tensor.file}: {name} ({tensor.dtype}) says that the model is already quantized; "
                "give the original, in 16 or 32 bits"
            )
    refuse_wrapped(tensors.keys(), str(folder))
    if not tensors:
        raise TameError(f"{folder}: its safetensors hold no tensor; download the model again")
    return tensors


def written_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor that the files' headers have, by name: for a checkpoint that tame has made itself, quantized or not.

    Raises:
        BadInputError, TameError: as `weight_files` and `read_header`.
    """
    return {name: found for file in weight_files(folder) for name, found in read_header(folder / file, file).items()}


def weight_files(folder: Path) -> dict[str, set[str]]:
    """The files that transformers would load, each with the tensors that the index promises (none without an index)."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: set()}
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.name.endswith(WEIGHT_SUFFIXES)) if folder.is_dir() else []
        have = f" ({', '.join(others[:3])} will not do)" if others else ""
        raise BadInputError(f"{folder}: neither {WEIGHTS} nor {INDEX}{have}; save the model as safetensors")
    index = _json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise TameError(f"{folder / INDEX}: no weight_map of tensor names to file names; download the model again")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise TameError(
                f"{folder / INDEX}: places {name} in {file!r}, which is not a safetensors file of this folder"
            )
        files.setdefault(file, set()).add(name)
    return dict(sorted(files.items()))


def read_header(path: Path, file: str) -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        TameError: the file is missing, truncated, or its header lies: about lengths, overlaps, gaps, duplicates.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            length = header_length(opened.read(8), size, str(path))
            header = opened.read(length)
    except OSError as error:
        raise TameError(f"{path}: {error.strerror}; download it again") from error
    return parse_header(header, size, str(path), file)


def header_length(start: bytes, size: int, where: str) -> int:
    """How long the header of a file of `size` bytes is, from its first eight.

    Raises:
        TameError: longer than can be.
    """
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise TameError(f"{where}: the header claims {length} bytes of a file of {size}; truncated? download it again")
    return length


def parse_header(header: bytes, size: int, where: str, file: str) -> dict[str, Stored]:
    """The tensors that `header` places in a file of `size` bytes, in the order of their data; `where` names it in errors.

    Raises:
        TameError: as `read_header`.
    """
    again = "download it again"
    try:
        entries = json.loads(header, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise TameError(f"{where}: the header is not safetensors JSON ({line(error)}); {again}") from error
    if not isinstance(entries, dict):
        raise TameError(f"{where}: the header is not a JSON object; {again}")
    about = entries.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise TameError(f"{where}: the header's __metadata__ is not an object of strings; {again}")
    stored = [_stored(name, entry, where, file) for name, entry in entries.items()]
    stored.sort(key=lambda tensor: (tensor.start, tensor.end))
    ends = [0, *(tensor.end for tensor in stored)]
    for tensor, before in zip(stored, ends, strict=False):
        if tensor.start != before:
            what = "overlaps the tensor before it" if tensor.start < before else "leaves a gap before it"
            raise TameError(f"{where}: {tensor.name} {what} (starts at {tensor.start}, expected {before}); {again}")
    begin = 8 + len(header)
    if ends[-1] != size - begin:
        raise TameError(f"{where}: its tensors need {ends[-1] + begin} bytes, the file has {size}; truncated? {again}")
    return {t.name: t._replace(start=t.start + begin, end=t.end + begin) for t in stored}


def _stored(name: str, entry: Any, where: str, file: str) -> Stored:
    """One entry of a header, its bytes counted from the header's end."""
    try:
        if not name.isprintable():  # a line break, or half of a surrogate pair, which JSON allows
            raise ValueError("its name is not printable")
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not dtype.isprintable() or not isinstance(shape, list):
            raise TypeError(f"{dtype!r}, {shape!r}")
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, end)):
            raise ValueError("expected whole numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise TameError(
            f"{where}: the header's entry {name!r} is not {{dtype, shape, data_offsets}} ({line(error)}); download it again"
        ) from error
    if dtype not in ITEMSIZE:
        raise TameError(f"{where}: {name} has dtype {dtype}; expected one of {', '.join(ITEMSIZE)}")
    expected = math.prod(shape) * ITEMSIZE[dtype]
    if end - start != expected:
        raise TameError(
            f"{where}: {name} {dtype} {shape} needs {expected} bytes, the header gives it {end - start}; download it again"
        )
    return Stored(name, dtype, tuple(shape), file, start, end)


def carried_files(folder: Path, names: list[str] | None = None, code: bool = False) -> list[str]:
    """What a checkpoint takes along besides weights and config: tokenizer, templates, processors, licences; no README.

    `names` limits it to files that are known; `code` adds Python files, for models that are allowed to bring theirs.
    """
    patterns = CARRIED + CODE if code else CARRIED
    found = [p.relative_to(folder).as_posix() for p in (*folder.iterdir(), *folder.glob("additional_chat_templates/*"))]
    parts = [
        path.relative_to(folder).as_posix()
        for path in (folder.glob(f"{MODULE}/*") if (folder / "modules.json").is_file() else ())
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in MODULE_FILES)
    ]
    return sorted(part for part in parts if names is None or part in names) + sorted(
        name
        for name in found
        if (folder / name).is_file()
        and (names is None or name in names)
        and not name.endswith(WEIGHT_SUFFIXES)
        and any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in patterns)
    )


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, unless it is a link that leaves the folder (for the Hub's cache: the repo's cache folder)."""
    path = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.exists():
        raise TameError(f"{path}: missing, though {INDEX} names it; download the model again")
    if not path.resolve().is_relative_to(root):
        raise TameError(f"{path}: a link that leads out of the folder, to {path.resolve()}; put the file itself there")
    return path


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise TameError(f"{path}: {error.strerror}; download the model again") from error
    except (ValueError, RecursionError) as error:
        raise TameError(f"{path}: not valid JSON ({line(error)}); download the model again") from error


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused when a key comes twice: Python would silently keep the last one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return result
