"""From a source to a snapshot: a folder of files whose content is known.

A source is a Hub repo, a local folder, or a .gguf file. Only what a release needs is taken: the weights that transformers
would load, configuration, tokenizer, licence.
"""

import fnmatch
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.states import Completed, State
from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, CorruptedError, TameError, UnreachableError, line
from configs.schema import Source
from tasks.download import hub
from tasks.download.checkpoint import INDEX, WEIGHTS, check_source, read_header, refuse_quantized, weight_files
from tasks.download.gguf import check_gguf
from tasks.download.gguf_convert import dequantize
from tasks.download.gguf_parts import as_one, model_name, part_paths, read_parts
from tasks.runtime.child_process import isolated
from tasks.runtime.device import versions
from tasks.runtime.progress import Progress, show
from tasks.store import artifacts as store
from tasks.store import remote_store
from tasks.store.digests import sha256_file, sha256_files
from tasks.values import Snapshot

log = logging.getLogger("tame.download")

OTHERS = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt", "additional_chat_templates/*.jinja",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*",
)  # fmt: skip
NEVER = ("*.safetensors.index.json", "*.bin.index.json", "trainer_state.json", "training_args*", "tame.json")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Found(BaseModel):
    """What a look at a source told, before anything is downloaded."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: str | None
    """The local folder or file; for a Hub repo, the cached folder if there is a complete one."""
    commit: str | None
    files: dict[str, int]
    """Size in bytes of each file that will be taken."""
    config: dict[str, Any]
    licence: str | None = None
    card: dict[str, Any] = {}
    gated: bool = False
    sha256: dict[str, str] = {}
    """What the Hub says of its large files."""

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(self.files.values())


def look(source: Source, quantized: bool = False) -> Found:
    """See whether `source` can be used, without downloading more than its config.json.

    `quantized` admits checkpoints that are quantized already: they can be measured, if not quantized again.

    Raises:
        BadInputError: it does not exist, may not be read, has no config.json or safetensors, carries code, or is
            already quantized.
        TameError: the Hub cannot be reached and nothing complete is cached.
    """
    path = local_path(source.model)
    if path is None:
        return _look_hub(source, quantized)
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInputError(f"source.model {source.model}: not a .gguf file; give a folder, a .gguf or a Hub repo")
        check_gguf(as_one(read_parts(path)))
        return Found(
            kind="gguf",
            name=model_name(path),
            path=str(path),
            commit=None,
            files={part.name: part.stat().st_size for part in part_paths(path)},
            config={},
        )
    names = [
        p.relative_to(path).as_posix()
        for p in path.rglob("*")
        if not p.is_dir() and p.relative_to(path).parts[0] != ".git"
    ]
    config = _read_json(path / "config.json") if "config.json" in names else None
    taken = select(source, names, config, _read_json(path / INDEX) if INDEX in names else None)
    _check(path, quantized)
    files = {name: (path / name).stat().st_size for name in taken}
    name = path.resolve().name
    return Found(kind="folder", name=name, path=str(path), commit=None, files=files, config=config or {})


def download(source: Source, *, quantized: bool = False, progress: Progress = show) -> Snapshot:
    """Bring `source` onto this disk, and know the sha256 of every file of it. `quantized` as in `look`.

    A Hub repo goes into the Hub client's own cache (HF_HOME), resumed where a killed run left it, and its large files are
    compared with the sha256 that the Hub names. With TAME_STORE, one machine does so and the others fetch from it.
    A .gguf is dequantized to bf16 safetensors, once, in the artifact store.

    Raises:
        BadInputError: as `look`.
        TameError: a download that does not match its digest, a damaged .gguf, no space.
    """
    found = look(source, quantized)
    if found.kind == "gguf":
        return _dequantized(source, Path(str(found.path)), progress)
    if found.kind == "folder":
        folder, cached = Path(str(found.path)), True
    else:
        folder, cached = _fetch(source, found, progress)
    files = sha256_files(folder, sorted(found.files))
    if found.kind == "hub":
        _compare(source.model, folder, files, found.sha256)
        _check(folder, quantized)
    return Snapshot(
        path=str(folder),
        model=source.model,
        name=found.name,
        revision=source.revision if found.kind == "hub" else None,
        commit=found.commit,
        files=files,
        digest=store.digest_of(files),
        trust_remote_code=source.trust_remote_code,
        cached=cached,
    )


def tokenizer_folder(source: Source, found: Found) -> Path | None:
    """A folder with the configuration and tokenizer of `source`, fetched from the Hub if they are not here.

    None for a .gguf that has not been dequantized yet.
    """
    if found.kind == "gguf":
        artifact = store.find("dequantized", _dequantized_inputs(Path(str(found.path))))
        return Path(artifact.path) if artifact else None
    if found.path is not None:
        return Path(found.path)
    small = [name for name in found.files if not name.endswith(".safetensors")]
    return hub.fetch_files(source.model, str(found.commit), small)


def local_path(model: str) -> Path | None:
    """The folder or file that `model` names on this disk, or None if it can only be a Hub repo.

    Raises:
        BadInputError: it looks like a path, and nothing is there; or a package that is not installed.
    """
    if model.startswith("package:"):
        package, _, inside = model.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / inside).exists():
                return path
        raise BadInputError(
            f"source.model {model}: "
            + (
                f"no {inside} in that package"
                if spec
                else f"the package {package} is not installed; `make demo` installs the demo's"
            )
        )
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or not hub.REPO_ID.fullmatch(model):
        raise BadInputError(f"source.model {model}: no such folder or file, and not a Hub repo id (owner/name)")
    return None


def select(source: Source, names: list[str], config: dict[str, Any] | None, index: dict[str, Any] | None) -> list[str]:
    """Of the files `names` of a repo or folder, those that a release needs.

    Raises:
        BadInputError: no config.json, no safetensors, pickled weights alone, code, or an index that climbs out.
    """
    model = source.model
    if config is None:
        raise BadInputError(
            f"source.model {model}: it has no config.json; give a folder or repo that transformers can load"
        )
    top = [name for name in names if "/" not in name]
    if not source.trust_remote_code:
        code = [name for name in top if name.endswith(".py")]
        if code or "auto_map" in config:
            what = code[0] if code else "an auto_map in config.json"
            raise BadInputError(
                f"source.model {model}: it carries code ({what}), and tame runs no code from models; read it, and set "
                "source.trust_remote_code: true if you trust it"
            )
    if WEIGHTS in names:  # transformers looks for it first
        weights = [WEIGHTS]
    elif index is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise BadInputError(f"source.model {model}: {INDEX} has no usable weight_map")
        weights = sorted(set(shards.values()))
        if outside := [name for name in weights if name.startswith("/") or ".." in name.split("/")]:
            raise BadInputError(f"source.model {model}: {INDEX} names {outside[0]!r}, outside of the folder")
        if missing := [name for name in weights if name not in names]:
            raise TameError(f"source.model {model}: {INDEX} names {missing[0]}, which is not there; download it again")
        weights.append(INDEX)
    else:
        pickled = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in PICKLED)]
        there = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no model.safetensors"
        raise BadInputError(f"source.model {model}: it has {there}; give one with safetensors")
    wanted = (*OTHERS, "*.py") if source.trust_remote_code else OTHERS
    others = [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in wanted)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in NEVER)
    ]
    return sorted({*weights, *others})


def _look_hub(source: Source, quantized: bool) -> Found:
    cached = hub.cached_commit(source.model, source.revision)
    try:
        info = hub.model_info(source.model, source.revision)
    except UnreachableError as error:
        if cached is None:
            raise UnreachableError(
                f"{source.model}: {error}, and no complete copy of it is cached; try again when it can be reached"
            ) from None
        log.info("%s: %s; using the cached commit %s", source.model, error, cached.commit[:12])
        names = cached.names
        config = _read_json(cached.folder / "config.json") if "config.json" in names else None
        taken = select(source, names, config, _read_json(cached.folder / INDEX) if INDEX in names else None)
        known = hub.remembered(source.model, cached.commit)
        return Found(
            kind="hub",
            name=source.model.rsplit("/", 1)[-1],
            path=str(cached.folder),
            commit=cached.commit,
            files={name: (cached.folder / name).stat().st_size for name in taken},
            config=config or {},
            **(known.model_dump(include={"licence", "card", "gated"}) if known else {}),
        )
    small = hub.fetch_json(source.model, info.commit, [n for n in ("config.json", INDEX) if n in info.files])
    config = small.get("config.json")
    taken = select(source, list(info.files), config, small.get(INDEX))
    if not quantized:
        refuse_quantized(config or {}, source.model)
    return Found(
        kind="hub",
        name=source.model.rsplit("/", 1)[-1],
        path=str(cached.folder)
        if cached and cached.commit == info.commit and set(taken) <= set(cached.names)
        else None,
        commit=info.commit,
        files={name: info.files[name] for name in taken},
        config=config or {},
        licence=info.licence,
        card=info.card,
        gated=info.gated,
        sha256={name: digest for name, digest in info.sha256.items() if name in taken},
    )


def _fetch(source: Source, found: Found, progress: Progress) -> tuple[Path, bool]:
    if found.path is not None:
        return Path(found.path), True
    store.need_space(hub.cache_folder(), found.bytes, f"download {source.model}")
    commit, names = str(found.commit), sorted(found.files)

    def from_hub() -> Path:
        return hub.fetch(source.model, source.revision, commit, names, found.bytes, progress)

    if remote_store.connect() is None:
        return from_hub(), False

    def make(folder: Path) -> store.Made:  # one machine downloads, the others fetch it from the shared store
        downloaded = from_hub()
        files = sha256_files(downloaded, names)
        _compare(source.model, downloaded, files, found.sha256)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (folder / name).hardlink_to((downloaded / name).resolve())
            except OSError:  # another disk
                shutil.copyfile(downloaded / name, folder / name)
        return store.Made(digests=files)

    inputs = {"model": source.model, "commit": commit, "files": names}
    artifact, cached = store.build("source", inputs, make)
    return Path(artifact.path), cached


def _check(folder: Path, quantized: bool) -> None:
    if not quantized:
        check_source(folder)
        return
    for name in weight_files(folder):
        read_header(folder / name, name)


def _compare(model: str, folder: Path, actual: dict[str, str], expected: dict[str, str]) -> None:
    for name, digest in expected.items():
        if actual[name] != digest:
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)
            raise CorruptedError(
                f"{model}: {name} arrived with sha256 {actual[name][:12]}…, but the Hub names {digest[:12]}…; removed it, run again"
            )


def _dequantized(source: Source, gguf: Path, progress: Progress) -> Snapshot:
    inputs = _dequantized_inputs(gguf)

    def make(folder: Path) -> store.Made:
        parts = part_paths(gguf)
        copies = 5 if len(parts) == 1 else 6  # four bits become 16; and parts are joined
        store.need_space(folder, copies * sum(part.stat().st_size for part in parts), f"dequantize {gguf.name}")
        notes = isolated(f"dequantize {gguf.name}", dequantize, gguf, folder, progress=progress)
        return store.Made(meta={"gguf": gguf.name, "notes": notes})

    artifact, cached = store.build("dequantized", inputs, make)
    for note in artifact.meta.get("notes", []):
        log.warning("%s", note)
    return Snapshot(
        path=artifact.path,
        model=source.model,
        name=model_name(gguf),
        revision=None,
        commit=None,
        files=artifact.files,
        digest=artifact.digest,
        cached=cached,
    )


def _dequantized_inputs(gguf: Path) -> dict[str, Any]:
    known = versions()
    return {
        "gguf": [sha256_file(part) for part in part_paths(gguf)],
        "stage": 2,  # what the file lacks is refused, and what transformers does not read of it is set or refused
        "versions": {name: known.get(name) for name in ("torch", "transformers", "safetensors", "tokenizers")},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: not readable as JSON ({line(error)}); download it again") from None
    if not isinstance(content, dict):
        raise BadInputError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


@task(name="download", task_run_name="download {source.model}", retries=3, retry_delay_seconds=[2, 10, 30],
      retry_condition_fn=hub.passes)  # fmt: skip
def download_task(source: Source) -> State[Snapshot]:
    """`download` in the flow; retried when the network or the Hub may do better next time."""
    snapshot = download(source)
    return Completed(name="Cached" if snapshot.cached else "Completed", data=snapshot)
