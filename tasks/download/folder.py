"""A local folder as a source; and which files of a folder or repo a release takes, and what is refused by their names alone."""

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import yaml

from configs.errors import AdapterError, BadInputError, TameError, line
from configs.schema import Source
from tasks.download.architectures import check_language_model, is_native
from tasks.download.checkpoint import (
    INDEX,
    MODULE,
    MODULE_FILES,
    WEIGHTS,
    read_config,
    read_header,
    read_tensors,
    top_tensors,
    weight_files,
)
from tasks.download.hub import INHERITED
from tasks.values import Found

OTHERS = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt", "additional_chat_templates/*.jinja",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*",
)  # fmt: skip
MODULES = tuple(f"{MODULE}/{pattern}" for pattern in MODULE_FILES)
NEVER = ("*.safetensors.index.json", "*.bin.index.json", "trainer_state.json", "training_args*", "tame.json")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
ADAPTER, TOKENIZER = "adapter_config.json", "tokenizer_config.json"
SMALL = ("config.json", INDEX, TOKENIZER, ADAPTER)
"""The files that are read to decide which of the others are taken."""


def inspect_folder(source: Source, path: Path, quantized: bool) -> Found:
    """What a local folder holds. `quantized` admits a checkpoint that is quantized already.

    Raises:
        BadInputError, TameError: as `tasks.download.inspection.inspect_source`.
    """
    names = [
        p.relative_to(path).as_posix()
        for p in path.rglob("*")
        if not p.is_dir() and p.relative_to(path).parts[0] != ".git"
    ]
    small = {name: read_json(path / name) for name in SMALL if name in names}
    taken = select(source, names, small)
    tensors = check_weights(path, quantized)
    return Found(
        kind="folder",
        name=path.resolve().name,
        path=str(path),
        commit=None,
        files={name: (path / name).stat().st_size for name in taken},
        config=small["config.json"],
        top_tensors=top_tensors(tensors),
        **_own_card(path / "README.md"),
    )


def _own_card(readme: Path) -> dict[str, Any]:
    """The licence, and what a card inherits, of a local model's README.md; nothing where it has none, or no front matter."""
    try:
        found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", readme.read_text(encoding="utf-8"), re.DOTALL)
        front = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(front, dict):
        return {}
    card = {key: front[key] for key in (*INHERITED, "base_model") if front.get(key)}
    licence = card.get("license")
    return {"card": card, "licence": licence if isinstance(licence, str) else None}


def check_weights(folder: Path, quantized: bool) -> list[str]:
    """The names of the tensors in `folder`, once its headers are found to be whole.

    Raises:
        BadInputError: the model is quantized already, and `quantized` is False.
        TameError: a file is damaged, or the index and the files disagree.
    """
    if not quantized:
        read_config(folder)
        return list(read_tensors(folder))
    return [tensor for name in weight_files(folder) for tensor in read_header(folder / name, name)]


def select(source: Source, names: list[str], small: dict[str, dict[str, Any]]) -> list[str]:
    """Of the files `names` of a repo or folder, those that a release needs. `small` are the contents of those in SMALL.

    Raises:
        BadInputError: no config.json, no safetensors, pickled weights alone, code that is needed, or an index that climbs out.
    """
    where, config = f"source.model {source.model}", small.get("config.json")
    if config is None:
        if ADAPTER in names:
            raise AdapterError(_adapter(where, small))
        if files := [name for name in names if name.endswith(".gguf")]:
            raise BadInputError(
                f"{where}: it holds {files[0]} and no config.json; download that file, and give its path"
            )
        raise BadInputError(f"{where}: it has no config.json; give a folder or repo that transformers can load")
    if not source.trust_remote_code:
        _refuse_code(where, names, config, small.get(TOKENIZER, {}))
    weights = _weights(where, names, small)
    wanted = (*OTHERS, "*.py") if source.trust_remote_code else OTHERS
    if "modules.json" in names:
        wanted = (*wanted, *MODULES)
        _refuse_pickled_modules(where, names)
    others = [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in wanted)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in NEVER)
    ]
    return sorted({*weights, *others})


def check_measurable(found: Found, where: str, trust_remote_code: bool) -> None:
    """Check that a model can be measured, before it is downloaded; of a .gguf only its header tells, when it is read.

    Raises:
        BadInputError: it is no causal language model, or has no tokenizer.
    """
    if found.kind != "gguf":
        check_language_model(found.config, found.files, found.top_tensors, where, trust_remote_code)
        check_tokenizer_files(found, where)


def check_tokenizer_files(found: Found, where: str) -> None:
    """Check that a source has the files of a tokenizer. Without them, transformers makes an empty one and says nothing.

    Raises:
        BadInputError: the source has no tokenizer file.
    """
    if found.kind == "gguf" or any(name.endswith(".py") for name in found.files):
        return
    if not any(fnmatch.fnmatchcase(name, pattern) for name in found.files for pattern in VOCABULARIES):
        raise BadInputError(
            f"{where}: it has no tokenizer (none of {', '.join(VOCABULARIES)}), so no text can be measured with it; add the "
            "tokenizer files of the model that it was made from"
        )


def _refuse_pickled_modules(where: str, names: list[str]) -> None:
    """Refuse an embedding model of which a part beside the model has weights that are not taken.

    Raises:
        BadInputError: a part has pickled weights alone.
    """
    for name in names:
        part, _, file = name.partition("/")
        pickled = fnmatch.fnmatchcase(part, MODULE) and any(fnmatch.fnmatchcase(file, pattern) for pattern in PICKLED)
        if pickled and f"{part}/{WEIGHTS}" not in names:
            raise BadInputError(
                f"{where}: {name} is pickled, which can run code, and {part} has no {WEIGHTS}; save the model again with "
                "sentence-transformers, which writes one"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        BadInputError: the file holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: not readable as JSON ({line(error)}); download it again") from None
    if not isinstance(content, dict):
        raise BadInputError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _weights(where: str, names: list[str], small: dict[str, dict[str, Any]]) -> list[str]:
    """The files with weights that transformers would load, and their index."""
    if WEIGHTS in names:  # transformers looks for it first
        return [WEIGHTS]
    if (index := small.get(INDEX)) is None:
        if ADAPTER in names:
            raise AdapterError(_adapter(where, small))
        raise BadInputError(_no_weights(where, names, small))
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise BadInputError(f"{where}: {INDEX} has no usable weight_map")
    weights = sorted(set(shards.values()))
    if outside := [name for name in weights if name.startswith("/") or ".." in name.split("/")]:
        raise BadInputError(f"{where}: {INDEX} names {outside[0]!r}, outside of the folder")
    if missing := [name for name in weights if name not in names]:
        raise TameError(f"{where}: {INDEX} names {missing[0]}, which is not there; download it again")
    return [*weights, INDEX]


def _no_weights(where: str, names: list[str], small: dict[str, dict[str, Any]]) -> str:
    """Why a folder or repo has no weights that can be taken, and what to do about it."""
    top = [name for name in names if "/" not in name]
    variants = [match for name in top if (match := re.fullmatch(r"model\.(\w+)(?:-\d+-of-\d+)?\.safetensors", name))]
    if variants:
        return (
            f"{where}: it has {variants[0][0]}, which transformers loads with variant={variants[0][1]!r} alone, and no {WEIGHTS}; "
            f"load it so and save it again, or rename it to {WEIGHTS} if it is the only file"
        )
    if pickled := [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in PICKLED)]:
        return f"{where}: it has only pickled weights ({pickled[0]}), which can run code; give one with safetensors"
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    beside = f", but {others[0]}" if others else ""
    return f"{where}: it has no {WEIGHTS}{beside}; give one with safetensors under transformers' names"


def _adapter(where: str, small: dict[str, dict[str, Any]]) -> str:
    base = small.get(ADAPTER, {}).get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"{where}: it is an adapter{of} alone ({ADAPTER}), not a model; merge it into its base model "
        "(PEFT's merge_and_unload), and give the merged one"
    )


def _refuse_code(where: str, names: list[str], config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Refuse a model that cannot be loaded without code of its own. Other code in its folder is not taken, and harmless.

    Raises:
        BadInputError: the model needs code of its own.
    """
    what = "an auto_map in config.json" if "auto_map" in config and not is_native(config) else ""
    if not what and "auto_map" in tokenizer and "tokenizer.json" not in names:
        what = f"an auto_map in {TOKENIZER}"
    if what:
        code = [name for name in names if name.endswith(".py") and "/" not in name]
        raise BadInputError(
            f"{where}: it carries code ({code[0] if code else what}), and tame runs no code from models; read it, and set "
            "source.trust_remote_code: true if you trust it"
        )
