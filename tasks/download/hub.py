"""What tame asks of the Hugging Face Hub when it reads.

Everything goes through huggingface_hub, so HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean there.
"""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.errors import (
    AwayError,
    BadInputError,
    BusyError,
    ChangedError,
    CorruptedError,
    UnreachableError,
)
from configs.settings import home
from tasks.download.hub_client import endpoint, explained, quiet
from tasks.runtime.files import write_text
from tasks.runtime.progress import Progress
from tasks.runtime.retry import retry

REPO_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)


INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


class RepoInfo(BaseModel):
    """A model repo at one commit: size of each file, sha256 of the large ones, licence and gating from its card.

    Of several licences, `licence` has all, with commas.
    """

    model_config = ConfigDict(frozen=True)

    commit: str
    files: dict[str, int]
    sha256: dict[str, str]
    licence: str | None
    gated: bool
    card: dict[str, Any] = {}
    """What of its card's front matter a card of a model made from it inherits."""
    modified: datetime | None = None
    """When the commit was made."""


class CachedRepo(BaseModel):
    """A commit of a repo in the Hub client's cache, and the names of the files that are there."""

    model_config = ConfigDict(frozen=True)

    commit: str
    folder: Path
    names: list[str]


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: whether a failed task may do better if it is tried again."""
    try:
        state.result()
    except BaseException as error:
        return isinstance(error, UnreachableError | CorruptedError) and not isinstance(error, AwayError)
    return False


def model_info(repo: str, revision: str, pauses: tuple[float, ...] = (1.0, 4.0)) -> RepoInfo:
    """One request for all that is known of `repo` at `revision`; made again after `pauses` seconds while the Hub is busy."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        with explained(repo, revision):
            return HfApi(endpoint=endpoint()).model_info(repo, revision=revision, files_metadata=True)

    info = retry(ask, pauses, lambda error: isinstance(error, BusyError))
    siblings = info.siblings or []
    card: Any = info.card_data or {}
    licence = card.get("license") if hasattr(card, "get") else None
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    found = RepoInfo(
        commit=str(info.sha),
        files={sibling.rfilename: sibling.size or 0 for sibling in siblings},
        sha256={s.rfilename: s.lfs.sha256 for s in siblings if s.lfs is not None and s.lfs.sha256},
        licence=licence if isinstance(licence, str) else None,
        card={key: card.get(key) for key in INHERITED if hasattr(card, "get") and card.get(key)},
        gated=bool(info.gated),
        modified=info.last_modified,
    )
    if remembered(repo, found.commit) is None:
        write_text(_memory(repo, found.commit), found.model_dump_json())
    return found


def list_models(owner: str) -> dict[str, tuple[str, datetime | None]]:
    """The commit of each model repo of `owner` that the token may see, and when it was made: a request for some hundreds."""
    from huggingface_hub import HfApi

    with explained(owner, "main"):
        found = list(HfApi(endpoint=endpoint()).list_models(author=owner, expand=["sha", "lastModified"]))
    return {info.id: (str(info.sha), info.last_modified) for info in found}


def remembered(repo: str, commit: str) -> RepoInfo | None:
    """What `model_info` said of `commit` when it was last asked: licence and card are in no downloaded file."""
    try:
        return RepoInfo.model_validate_json(_memory(repo, commit).read_bytes())
    except (OSError, ValueError):
        return None


def _memory(repo: str, commit: str) -> Path:
    return home() / "hub" / repo.replace("/", "--") / f"{commit}.json"


def fetch_json(repo: str, commit: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Small JSON files of a repo, through the Hub client's cache."""
    read: dict[str, dict[str, Any]] = {}
    for name in names:
        path = fetch_files(repo, commit, [name]) / name
        try:
            read[name] = json.loads(path.read_bytes())
        except ValueError as error:
            raise BadInputError(f"{repo}: {name} is not JSON ({error}); the repo is damaged") from None
    return read


def tensor_names(repo: str, commit: str, file: str) -> list[str] | None:
    """The names of the tensors in a safetensors file of a repo, from its header alone; None where that is not readable."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        with explained(repo, commit):
            return list(HfApi(endpoint=endpoint()).parse_safetensors_file_metadata(repo, file, revision=commit).tensors)
    except SafetensorsParsingError:  # the download will tell
        return None


def fetch_files(repo: str, commit: str, names: list[str]) -> Path:
    """Small files of a repo, through the Hub client's cache; the folder that they are in."""
    from huggingface_hub import hf_hub_download

    folder = Path()
    with explained(repo, commit), quiet():
        for name in names:
            path = Path(hf_hub_download(repo, name, revision=commit, endpoint=endpoint()))
            folder = path.parents[name.count("/")]
    return folder


def fetch(repo: str, revision: str, commit: str, names: list[str], size: int, progress: Progress) -> Path:
    """Download `names` into the Hub client's cache, resuming what is there, and return the folder of `commit`.

    Asked for by `revision`, so that the client remembers which commit that was when the Hub cannot be reached.

    Raises:
        ChangedError: `revision` is no longer `commit`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    what = f"download {repo}"

    class Bar(tqdm):
        """Tells `progress` what the Hub client tells its own bar."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.seen = 0.0

        def update(self, n: float | None = 1) -> None:
            self.seen += n or 0
            if self.counts_bytes:
                progress(what, min(int(self.seen), size - 1), size)

    with explained(repo, commit), quiet():
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=names, tqdm_class=Bar, max_workers=4, endpoint=endpoint()
        )
    progress(what, size, size)
    if Path(folder).name != commit:
        raise ChangedError(f"{repo}: {revision} moved to {Path(folder).name[:12]} during the download; run again")
    return Path(folder)


def cache_folder() -> Path:
    """Where the Hub client keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_commit(repo: str, revision: str) -> CachedRepo | None:
    """The commit that `revision` was when it was last seen, if its folder is in the cache."""
    from huggingface_hub.file_download import repo_folder_name

    base = cache_folder() / repo_folder_name(repo_id=repo, repo_type="model")
    ref = base / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = base / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not folder.is_dir():
        return None
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return CachedRepo(commit=commit, folder=folder, names=sorted(names))
