"""A look at a source, whatever kind it is, before anything is downloaded: from names, headers and config.json.

It imports neither Prefect nor torch, so that `tame plan` can refuse at once.
"""

import importlib.util
from pathlib import Path

from configs.errors import AdapterError, BadInputError
from configs.schema import Source
from tasks.download import hub
from tasks.download.adapter import base_of, explained, inspect_adapter, name_of
from tasks.download.folder import inspect_folder
from tasks.download.gguf_source import dequantized_before, inspect_gguf
from tasks.download.hub_source import inspect_hub
from tasks.values import Found, FoundAdapter


def inspect_source(source: Source, quantized: bool = False) -> Found:
    """See whether `source` can be used, without downloading more than its small files.

    `quantized` admits checkpoints that are quantized already: they can be measured, if not quantized again.

    Raises:
        BadInputError: it does not exist, may not be read, has no config.json or safetensors, cannot be loaded without its
            own code, is an adapter whose base is not known, or is already quantized.
        TameError: it is damaged; or the Hub cannot be reached and nothing complete is cached.
    """
    if source.adapter is not None:
        return _with(inspect_adapter(source.adapter, source.adapter_revision), source, quantized)
    try:
        return _inspect(source, quantized).model_copy(update={"quantized": quantized})
    except AdapterError:
        adapter = inspect_adapter(source.model, source.revision)
    try:
        return _with(adapter, source, quantized)
    except BadInputError as error:
        raise explained(adapter, error) from None


def _with(adapter: FoundAdapter, source: Source, quantized: bool) -> Found:
    """The base of an adapter, and the adapter beside it."""
    found = _inspect(base_of(source, adapter), quantized)
    if found.kind == "gguf":
        raise BadInputError(f"source.adapter {adapter.model}: a .gguf takes no adapter; give the base's safetensors")
    if found.config.get("quantization_config") or found.config.get("compression_config"):
        base = base_of(source, adapter).model
        raise BadInputError(
            f"source.adapter {adapter.model}: its base {base} is quantized; give the base in 16 or 32 bits"
        )
    return found.model_copy(update={"quantized": quantized, "adapter": adapter, "name": name_of(adapter, found)})


def _inspect(source: Source, quantized: bool) -> Found:
    path = local_path(source.model)
    if path is None:
        return inspect_hub(source, quantized)
    if path.is_dir():
        return inspect_folder(source, path, quantized)
    if path.suffix != ".gguf":
        raise BadInputError(f"source.model {source.model}: not a .gguf file; give a folder, a .gguf or a Hub repo")
    return inspect_gguf(path)


def local_path(model: str) -> Path | None:
    """The folder or file that `model` names on this disk, or None if it can only be a Hub repo.

    Raises:
        BadInputError: it looks like a path, and nothing is there; or a package that is not installed.
    """
    if model.startswith("package:"):
        return _inside_package(model)
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or not hub.REPO_ID.fullmatch(model):
        raise BadInputError(f"source.model {model}: no such folder or file, and not a Hub repo id (owner/name)")
    return None


def tokenizer_folder(source: Source, found: Found) -> Path | None:
    """A folder with the configuration and tokenizer of `source`, fetched from the Hub if they are not here.

    None for a .gguf that has not been dequantized yet.
    """
    if found.adapter is not None:
        source = base_of(source, found.adapter)
    if found.kind == "gguf":
        return dequantized_before(Path(str(found.path)))
    if found.path is not None:
        return Path(found.path)
    small = [name for name in found.files if not name.endswith(".safetensors")]
    return hub.fetch_files(source.model, str(found.commit), small)


def _inside_package(model: str) -> Path:
    """The path of `package:NAME/FILE`, which is not imported."""
    package, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / inside).exists():
            return path
    missing = f"no {inside} in that package" if spec else (
        f"the package {package} is not installed; `make demo` installs the demo's"
    )  # fmt: skip
    raise BadInputError(f"source.model {model}: {missing}")
