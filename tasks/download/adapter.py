"""A LoRA adapter beside its base: looked at without its weights, fetched, and merged once, in the artifact store."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, line
from configs.schema import Source
from tasks.download import hub
from tasks.download.adapter_merge import CONFIG, TOKENIZER, WEIGHTS, check_config, merge
from tasks.download.folder import read_json
from tasks.runtime.child_process import isolated
from tasks.runtime.progress import Progress
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.store.digests import sha256_files
from tasks.values import AdapterOf, Found, FoundAdapter, Snapshot

STAGE = 1  # raise it when the bytes of a merged model change


def inspect_adapter(model: str, revision: str) -> FoundAdapter:
    """What an adapter is, and of which base, from its small files. `model` is a Hub repo or a folder.

    Raises:
        BadInputError: it is none, or of a kind that tame cannot merge.
        TameError: the Hub does not answer.
    """
    where, path = f"source.adapter {model}", Path(model).expanduser()
    if path.is_dir():
        names = {p.name: p.stat().st_size for p in path.iterdir() if p.is_file()}
        commit, sha256 = None, {}
        if CONFIG not in names:
            raise BadInputError(f"{where}: it has no {CONFIG}, so it is no adapter; give the folder of one")
        config = read_json(path / CONFIG)
    else:
        if model.startswith((".", "/", "~")) or not hub.REPO_ID.fullmatch(model):
            raise BadInputError(f"{where}: no such folder, and not a Hub repo id (owner/name)")
        info = hub.model_info(model, revision)
        names, commit, sha256 = info.files, info.commit, info.sha256
        if CONFIG not in names:
            raise BadInputError(f"{where}: it has no {CONFIG}, so it is no adapter; give the repo of one")
        config = hub.fetch_json(model, commit, [CONFIG])[CONFIG]
    if WEIGHTS not in names:
        raise BadInputError(f"{where}: it has no {WEIGHTS}; save the adapter as safetensors")
    check_config(config, where)
    taken = [name for name in names if name in (CONFIG, WEIGHTS) or any(Path(name).match(p) for p in TOKENIZER)]
    base = config.get("base_model_name_or_path")
    return FoundAdapter(
        model=model,
        path=str(path) if path.is_dir() else None,
        commit=commit,
        revision=revision,
        files={name: names[name] for name in sorted(taken) if "/" not in name},
        sha256={name: digest for name, digest in sha256.items() if name in taken},
        base=base if isinstance(base, str) and base else None,
        base_revision=config.get("revision") or "main",
    )


def base_of(source: Source, adapter: FoundAdapter) -> Source:
    """The base of an adapter as a source: what the recipe says, or, where it names the adapter alone, what that says.

    Raises:
        BadInputError: nobody says it.
    """
    if source.adapter is not None:
        return source.model_copy(update={"adapter": None})
    if adapter.base is None:
        raise BadInputError(
            f"source.model {adapter.model}: it is an adapter, and its {CONFIG} does not name its base; give the base as "
            "source.model, and this as source.adapter"
        )
    return source.model_copy(update={"model": adapter.base, "revision": adapter.base_revision})


def explained(adapter: FoundAdapter, error: BadInputError) -> BadInputError:
    """An error about the base of an adapter that was found by itself, with the way out."""
    return BadInputError(
        f"source.model {adapter.model}: it is an adapter of {adapter.base}, which cannot be used ({line(error)}); give its base "
        "in 16 or 32 bits as source.model, and this as source.adapter"
    )


def merged(base: Snapshot, adapter: FoundAdapter, name: str, progress: Progress) -> Snapshot:
    """The base with the adapter merged: from the store, or made now. Its key covers both digests.

    Raises:
        BadInputError: the adapter does not fit the base.
        TameError: a file that is not what the Hub says, no space.
    """
    names = sorted(adapter.files)
    folder = Path(adapter.path) if adapter.path else hub.fetch_files(adapter.model, str(adapter.commit), names)
    files = sha256_files(folder, names)
    digest = on_disk.digest_of(files)

    def make(target: Path) -> on_disk.Made:
        size = sum((Path(base.path) / file).stat().st_size for file in base.files)
        on_disk.need_space(target, size, f"merge {adapter.model}")
        carried = [file for file in base.files if not file.endswith(".safetensors")]
        isolated(f"merge {adapter.model}", merge, Path(base.path), folder, target, carried, progress=progress)
        return on_disk.Made()

    inputs: dict[str, Any] = {"base": base.digest, "adapter": digest, "stage": STAGE, "torch": version("torch")}
    artifact, cached = store.build("merged", inputs, make)
    return base.model_copy(
        update={
            "path": artifact.path,
            "name": name,
            "files": artifact.files,
            "digest": artifact.digest,
            "adapter": AdapterOf(model=adapter.model, commit=adapter.commit, digest=digest),
            "cached": cached,
        }
    )


def name_of(adapter: FoundAdapter, found: Found) -> str:
    """What the merged model is called: as the adapter."""
    return Path(adapter.model).name or found.name
