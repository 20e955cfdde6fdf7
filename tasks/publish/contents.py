"""What of a folder is published: what a checkpoint consists of, and nothing else that happens to lie beside it."""

import fnmatch
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import BadInputError, TameError, line
from tasks.download.checkpoint import CARRIED, WEIGHTS, read_header
from tasks.publish import provenance
from tasks.publish.repo import SIGNATURE

CHECKPOINT = (
    *CARRIED, "README.md", "config.json", "*_config.json", "params.json", "modules.json", "recipe.yaml",
    "*.safetensors.index.json",
)  # fmt: skip
IGNORED = (".git", ".cache", "__pycache__")
"""Folders in which nothing is looked at."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.(safetensors|gguf)")


class Contents(NamedTuple):
    """The files of a folder, by their paths in it: those of the checkpoint, and those that are not published."""

    published: list[str]
    left_out: list[str]


def contents(folder: Path) -> Contents:
    """What of `folder` makes the checkpoint: weights, configuration, tokenizer, licence, card, and what its tame.json names.

    Code is part of it where a configuration names it (`auto_map`). Pickles are not, nor is what tools leave behind.

    Raises:
        BadInputError: there is no such folder, or it holds no weights; a link leads nowhere; an index and the shards do not
            agree; a file of weights is damaged.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder}: no folder with .safetensors files; give the folder of a model")
    names = _names(folder)
    record = _recorded(folder)
    with_code = _names_code(folder, names)
    published = [name for name in names if name in record or _belongs(name, with_code)]
    weights = _weights(folder, names)
    if not weights:
        raise BadInputError(f"{folder}: no folder with .safetensors files; give the folder of a model")
    published = sorted({*published, *weights})
    return Contents(published, [name for name in names if name not in set(published)])


def summary(names: list[str]) -> str:
    """The names of files that are left out, with a folder as one name."""
    shown = list(dict.fromkeys(name if "/" not in name else name.split("/")[0] + "/" for name in names))
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _names(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part in IGNORED for part in name.split("/")):
            continue
        if path.is_symlink() and not path.exists():
            raise BadInputError(
                f"{path}: a link to {path.readlink()}, which is not there; put the file there, or remove it"
            )
        if path.is_file():
            names.append(name)
    return names


def _recorded(folder: Path) -> set[str]:
    """The names of all files that the tame.json of `folder` names; whether they are right is for its check to say."""
    if not (folder / provenance.NAME).is_file():
        return set()
    try:
        content = json.loads((folder / provenance.NAME).read_bytes())
        return {*content["artifact"]["files"], *content["documents"], provenance.NAME, SIGNATURE}
    except (ValueError, KeyError, TypeError):
        return {provenance.NAME}


def _belongs(name: str, with_code: bool) -> bool:
    if "/" in name:
        return fnmatch.fnmatchcase(name, "additional_chat_templates/*.jinja")
    if name.endswith(PICKLES):
        return False
    return (with_code and name.endswith(".py")) or any(fnmatch.fnmatchcase(name, pattern) for pattern in CHECKPOINT)


def _names_code(folder: Path, names: list[str]) -> bool:
    return any("auto_map" in _json(folder / name) for name in names if "/" not in name and name.endswith("config.json"))


def _weights(folder: Path, names: list[str]) -> set[str]:
    """The files with the weights, which are complete and well-formed."""
    top = [name for name in names if "/" not in name]
    indexed: dict[str, set[str]] = {}
    for index in (name for name in top if name.endswith(".safetensors.index.json")):
        for name, tensors in _index(folder / index).items():
            if name not in top:
                raise BadInputError(f"{folder}: {index} names {name}, which is not there; download the model again")
            indexed.setdefault(name, set()).update(tensors)
    if WEIGHTS in top and indexed.keys() - {WEIGHTS}:
        raise BadInputError(
            f"{folder}: holds {WEIGHTS} and {min(indexed.keys() - {WEIGHTS})}, which an index names: two checkpoints, of which "
            "one program reads the one and another the other; remove one"
        )
    weights = set(indexed) | {name for name in top if name.endswith(".gguf")}
    for name in (name for name in top if name.endswith(".safetensors") and name not in indexed):
        if SHARD.fullmatch(name):
            raise BadInputError(
                f"{folder}: {name} is a shard that no index names; remove it, or download the model again"
            )
        if name in (WEIGHTS, "adapter_model.safetensors") or not (indexed or WEIGHTS in top):
            weights.add(name)
    for name in sorted(weights):
        if name.endswith(".safetensors"):
            _check_file(folder / name, indexed.get(name, set()))
        elif found := SHARD.fullmatch(name):
            parts = [f"{found[1]}-{number:05d}-of-{found[2]}.gguf" for number in range(1, int(found[2]) + 1)]
            if missing := [part for part in parts if part not in top]:
                raise BadInputError(
                    f"{folder}: {name} has other parts, and {missing[0]} is not there; download it again"
                )
    return weights


def _index(path: Path) -> dict[str, set[str]]:
    """The tensors of each file that an index names."""
    weight_map = _json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInputError(f"{path}: no weight_map of tensor names to file names; download the model again")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, set()).add(tensor)
    return files


def _check_file(path: Path, expected: set[str]) -> None:
    try:
        found = read_header(path, path.name)
    except TameError as error:
        raise BadInputError(str(error)) from None
    if missing := sorted(expected - found.keys()):
        raise BadInputError(
            f"{path}: does not hold {missing[0]}, which the index places there; download the model again"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: not readable as JSON ({line(error)}); download it again") from None
    if not isinstance(content, dict):
        raise BadInputError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
