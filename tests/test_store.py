"""The artifact store: complete or absent, built once, verified, swept."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from configs.errors import TameError
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.store.digests import sha256_file


def writes(text: str, calls: list[str] | None = None):
    def make(folder: Path) -> on_disk.Made:
        if calls is not None:
            calls.append(text)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "a.txt").write_text(text)
        return on_disk.Made(meta={"text": text})

    return make


def test_an_artifact_is_built_once_and_found_again(tame_home: Path) -> None:
    calls: list[str] = []
    first, hit = store.build("kind", {"a": 1}, writes("x", calls))
    again, hit_again = store.build("kind", {"a": 1}, writes("x", calls))
    assert (hit, hit_again) == (False, True)
    assert calls == ["x"]
    assert again == first == store.find("kind", {"a": 1})
    assert Path(first.path, "sub/a.txt").read_text() == "x"
    assert first.meta == {"text": "x"}
    assert first.bytes == 1
    assert list(store.artifacts()) == [first]


def test_different_inputs_never_meet(tame_home: Path) -> None:
    keys = [store.build("kind", {"a": a}, writes("x"))[0].key for a in (1, "1", 1.5, True, None, [1], {"a": 1})]
    assert len(set(keys)) == len(keys)
    assert (
        len(
            {store.build("kind", {"a": 1}, writes("x"))[0].digest, store.build("kind", {"a": 2}, writes("x"))[0].digest}
        )
        == 1
    )


@pytest.mark.parametrize("damage", ["gone", "longer", "touched", "no manifest", "half a manifest"])
def test_a_damaged_artifact_is_made_again(tame_home: Path, damage: str) -> None:
    artifact, _ = store.build("kind", {}, writes("x"))
    file, manifest = Path(artifact.path, "sub/a.txt"), Path(artifact.path).parent / "manifest.json"
    if damage == "gone":
        file.unlink()
    elif damage == "longer":
        file.write_text("xx")
    elif damage == "touched":
        os.utime(file, ns=(1, 1))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:50])
    assert store.find("kind", {}) is None
    again, hit = store.build("kind", {}, writes("x"))
    assert not hit
    assert again.digest == artifact.digest
    assert file.read_text() == "x"


def test_a_failed_build_leaves_nothing(tame_home: Path) -> None:
    def make(folder: Path) -> on_disk.Made:
        (folder / "half").write_text("half")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        store.build("kind", {}, make)
    assert [p.name for p in (tame_home / "artifacts").iterdir()] == [".locks"]


def test_a_changed_byte_is_found_by_reading(tame_home: Path) -> None:
    artifact, _ = store.build("kind", {}, writes("x"))
    file = Path(artifact.path, "sub/a.txt")
    stat = file.stat()
    file.write_text("y")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.find("kind", {}) is not None  # size and time are what a hit is checked by
    [wrong] = store.verify(artifact)
    assert "sub/a.txt" in wrong
    removed, kept = store.prune(None)
    assert [a.key for a in removed] == [artifact.key]
    assert kept == []


def test_prune_keeps_what_was_used_lately(tame_home: Path) -> None:
    old, _ = store.build("kind", {"a": 1}, writes("x"))
    os.utime(Path(old.path).parent / "manifest.json", (0, 0))
    new, _ = store.build("kind", {"a": 2}, writes("x"))
    removed, kept = store.prune(1.0)
    assert ([a.key for a in removed], [a.key for a in kept]) == ([old.key], [new.key])
    assert not Path(old.path).exists()


def _build_slowly(log: str) -> None:
    def make(folder: Path) -> on_disk.Made:
        with Path(log).open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return writes("x")(folder)

    store.build("kind", {}, make)


def _die_while_building(log: str) -> None:
    def make(folder: Path) -> on_disk.Made:
        (folder / "half").write_text("half")
        Path(log).touch()
        time.sleep(60)
        raise AssertionError

    store.build("kind", {}, make)


def test_two_processes_want_one_artifact_one_builds(tame_home: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_slowly, args=(str(tmp_path / "log"),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"


def test_what_a_killed_builder_leaves_is_swept_and_never_taken_for_complete(tame_home: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_while_building, args=(str(tmp_path / "log"),))
    process.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    assert store.sweep() == 0  # it is alive
    process.kill()
    process.join()
    assert store.find("kind", {}) is None
    assert store.sweep() == 1
    assert [p.name for p in (tame_home / "artifacts").iterdir() if p.name != ".locks"] == []
    assert store.build("kind", {}, writes("x"))[1] is False


def test_the_partial_of_a_killed_build_is_handed_on_where_that_is_asked_for(tame_home: Path) -> None:
    place = tame_home / "artifacts" / f".partial-kind-{on_disk.key_of({'kind': 'kind'})}" / "files"
    place.mkdir(parents=True)
    (place / "shard").write_text("done")
    seen = []

    def make(folder: Path) -> on_disk.Made:
        seen.extend(p.name for p in folder.iterdir())
        return on_disk.Made()

    store.build("kind", {}, make, keep_partial=True)
    assert seen == ["shard"]


def test_a_replaced_file_of_equal_size_and_time_has_another_digest(tame_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 1000)
    os.utime(file, ns=(10**18, 10**18))
    time.sleep(2.1)  # so that the digest is remembered
    first = sha256_file(file)
    assert sha256_file(file) == first
    other = tmp_path / "other"
    other.write_bytes(b"b" * 1000)
    os.utime(other, ns=(10**18, 10**18))
    other.replace(file)
    second = sha256_file(file)
    assert second != first
    file.write_bytes(b"c" * 1000)
    os.utime(file, ns=(10**18, 10**18))
    assert sha256_file(file) not in (first, second)


def test_a_store_that_cannot_be_written_says_so(tame_home: Path) -> None:
    tame_home.write_text("a file where a folder should be")
    with pytest.raises(TameError, match="TAME_HOME"):
        store.build("kind", {}, writes("x"))


def test_no_space_is_said_before_work_begins(tmp_path: Path) -> None:
    with pytest.raises(TameError, match="GB free, but to make it takes"):
        on_disk.need_space(tmp_path / "not" / "there", 10**18, "make it")


def test_many_are_made_by_one_call_and_what_was_complete_is_kept(tame_home: Path) -> None:
    wanted = {name: store.Wanted("kind", {"a": name}) for name in ("one", "two", "three")}
    asked: list[list[str]] = []

    def fails_after_the_first(folders: dict[str, Path]) -> None:
        asked.append(list(folders))
        (folders["one"] / "last").write_text("one")
        (folders["two"] / "begun").write_text("two")
        raise TameError("no data")

    with pytest.raises(TameError, match="no data"):
        store.build_many(wanted, fails_after_the_first, "last")
    assert [artifact.inputs for artifact in store.artifacts()] == [{"a": "one"}]
    assert not list((tame_home / "artifacts").glob(".partial-*"))

    def makes_all_but_one(folders: dict[str, Path]) -> None:
        asked.append(list(folders))
        assert not any(list(folder.iterdir()) for folder in folders.values())
        (folders["two"] / "last").write_text("two")

    made, there = store.build_many(wanted, makes_all_but_one, "last")
    assert list(made) == ["one", "two"]
    assert not there
    assert not list((tame_home / "artifacts").glob(".partial-*"))

    def makes_the_rest(folders: dict[str, Path]) -> None:
        asked.append(list(folders))
        (folders["three"] / "last").write_text("three")

    store.build_many(wanted, makes_the_rest, "last")
    made, there = store.build_many(wanted, makes_the_rest, "last")
    assert there
    assert {name: Path(artifact.path, "last").read_text() for name, artifact in made.items()} == {
        name: name for name in wanted
    }
    assert asked == [["one", "two", "three"], ["two", "three"], ["three"]]


def _build_many_slowly(names: list[str], log: str) -> None:
    def run(folders: dict[str, Path]) -> None:
        with Path(log).open("a") as file:
            file.write(f"{sorted(folders)}\n")
        time.sleep(1)
        for folder in folders.values():
            (folder / "last").write_text("x")

    store.build_many({name: store.Wanted("kind", {"a": name}) for name in names}, run, "last")


def test_two_processes_that_want_the_same_ones_in_other_orders_do_not_wait_forever(
    tame_home: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    log = str(tmp_path / "log")
    both = [context.Process(target=_build_many_slowly, args=(names, log)) for names in (["a", "b"], ["b", "a"])]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert Path(log).read_text() == "['a', 'b']\n"
