"""Publishing into a folder: the same files as on the Hub, complete or not at all."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from configs.errors import BadInputError, TameError
from configs.schema import Publish, Recipe
from tasks.publish import folder
from tasks.publish.preflight import preflight
from tasks.publish.repo import Wanted
from tasks.publish.task import check, publish
from tasks.runtime.progress import silent
from tasks.store.digests import sha256_files
from tasks.values import Published
from tests.hub import Hub
from tests.test_publish import documents, files, found

FOLDER = Publish(to="folder", repo="{model}-{variant}")


@pytest.fixture
def artifact(tmp_path: Path, tame_home: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "more").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(2_500_000))
    (folder / "more" / "LICENSE").write_text("Do as you like.\n")
    return folder


def put(artifact: Path, target: Path, extra: dict[str, bytes] | None = None) -> Published:
    extra = documents(artifact) if extra is None else extra
    return publish(artifact, files(artifact), extra, str(target), FOLDER, progress=silent)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_gets_what_the_hub_would_get(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out" / "tiny-nf4"
    done = put(artifact, target)
    assert (done.url, done.commit, done.visibility, done.already) == (str(target), None, "local", False)
    assert content(target) == content(artifact) | documents(artifact)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        publish(artifact, files(artifact), documents(artifact), "me/tiny", Publish(to="hub", repo="me/tiny"))
        remote = {name: hub.read("me/tiny", name) for name in hub.model("me/tiny").files() if name != ".gitattributes"}
    assert remote == content(target)
    assert not (target / "model.safetensors").samefile(artifact / "model.safetensors")


def test_the_same_again_touches_nothing(artifact: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny-nf4"
    put(artifact, target)
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(target.rglob("*"))]
    assert put(artifact, target).already
    assert put(artifact, target, documents(artifact, run="second")).already
    assert [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(target.rglob("*"))] == before
    changed = documents(artifact, "# Another card\n", limit=0.2)
    assert put(artifact, target, changed).uploaded == ["README.md", "tame.json"]
    assert content(target) == content(artifact) | changed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "tame-home", "tiny-nf4"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed"])
def test_a_new_release_takes_the_place_of_the_old(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a file system without RENAME_EXCHANGE
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    target = tmp_path / "tiny-nf4"
    put(artifact, target)
    (artifact / "model.safetensors").rename(artifact / "other.safetensors")
    put(artifact, target)
    assert content(target) == content(artifact) | documents(artifact)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "tame-home", "tiny-nf4"]


def test_what_fails_leaves_what_was_there(artifact: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny-nf4"
    put(artifact, target)
    before = content(target)
    wrong = Wanted(size=16, sha256="0" * 64, path=str(artifact / "more" / "LICENSE"))
    with pytest.raises(TameError, match="more/LICENSE is not the file that was measured"):
        folder.put({"more/LICENSE": wrong}, documents(artifact, limit=0.2), target, None, silent)
    assert content(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "tame-home", "tiny-nf4"]


def test_files_of_others_are_left_alone(artifact: Path, tmp_path: Path) -> None:
    target = tmp_path / "papers"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(TameError, match="papers: holds files that tame did not put there"):
        put(artifact, target)
    assert content(target) == {"thesis.txt": b"years of work"}
    (target / "thesis.txt").unlink()
    assert not put(artifact, target).already


@pytest.mark.parametrize("there", ["empty", "missing", "release"])
def test_a_link_is_followed_and_stays(artifact: Path, tmp_path: Path, there: str) -> None:
    target, link = tmp_path / "disk" / "tiny-nf4", tmp_path / "link"
    target.parent.mkdir()
    if there == "empty":
        target.mkdir()
    if there == "release":
        put(artifact, target, documents(artifact, limit=0.3))
    link.symlink_to(target)
    assert put(artifact, link).url == str(link)
    assert link.readlink() == target
    assert content(target) == content(artifact) | documents(artifact)
    assert put(artifact, link).already
    assert [path.name for path in target.parent.iterdir()] == ["tiny-nf4"]


def test_preflight_of_a_folder(tmp_path: Path, tame_home: Path) -> None:
    recipe = Recipe.model_validate(
        {"name": "r", "source": {"model": "org/m"}, "variants": [{"method": "nf4"}], "publish": {"to": "folder"}}
    )

    def look(target: Path, size: int = 0) -> list[str]:
        return preflight(recipe, {"nf4": str(target)}, found(None, False, size))

    assert look(tmp_path / "new" / "deep") == []
    (tmp_path / "taken").mkdir()
    assert look(tmp_path / "taken") == []
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInputError, match="taken holds files that tame did not put there"):
        look(tmp_path / "taken")
    with pytest.raises(TameError, match=r"thesis\.txt is a file"):
        look(tmp_path / "taken" / "thesis.txt" / "x")
    with pytest.raises(TameError, match="GB free; 1 variants need"):
        look(tmp_path / "new", 10**18)
    assert not (tmp_path / "new").exists()


def test_a_check_of_a_folder_and_its_source(artifact: Path, tmp_path: Path) -> None:
    target, source = tmp_path / "tiny-nf4", tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"the weights it was made from")
    extra = documents(artifact)
    told = json.loads(extra["tame.json"])
    told["source"]["files"] = sha256_files(source, ["model.safetensors"])
    put(artifact, target, {**extra, "tame.json": json.dumps(told).encode()})
    assert check(str(target), str(source), silent) == []
    (source / "model.safetensors").write_bytes(b"other weights")
    assert check(str(target), str(source), silent) == [
        f"source {source}: model.safetensors is not the file that was quantized"
    ]
    (target / "model.safetensors").write_bytes(b"!")
    (target / "more" / "LICENSE").unlink()
    found = check(str(target), None, silent)
    assert [line.split(",")[0].split(":")[0] for line in found] == [
        "model.safetensors was changed",
        "more/LICENSE is missing",
    ]
