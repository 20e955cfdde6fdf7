"""The texts that models are measured and calibrated on: files, a data set of the Hub, or what is inside CPython."""

import ast
import functools
import hashlib
import json
import re
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError, line
from configs.schema import TextSource
from tasks.store import artifacts as store
from tasks.store import on_disk

ROW_SEPARATOR = "\n\n"  # how the papers that report WikiText perplexity join its rows
SLICE = re.compile(r"[\[(].*")
"""What may follow a split's name: test[:10%]."""
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "turtledemo",
    "lib2to3",
    "__phello__",
}
"""Folders of the standard library."""
COMMIT = re.compile(r"[0-9a-f]{40}")
CHATS = "calibration.text"
"""Where a data set's column may hold chats; they are read as a line of JSON each."""
CHARACTERS_PER_TOKEN = 32  # far more than any tokenizer makes of prose


class LoadedText(BaseModel):
    """A text, and what identifies it: the name for people, the sha256 of its UTF-8 bytes for keys."""

    model_config = ConfigDict(frozen=True)

    text: str
    name: str
    digest: str
    revision: str | None
    """The Hub commit of a data set."""


def load_text(spec: TextSource) -> LoadedText:
    """Read the text that `spec` names. Files and a data set's rows are joined by a blank line.

    Raises:
        BadInputError: a file, data set, split or column that is not there, a file that is not UTF-8, or no text at all.
        TameError: the Hub cannot be reached and the data set is not cached.
    """
    revision = None
    if spec.files is not None:
        text = ROW_SEPARATOR.join(_read(Path(name).expanduser(), spec.KEY) for name in spec.files)
        name = " + ".join(Path(name).name for name in spec.files[:3]) + (" + …" if len(spec.files) > 3 else "")
    elif spec.builtin not in (None, "python-docs"):
        text, name = _kept_python_library(), "python-library"
    elif spec.builtin is not None:
        from pydoc_data.topics import topics

        text, name = ROW_SEPARATOR.join(topics[key] for key in sorted(topics)), spec.builtin
    else:
        text, revision = _read_dataset(spec)
        name = " ".join([str(spec.dataset), *([spec.config] if spec.config else []), spec.split])
    if not text.strip():
        raise BadInputError(f"{spec.KEY} {name}: there is no text in it; give one with words")
    return LoadedText(text=text, name=name, digest=hashlib.sha256(text.encode()).hexdigest(), revision=revision)


def check_text(text: LoadedText, window: int, tokenizer_folder: Path, trust_remote_code: bool = False) -> int:
    """Count tokens until `window` of them are certain: what was counted, at least `window`.

    transformers is imported only for a tokenizer that is not in a tokenizer.json.

    Raises:
        BadInputError: the text is shorter than one window, the window longer than the model's positions, or there is no
            tokenizer.
    """
    if (positions := max_positions(tokenizer_folder)) is not None and window > positions:
        raise BadInputError(f"evaluate.window {window}: the model takes {positions} tokens at most; lower it")
    start = text.text[: window * CHARACTERS_PER_TOKEN]
    count = _count(start, tokenizer_folder, trust_remote_code)
    if count < window and len(start) < len(text.text):
        count = _count(text.text, tokenizer_folder, trust_remote_code)
    if count < window:
        raise BadInputError(
            f"evaluate.text {text.name}: {count} tokens, less than one window of {window}; lower evaluate.window or give more text"
        )
    return count


def max_positions(folder: Path) -> int | None:
    """How many positions the model of config.json was made for, if it says so."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    config = config.get("text_config") or config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    return None


def _count(text: str, folder: Path, trust_remote_code: bool) -> int:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_truncation()  # some are saved with it; transformers switches it off, too
            tokenizer.no_padding()
            return len(tokenizer.encode(text).ids)
        except Exception as error:
            raise BadInputError(
                f"{folder / 'tokenizer.json'}: not a tokenizer ({line(error)}); download it again"
            ) from None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        count = len(tokenizer(text)["input_ids"])
    except Exception as error:
        raise BadInputError(f"{folder}: no tokenizer that loads ({line(error)}); add its tokenizer files") from None
    check_loaded_tokenizer(tokenizer, folder)
    return count


def check_loaded_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Check that a loaded tokenizer has words. For a folder without one, transformers makes an empty one and says nothing.

    Raises:
        BadInputError: the tokenizer has no tokens but special ones.
    """
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) < 2:
        raise BadInputError(f"{folder}: there is no tokenizer in it; add the model's tokenizer files")


def _read(path: Path, key: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"{key}.files {path}: {error.strerror}; give a readable UTF-8 file") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise BadInputError(
            f"{key}.files {path}: byte {byte:#04x} at offset {error.start} is not UTF-8; convert the file to UTF-8"
        ) from None


def is_chat(row: Any) -> bool:
    """Whether a row is a chat: a list of messages, each with the role and the content of one turn."""
    turns = row if isinstance(row, list) else []
    return bool(turns) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)


def _kept_python_library() -> str:
    """`python_library`, kept in the store: reading the whole library takes 10 s."""

    def make(folder: Path) -> on_disk.Made:
        (folder / "text.txt").write_bytes(python_library().encode(errors="replace"))
        return on_disk.Made()

    inputs = {"builtin": "python-library", "python": sys.version, "root": sysconfig.get_paths()["stdlib"], "stage": 1}
    artifact, _ = store.build("text", inputs, make, shared=False)
    return (Path(artifact.path) / "text.txt").read_bytes().decode()


def python_library() -> str:
    """What Python's standard library says of itself, and as much of its code: a module's docstrings, then its first lines.

    Tests are left out, and the reference text that `python-docs` is.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            source = path.read_bytes().decode(errors="replace")
            try:
                nodes = list(ast.walk(ast.parse(source)))
            except (SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            prose = ROW_SEPARATOR.join(
                text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))
            )
            parts += [prose, source[: len(prose)]] if prose else []
    return ROW_SEPARATOR.join(parts)


def _read_dataset(spec: TextSource) -> tuple[str, str]:
    """The joined rows and the commit. Kept in the store, so that a run that is cached neither downloads nor reads rows."""
    commit = dataset_commit(str(spec.dataset), spec.revision)
    inputs = {**spec.model_dump(include={"dataset", "config", "split", "column"}), "commit": commit, "stage": 1}
    if spec.KEY == CHATS:
        inputs["chats"] = True

    def make(folder: Path) -> on_disk.Made:
        (folder / "text.txt").write_bytes(_rows(spec, commit).encode())
        return on_disk.Made()

    artifact, _ = store.build("text", {**inputs, "datasets": version("datasets")}, make)
    return (Path(artifact.path) / "text.txt").read_bytes().decode(), commit


def _rows(spec: TextSource, commit: str) -> str:
    import datasets

    datasets.disable_progress_bars()
    where = f"{spec.KEY}.dataset {spec.dataset}"
    try:
        files = datasets.load_dataset_builder(spec.dataset, spec.config, revision=commit).config.data_files or {}
        # `datasets` fetches all splits for one. Without the files of the others, it cannot: train may have 300 GB.
        names = {SLICE.sub("", part).strip() for part in spec.split.split("+")}
        wanted = {name: list(files[name]) for name in names} if names <= set(files) else None
        rows = datasets.load_dataset(
            spec.dataset,
            spec.config,
            split=spec.split,
            revision=commit,
            data_files=wanted,
            verification_mode="no_checks",
        )
    except (ValueError, FileNotFoundError) as error:  # an unknown configuration or split, or files that are not there
        raise BadInputError(f"{where}: {line(error)}") from None
    except Exception as error:
        raise TameError(
            f"{where}: {type(error).__name__}: {line(error)}; try again when the Hub can be reached"
        ) from None
    if spec.column not in rows.column_names:
        raise BadInputError(f"{where}: no column {spec.column!r}; it has {', '.join(rows.column_names)}")
    texts = [text for text in rows[spec.column] if text is not None]
    if spec.KEY == CHATS and texts and all(map(is_chat, texts)):
        return "\n".join(json.dumps({"messages": chat}, ensure_ascii=False) for chat in texts)
    if other := next((text for text in texts if not isinstance(text, str)), None):
        raise BadInputError(
            f"{where}: column {spec.column!r} holds {type(other).__name__}, not text; name a text column"
        )
    return ROW_SEPARATOR.join(texts)


@functools.cache
def dataset_commit(dataset: str, revision: str) -> str:
    """The commit that `revision` of a Hub data set names now; without a network, the one that is cached for it.

    Raises:
        BadInputError: no such data set or revision.
        TameError: the Hub cannot be reached, and nothing is cached.
    """
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(dataset, revision=revision).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = "revision " + revision if isinstance(error, RevisionNotFoundError) else "data set"
        raise BadInputError(f"{dataset}: the Hub has no such {what}, or your HF_TOKEN may not see it") from None
    except Exception as error:
        ref = Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}" / "refs" / revision
        if ref.is_file():
            return ref.read_text().strip()
        raise TameError(
            f"data set {dataset}: the Hub cannot be reached ({line(error)}), and it is not cached"
        ) from None
