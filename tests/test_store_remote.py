"""Machines that share a store: one TAME_HOME a machine, one bucket behind the real S3 protocol, or one folder."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import AwayError, BadInputError, TameError
from tasks.store import admin, lease, on_disk, remote_store
from tasks.store import artifacts as store

SPAWN = multiprocessing.get_context("spawn")
TTL = 3.0


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """An S3 server that keeps what it has while it is stopped."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._port = server.get_host_and_port()[1]  # the same one again, when it is started again
    yield server
    server.stop()


@pytest.fixture(params=["s3", "file"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> remote_store.Remote:
    """An empty shared store."""
    monkeypatch.setenv("TAME_LEASE_SECONDS", str(TTL))
    if request.param == "file":
        (tmp_path / "mount").mkdir()
        monkeypatch.setenv("TAME_STORE", f"file://{tmp_path / 'mount'}")
    else:
        server = request.getfixturevalue("s3")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server._port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("TAME_STORE", f"s3://{tmp_path.name.replace('_', '-').lower()}/team")
    remote = remote_store.connect()
    assert remote is not None
    if request.param == "s3":
        remote.fs.mkdir(remote.root.split("/")[0])
    return remote


only_s3 = pytest.mark.parametrize("shared", ["s3"], indirect=True)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Be the machine of that name: its TAME_HOME."""

    def be(name: str) -> Path:
        monkeypatch.setenv("TAME_HOME", str(tmp_path / name))
        return tmp_path / name

    return be


def writes(text: str, log: Path, files: int = 2, seconds: float = 0) -> Callable[[Path], on_disk.Made]:
    """A stage that says in `log` that it ran."""

    def make(folder: Path) -> on_disk.Made:
        with log.open("a") as file:
            file.write(f"{text}\n")
        time.sleep(seconds)
        (folder / "sub").mkdir(exist_ok=True)
        for number in range(files):
            (folder / "sub" / f"{number}.txt").write_text(f"{text} {number}")
        return on_disk.Made(meta={"by": text})

    return make


def work(home: str, text: str, log: str, files: int, seconds: float) -> None:
    os.environ["TAME_HOME"] = home
    store.build("kind", {"a": 1}, writes(text, Path(log), files, seconds))


def start(home: Path, text: str, log: Path, files: int = 2, seconds: float = 0.0) -> Any:
    process = SPAWN.Process(target=work, args=(str(home), text, str(log), files, seconds))
    process.start()
    return process


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def objects(remote: remote_store.Remote) -> list[str]:
    return sorted(name.partition("/")[2] for name in remote_store.sizes(remote, remote.root))


def test_what_one_machine_has_made_another_fetches(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    machine("one")
    made, hit = store.build("kind", {"a": 1}, writes("one", log))
    assert not hit
    two = machine("two")
    assert store.find("kind", {"a": 1}) is None
    assert store.where("kind", {"a": 1}) == shared.url
    fetched, hit = store.build("kind", {"a": 1}, writes("two", log))
    assert hit
    assert log.read_text() == "one\n"
    assert fetched.path.startswith(str(two))
    assert Path(fetched.path, "sub/1.txt").read_text() == "one 1"
    assert fetched.model_dump(exclude={"path", "stamps"}) == made.model_dump(exclude={"path", "stamps"})
    assert store.verify(fetched) == []
    assert store.where("kind", {"a": 1}) == "the cache"
    assert len(objects(shared)) == 3, "two files and a manifest; no lease is left"
    assert [path.name for path in (two / "artifacts").glob(".*")] == [".locks"]


@only_s3
def test_a_local_hit_asks_nobody(
    s3: Any, shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path
) -> None:
    machine("one")
    store.build("kind", {"a": 1}, writes("one", tmp_path / "log"))
    with stopped(s3):
        assert store.build("kind", {"a": 1}, writes("one", tmp_path / "log"))[1] is True


def test_what_is_not_shared_stays(shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path) -> None:
    machine("one")
    store.build("kind", {"a": 1}, writes("one", tmp_path / "log"), shared=False)
    assert objects(shared) == []


def test_two_machines_want_one_artifact_one_builds(shared: remote_store.Remote, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(tmp_path / name, name, log, seconds=0.5) for name in "ab"]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(log.read_text()) == 2
    contents = {(tmp_path / name / "artifacts").glob("kind-*/files/sub/0.txt").__next__().read_text() for name in "ab"}
    assert contents == {f"{log.read_text().strip()} 0"}


@only_s3
@pytest.mark.e2e
def test_a_killed_builder_is_succeeded_by_one_of_those_who_wait(shared: remote_store.Remote, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(tmp_path / "a", "a", log, seconds=60)
    until(log.exists)
    others = [start(tmp_path / name, name, log) for name in "bc"]
    first.kill()
    killed = time.monotonic()
    for process in others:
        process.join()
        assert process.exitcode == 0
    assert time.monotonic() - killed > TTL - 1, "nobody is succeeded while he may live"
    assert len(log.read_text()) == 4, "the killed one, and one more"
    assert [name for name in objects(shared) if "lease" in name] == []


@only_s3
def test_killed_while_uploading_nothing_looks_complete_and_the_next_machine_sweeps(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    first = start(tmp_path / "a", "a", log, files=200)
    until(lambda: [name for name in objects(shared) if name.endswith(".txt")])
    first.kill()
    first.join()
    left = objects(shared)
    assert 1 <= len([name for name in left if name.endswith(".txt")]) < 200
    assert "manifest.json" not in left
    machine("b")
    made, hit = store.build("kind", {"a": 1}, writes("b", log, files=3))
    assert not hit
    assert len(objects(shared)) == 4, "three files and a manifest"
    machine("a")  # comes back with all its files, and takes those that stand
    back, _ = store.build("kind", {"a": 1}, writes("never", log))
    assert back.digest == made.digest
    assert log.read_text() == "a\nb\n"


@pytest.mark.parametrize("shared", ["file"], indirect=True)
def test_who_was_stopped_for_long_takes_what_another_has_made_meanwhile(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAME_LEASE_SECONDS", "1.5")
    log = tmp_path / "log"
    slow = start(tmp_path / "slow", "slow", log, files=3, seconds=0.5)
    until(log.exists)
    os.kill(slow.pid, signal.SIGSTOP)
    machine("quick")
    made, hit = store.build("kind", {"a": 1}, writes("quick", log))
    os.kill(slow.pid, signal.SIGCONT)
    slow.join()
    assert (hit, slow.exitcode) == (False, 0)
    assert log.read_text() == "slow\nquick\n"
    machine("slow")
    theirs = store.find("kind", {"a": 1})
    assert theirs is not None
    assert (theirs.digest, theirs.meta) == (made.digest, {"by": "quick"})
    assert len(objects(shared)) == 3, "the loser's files are gone"


@pytest.mark.parametrize("damage", ["changed", "gone", "manifest", "climbs"])
def test_a_damaged_shared_artifact_is_named_and_made_again(
    shared: remote_store.Remote,
    machine: Callable[[str], Path],
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = tmp_path / "log"
    machine("one")
    store.build("kind", {"a": 1}, writes("same", log))
    [file] = [name for name in objects(shared) if name.endswith("1.txt")]
    [name] = [name for name, _, _ in admin.artifacts(shared)]
    file, manifest = f"{shared.root}/{name}/{file}", f"{shared.root}/{name}/manifest.json"
    if damage == "changed":
        shared.fs.pipe_file(file, b"same X")
        told = "1.txt has sha256"
    elif damage == "gone":
        shared.fs.rm_file(file)
        told = "1.txt is missing"
    elif damage == "manifest":
        shared.fs.pipe_file(manifest, b'{"half')
        told = "is not a manifest"
    else:
        content = json.loads(shared.fs.cat_file(manifest))
        for key in ("files", "sizes"):
            content[key]["../../evil"] = content[key].pop("sub/1.txt")
        shared.fs.pipe_file(manifest, json.dumps(content).encode())
        told = "does not describe"
    machine("two")
    again, hit = store.build("kind", {"a": 1}, writes("same", log))
    assert not hit
    assert shared.url in caplog.text
    assert told in caplog.text
    machine("three")
    fetched, hit = store.build("kind", {"a": 1}, writes("same", log))
    assert hit
    assert fetched.digest == again.digest
    assert log.read_text() == "same\nsame\n"
    assert len(objects(shared)) == 3


def test_a_killed_fetch_goes_on_where_it_was(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path
) -> None:
    machine("one")
    made, _ = store.build("kind", {"a": 1}, writes("one", tmp_path / "log"))
    left = machine("two") / "artifacts" / f".fetched-kind-{made.key}" / "files" / "sub"
    left.mkdir(parents=True)
    (left / "0.txt").write_text("one 0")  # whole, so nobody needs the remote one
    (left / "1.txt").write_text("one")  # half
    (left / "other.txt").write_text("of an upload that was replaced")
    [remote_file] = [name for name in objects(shared) if name.endswith("0.txt")]
    shared.fs.rm_file(f"{shared.root}/kind-{made.key}/{remote_file}")
    fetched, hit = store.build("kind", {"a": 1}, writes("two", tmp_path / "log"))
    assert hit
    assert store.verify(fetched) == []


@contextlib.contextmanager
def stopped(server: Any) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


@only_s3
@pytest.mark.parametrize("when", ["building", "fetching"])
def test_storage_may_be_away_for_some_seconds(
    s3: Any, shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path, when: str
) -> None:
    log = tmp_path / "log"
    machine("one")
    if when == "fetching":
        store.build("kind", {"a": 1}, writes("one", log))
        machine("two")
        s3.stop()
    threads = []

    def make(folder: Path) -> on_disk.Made:
        s3.stop()
        threads.append(threading.Timer(2, s3.start))
        threads[0].start()
        return writes("one", log)(folder)

    if when == "fetching":
        threads.append(threading.Timer(2, s3.start))
        threads[0].start()
    started = time.monotonic()
    artifact, _ = store.build("kind", {"a": 1}, make)
    threads[0].join()
    assert time.monotonic() - started > 1.5
    assert log.read_text() == "one\n"
    assert [problems for _, _, problems in admin.artifacts(shared)] == [[]]
    assert artifact.files


@only_s3
def test_storage_away_for_long_fails_in_one_line_and_what_was_made_is_uploaded_by_the_next_run(
    s3: Any,
    shared: remote_store.Remote,
    machine: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("TAME_STORE_PATIENCE", "1")

    def make(folder: Path) -> on_disk.Made:
        s3.stop()
        return writes("one", log)(folder)

    machine("one")
    try:
        with pytest.raises(AwayError, match=r"no answer for \d s .*run again") as raised:
            store.build("kind", {"a": 1}, make)
    finally:
        s3.start()
    assert shared.url in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "manifest.json" not in objects(shared)
    _, hit = store.build("kind", {"a": 1}, writes("never", log))
    assert not hit
    machine("two")
    assert store.build("kind", {"a": 1}, writes("never", log))[1] is True
    assert log.read_text() == "one\n"


@pytest.mark.parametrize("shared", ["file"], indirect=True)
def test_a_lease_lives_longer_than_its_time_while_its_holder_does(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    slow = start(tmp_path / "slow", "slow", log, seconds=2 * TTL)
    until(log.exists)
    machine("other")
    assert store.build("kind", {"a": 1}, writes("other", log))[1] is True
    slow.join()
    assert log.read_text() == "slow\n"


@only_s3
def test_storage_that_was_away_is_no_sign_that_a_builder_is_dead(
    s3: Any, shared: remote_store.Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAME_LEASE_SECONDS", "2")
    remote_store.create(shared, f"{shared.root}/kind-1/lease.1", b"of a builder that storage does not hear either")
    taken = []

    def wait() -> None:
        with lease.lease(shared, "kind-1"):
            taken.append(time.monotonic())

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)
    with stopped(s3):
        time.sleep(2.5)
    back = time.monotonic()
    waiting.join()
    assert taken[0] - back > 2


@pytest.mark.parametrize("shared", ["file"], indirect=True)
def test_who_is_dead_is_waited_for_once(
    shared: remote_store.Remote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TAME_LEASE_SECONDS", "1.5")
    for name in ("kind-1", "kind-2", "kind-3"):  # as an evaluation holds one for each part
        dead = json.dumps({"owner": "host:1", "process": "dead", "id": name, "beats": 7}).encode()
        remote_store.create(shared, f"{shared.root}/{name}/lease.1", dead)
    with lease.lease(shared, "kind-1"), lease.lease(shared, "kind-2"), lease.lease(shared, "kind-3"):
        assert {name.split("/")[1] for name in remote_store.sizes(shared, shared.root)} == {"lease.2"}
    assert caplog.text.count("no sign of life from host:1") == 1
    assert objects(shared) == []


def test_a_lease_that_has_passed_to_another_is_not_taken_back(shared: remote_store.Remote) -> None:
    path = f"{shared.root}/kind-1/lease.1"
    with lease.lease(shared, "kind-1"):
        assert len(lease.leases(shared, "kind-1")) == 1
        shared.fs.pipe_file(path, b"another's")
        time.sleep(2 * TTL / lease.HEARTBEATS)
        assert shared.fs.cat_file(path) == b"another's"
    assert shared.fs.cat_file(path) == b"another's"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://host/store", "expected s3://"),
        ("s3://", "expected s3://"),
        ("gs://bucket/store", r"pip install 'tame\[gcs\]'"),
        ("s3://key:secret@bucket/store", "holds credentials"),
        ("/not/there", "no such folder; mount it"),
        ("s3://no-such-bucket-here/store", "bucket does not exist"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_in_one_line(
    s3: Any, tame_home: Path, monkeypatch: pytest.MonkeyPatch, url: str, told: str, request: pytest.FixtureRequest
) -> None:
    if "bucket does" in told:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3._port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("TAME_STORE", url)
    with pytest.raises(BadInputError, match=told) as raised:
        store.check()
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


@only_s3
def test_a_bucket_that_refuses_is_refused(shared: remote_store.Remote, tame_home: Path) -> None:
    bucket = shared.root.split("/")[0]
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": f"arn:aws:s3:::{bucket}/*"}
    shared.fs.call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps({"Statement": [deny]}))
    with pytest.raises(BadInputError, match="give access to list, read, write and delete"):
        store.check()


def test_a_store_that_can_be_used_is_left_as_it_was(shared: remote_store.Remote, tame_home: Path) -> None:
    store.check()
    assert objects(shared) == []
    assert len(list((tame_home / "stores").iterdir())) == 1


def test_the_shared_store_is_listed_verified_and_pruned(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAME_LEASE_SECONDS", "0.5")
    machine("one")
    keys = [store.build("kind", {"a": a}, writes(str(a), tmp_path / "log"))[0].key for a in (1, 2)]
    good, bad = (f"kind-{key}" for key in keys)
    [file] = [name for name in remote_store.sizes(shared, f"{shared.root}/{bad}") if name.endswith("1.txt")]
    shared.fs.pipe_file(f"{shared.root}/{file}", b"X")
    remote_store.create(shared, f"{shared.root}/kind-left/lease.1", b"of a machine that is dead")
    remote_store.put(shared, tmp_path / "log", f"{shared.root}/kind-left/upload/half")
    found = {name: (manifest, problems) for name, manifest, problems in admin.artifacts(shared)}
    assert found.keys() == {good, bad, "kind-left"}
    assert "is not complete" in found["kind-left"][1][0]
    assert found[good][0] is not None
    assert admin.verify(shared, found[good][0]) == []
    assert found[bad][0] is not None
    [wrong] = admin.verify(shared, found[bad][0])
    assert f"{shared.url}/{file}" in wrong
    with lease.lease(shared, "kind-made-now"):
        removed, kept = admin.prune(shared, None)
    assert (sorted(removed), sorted(kept)) == (sorted([bad, "kind-left"]), sorted([good, "kind-made-now"]))
    assert {name.split("/")[0] for name in remote_store.sizes(shared, shared.root)} == {good}
    assert admin.prune(shared, 0)[0] == [good]


@pytest.mark.parametrize("shared", ["file"], indirect=True)
def test_a_mount_without_hard_links_will_do(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    machine("one")
    store.check()
    store.build("kind", {"a": 1}, writes("one", tmp_path / "log"))
    machine("two")
    assert store.build("kind", {"a": 1}, writes("two", tmp_path / "log"))[1] is True
    assert len(objects(shared)) == 3


@pytest.mark.parametrize("shared", ["file"], indirect=True)
def test_a_mount_that_has_gone_is_not_made_anew(
    shared: remote_store.Remote, machine: Callable[[str], Path], tmp_path: Path
) -> None:
    Path(shared.root).rmdir()
    machine("one")
    with pytest.raises(TameError, match=f"TAME_STORE {shared.url}: .*mount the folder"):
        store.build("kind", {"a": 1}, writes("one", tmp_path / "log"))
    assert not Path(shared.root).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_shared_store_that_is_full_says_so_and_what_was_made_is_kept(
    small_disk: Path, machine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAME_STORE", str(small_disk))
    log = tmp_path / "log"

    def make(folder: Path) -> on_disk.Made:
        (folder / "large").write_bytes(bytes(300_000))
        return writes("one", log)(folder)

    machine("one")
    with pytest.raises(TameError, match=f"TAME_STORE {small_disk}: .*No space left.*make room there"):
        store.build("kind", {"a": 1}, make)
    assert not list(small_disk.glob("*/manifest.json"))
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert store.build("kind", {"a": 1}, make)[1] is False
    assert log.read_text() == "one\n"
