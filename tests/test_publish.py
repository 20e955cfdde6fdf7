"""Publishing to a Hub over real HTTP, with what goes wrong there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from configs.errors import BadInputError, TameError, UnreachableError
from configs.schema import Publish, Recipe
from tasks.publish import client
from tasks.publish.preflight import full_names, preflight
from tasks.publish.task import check, publish, publish_folder
from tasks.runtime.progress import silent
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.store.digests import sha256_files
from tasks.values import Found, Published
from tests.hub import Hub

REPO = "me/tiny-nf4"
PUBLIC = Publish(to="hub", repo=REPO, private=False)
PRIVATE = Publish(to="hub", repo=REPO, private=True)
Slept = list[float]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tame_home: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with Hub(part_size=1 << 20) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        yield hub


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> Slept:
    """Nobody waits before trying again; how long they would have."""
    pauses: Slept = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr("tasks.runtime.retry.time", clock)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", clock)
    return pauses


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind but no model: two large ones, small ones, one in a folder."""
    folder = tmp_path / "artifact"
    (folder / "more").mkdir(parents=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes(os.urandom(2_500_000))
    (folder / "model-00002-of-00002.safetensors").write_bytes(os.urandom(90_000))
    (folder / "generation_config.json").write_text('{"max_new_tokens": 8}\n')
    (folder / "more" / "LICENSE").write_text("Do as you like.\n")
    return folder


def files(folder: Path) -> dict[str, str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sha256_files(folder, names)


def documents(folder: Path, card: str = "# A card\n", run: str = "first", limit: float = 0.1) -> dict[str, bytes]:
    text = f"---\nlicense: mit\n---\n{card}".encode()
    told = {
        "artifact": {"digest": on_disk.digest_of(files(folder)), "files": files(folder)},
        "source": {"model": "org/another", "commit": "c" * 40, "digest": "d" * 64},
        "variant": {"name": "nf4"},
        "versions": {"tame": "0.1.0"},
        "recipe": {"gate": {"max_mean_kl": limit}},
        "documents": {"README.md": store.hashlib.sha256(text).hexdigest()},
        "run": {"mlflow": run},
    }
    return {"README.md": text, "tame.json": json.dumps(told).encode()}


def release(folder: Path, spec: Publish = PUBLIC, extra: dict[str, bytes] | None = None) -> Published:
    return publish(folder, files(folder), extra or documents(folder), REPO, spec, progress=silent, pauses=(0, 0, 0))


def remote(hub: Hub, repo: str = REPO) -> dict[str, str]:
    return {name: file.sha256 for name, file in hub.model(repo).files().items() if name != ".gitattributes"}


def local(folder: Path, extra: dict[str, bytes] | None = None) -> dict[str, str]:
    extra = documents(folder) if extra is None else extra
    return files(folder) | {name: store.hashlib.sha256(content).hexdigest() for name, content in extra.items()}


def writes(hub: Hub) -> list[str]:
    return [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]


def commits(hub: Hub, repo: str = REPO) -> int:
    return sum(ref == "refs/heads/main" and message.startswith("tame") for _, ref, message in hub.model(repo).log)


def test_a_new_repo_is_hidden_until_every_byte_was_read_back(hub: Hub, folder: Path) -> None:
    done = release(folder)
    assert remote(hub) == local(folder)
    assert (done.visibility, done.already, sorted(done.uploaded)) == ("public", False, sorted(local(folder)))
    assert done.url == f"{hub.url}/{REPO}/commit/{hub.model(REPO).at('main')}"
    assert hub.model(REPO).refs["refs/tags/tame-0.1.0-nf4-cccccccccccc"] == done.commit
    shown = hub.requests.index(f"PUT /api/models/{REPO}/settings")
    read = {request.rsplit("/", 1)[1] for request in hub.requests[:shown] if f"/resolve/{done.commit}/" in request}
    assert read == {name.rsplit("/", 1)[-1] for name in local(folder)}
    assert not [request for request in hub.requests[shown:] if "/commit/" in request or "PUT /lfs" in request]


def test_the_same_again_is_three_questions_and_no_answer_changes_anything(hub: Hub, folder: Path) -> None:
    first = release(folder)
    before, log = remote(hub), list(hub.model(REPO).log)
    hub.requests.clear()
    again = release(folder)
    assert (again.already, again.uploaded, again.commit) == (True, [], first.commit)
    assert (writes(hub), len(hub.requests)) == ([], 3)
    assert release(folder, extra=documents(folder, run="second")).already  # other run ids: the same release
    assert (writes(hub), remote(hub), hub.model(REPO).log) == ([], before, log)


def test_a_changed_limit_uploads_the_card_alone_by_a_pull_request(hub: Hub, folder: Path) -> None:
    first = release(folder)
    changed = documents(folder, "# Another card\n", run="second", limit=0.2)
    hub.requests.clear()
    done = release(folder, extra=changed)
    assert sorted(done.uploaded) == ["README.md", "tame.json"]
    assert not [request for request in hub.requests if "/lfs" in request]
    assert remote(hub) == local(folder, changed)
    assert [d["status"] for d in hub.model(REPO).discussions] == ["merged"]
    assert hub.model(REPO).refs["refs/tags/tame-0.1.0-nf4-cccccccccccc"] == first.commit  # tags do not move
    assert hub.model(REPO).refs["refs/tags/tame-0.1.0-nf4-cccccccccccc.2"] == done.commit
    assert release(folder, extra=changed).already


def test_new_weights_replace_the_old_and_leave_what_is_harmless(hub: Hub, folder: Path) -> None:
    release(folder)
    hub.write(REPO, "picture.png", b"\x89PNG")
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model.safetensors")
    (folder / "model-00001-of-00002.safetensors").unlink()
    release(folder)
    assert remote(hub).keys() == local(folder).keys() | {"picture.png"}
    hub.write(REPO, "modeling_tiny.py", b"import os")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(TameError, match=r"me/tiny-nf4 has modeling_tiny\.py, which tame did not put there"):
        release(folder)


def test_a_review_is_left_open_and_not_opened_twice(hub: Hub, folder: Path) -> None:
    release(folder)
    before = remote(hub)
    review = PUBLIC.model_copy(update={"review": True})
    changed = documents(folder, "# Another card\n", limit=0.2)
    done = release(folder, review, changed)
    assert (done.url, done.already) == (f"{hub.url}/{REPO}/discussions/1", False)
    assert release(folder, review, documents(folder, "# Another card\n", limit=0.2)).already
    assert (len(hub.model(REPO).discussions), remote(hub)) == (1, before)
    assert release(folder, PUBLIC, changed).uploaded  # without review it is that pull request that is merged
    assert (len(hub.model(REPO).discussions), remote(hub)) == (1, local(folder, changed))


@pytest.mark.parametrize(
    "faults",
    [
        [("POST .*/commit/", {"status": 500, "times": 3})],
        [("PUT /lfs", {"status": 500, "times": 3}), ("POST .*batch", {"status": 502, "times": 3})],
        [("POST .*/commit/", {"status": 429, "headers": {"Retry-After": "7"}})],
        [("POST .*/commit/", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=9'}})],
        [("/api/models/", {"status": 503, "times": 3, "skip": 4}), ("whoami|create", {"status": 504, "times": 3})],
        [("PUT /lfs", {"cut": 500_000, "times": 2})],
        [("GET /cdn/", {"cut": 300_000, "times": 3})],
        [("POST .*/commit/", {"lost": True})],
        [("POST .*/repos/create", {"lost": True}), ("PUT .*settings", {"lost": True}), ("/tag/", {"lost": True})],
        [("PUT /lfs", {"stall": 1.0})],
    ],
    ids=[
        "500s on commit",
        "500s on LFS",
        "429",
        "rate limit",
        "503s",
        "cut upload",
        "cut download",
        "lost commit",
        "lost",
        "stall",
    ],
)
def test_transient_errors_are_retried_and_nothing_is_done_twice(
    hub: Hub, folder: Path, slept: Slept, faults: list[tuple[str, dict[str, object]]]
) -> None:
    for match, what in faults:
        hub.fail(match, **what)
    done = release(folder)
    assert remote(hub) == local(folder)
    assert (commits(hub), len([ref for ref in hub.model(REPO).refs if "tags" in ref])) == (1, 1)
    assert (hub.model(REPO).private, done.visibility, hub.model(REPO).discussions) == (False, "public", [])
    assert all(fault.times == 0 for fault in hub.faults)
    if "headers" in faults[0][1]:
        assert max(slept) >= 7
    assert release(folder).already


@pytest.mark.parametrize("match", ["POST .*/commit/", "POST .*/merge"])
def test_a_lost_answer_to_a_pull_request_does_not_open_another(hub: Hub, folder: Path, match: str) -> None:
    release(folder)
    changed = documents(folder, "# Another card\n", limit=0.2)
    hub.fail(match, lost=True)
    release(folder, extra=changed)
    assert ([d["status"] for d in hub.model(REPO).discussions], remote(hub)) == (["merged"], local(folder, changed))


def test_a_release_is_put_into_a_collection_once(hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = PUBLIC.model_copy(update={"collection": "Tiny models"})
    for _ in range(2):
        release(folder, spec)
    [made] = hub.collections.values()
    assert (made["title"], made["owner"]["name"], made["private"]) == ("Tiny models", "me", spec.private)
    assert [(item["type"], item["id"]) for item in made["items"]] == [("model", REPO)]
    hub.fail("POST /api/collections", 500, times=9)
    assert release(folder, spec).already  # the release stands, whatever becomes of the collection
    assert f"{REPO} is published, but not in the collection 'Tiny models'" in caplog.text


def test_a_hub_without_tags_and_lists_of_pull_requests_will_do(hub: Hub, folder: Path) -> None:
    hub.fail("/refs|/tag/|GET .*/discussions", 404, times=999)
    release(folder)
    assert (hub.model(REPO).private, remote(hub)) == (False, local(folder))
    release(folder)
    assert commits(hub) == 1
    changed = documents(folder, "# Another card\n", limit=0.2)
    release(folder, extra=changed)
    assert ([d["status"] for d in hub.model(REPO).discussions], remote(hub)) == (["merged"], local(folder, changed))


def test_a_stall_of_half_a_minute_is_within_the_limits(hub: Hub) -> None:
    from huggingface_hub import get_session

    client.connect()
    limits = get_session().timeout
    assert limits.read is not None
    assert limits.write is not None
    assert 60 <= min(limits.read, limits.write) <= 600


def test_it_gives_up_on_what_does_not_pass(hub: Hub, folder: Path) -> None:
    hub.fail("POST .*/commit/", 500, times=99)
    with pytest.raises(UnreachableError, match=f"{hub.url} answers 500"):
        release(folder)
    assert sum("/commit/" in request for request in hub.requests) == 4
    assert hub.model(REPO).private
    hub.faults.clear()
    hub.fail("POST .*/commit/", 429, headers={"Retry-After": "4000"})
    with pytest.raises(TameError, match="asks to wait 4000 s"):
        release(folder)


@pytest.mark.parametrize("status", [400, 403, 404, 422])
def test_a_refusal_is_not_asked_again(hub: Hub, folder: Path, status: int) -> None:
    hub.fail("POST .*/commit/", status, times=99)
    with pytest.raises(TameError, match=REPO) as caught:
        release(folder)
    assert not isinstance(caught.value, UnreachableError | BadInputError)
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_killed_while_uploading_and_published_once(hub: Hub, folder: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"folder": str(folder), "extra": {n: c.decode() for n, c in documents(folder).items()}}))
    hub.fail("PUT /lfs/.*/2", stall=60)
    code = (
        "import json, sys; from pathlib import Path; from configs.schema import Publish\n"
        "from tasks.store.digests import sha256_files\n"
        "from tasks.publish.task import publish; job = json.load(open(sys.argv[1])); folder = Path(job['folder'])\n"
        "names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())\n"
        "extra = {name: text.encode() for name, text in job['extra'].items()}\n"
        f"publish(folder, sha256_files(folder, names), extra, {REPO!r}, Publish(to='hub', repo={REPO!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(job)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any("PUT /lfs" in request and request.endswith("/2") for request in hub.requests):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert hub.model(REPO).private
    assert (release(folder).already, commits(hub), remote(hub)) == (False, 1, local(folder))
    assert release(folder).already


@pytest.mark.parametrize("match", ["PUT /lfs", "POST .*/commit/"], ids=["large file", "small file"])
def test_a_corrupted_byte_is_found_and_never_shown(hub: Hub, folder: Path, match: str) -> None:
    hub.fail(match, corrupt=True)
    named = r"model-0000\d-of-00002\.safetensors" if "lfs" in match else r"README\.md|tame\.json|generation|LICENSE"
    with pytest.raises(TameError, match=f"{REPO} at .*({named}).* it stays hidden"):
        release(folder)
    assert hub.model(REPO).private
    assert not [ref for ref in hub.model(REPO).refs if "tags" in ref]
    if "lfs" not in match:  # what the Hub itself knows to be another file is uploaded anew
        assert not release(folder).already
        assert remote(hub) == local(folder)


def test_a_corrupted_pull_request_is_closed_and_not_merged(hub: Hub, folder: Path) -> None:
    release(folder)
    before = remote(hub)
    hub.fail("POST .*/commit/", corrupt=True)
    with pytest.raises(TameError, match=f"{REPO} at .* pull request 1 is closed"):
        release(folder, extra=documents(folder, "# Another card\n", limit=0.2))
    assert ([d["status"] for d in hub.model(REPO).discussions], remote(hub)) == (["closed"], before)


@pytest.mark.parametrize("first", [True, False], ids=["new repo", "published repo"])
def test_a_target_that_changes_under_us_is_not_overwritten(hub: Hub, folder: Path, first: bool) -> None:
    if not first:
        release(folder)
    changed, written = documents(folder, "# Another card\n", limit=0.2), []

    def somebody(what: str, done: int, total: int) -> None:
        if what.startswith("upload" if first else "verify") and not written:
            written.append(hub.write(REPO, "README.md", b"# mine\n"))

    with pytest.raises(TameError, match=f"{REPO} changed while it was published|{REPO} changed while it was being"):
        publish(folder, files(folder), changed, REPO, PUBLIC, progress=somebody, pauses=())
    assert hub.read(REPO, "README.md") == b"# mine\n"
    assert hub.model(REPO).private == first


def test_what_is_not_what_was_measured_is_not_uploaded(hub: Hub, folder: Path) -> None:
    measured = files(folder)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(TameError, match=r"generation_config\.json is not the file that was measured"):
        publish(folder, measured, documents(folder), REPO, PUBLIC, progress=silent)
    assert hub.requests == []


def recipe(repo: str = "{model}-{variant}", **spec: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "source": {"model": "org/tiny"},
            "variants": [{"method": "int8"}, {"method": "nf4"}],
            "publish": {"to": "hub", "repo": repo, **spec},
        }
    )


def found(
    licence: str | None = "mit", gated: bool = False, size: int = 0, card: dict[str, object] | None = None
) -> Found:
    about = {"licence": licence, "gated": gated, "card": card or {}, "files": {"model.safetensors": size}}
    return Found.model_validate(
        {"kind": "hub", "name": "tiny", "path": None, "commit": "c" * 40, "config": {}, **about}
    )


TARGETS = {"int8": "me/tiny-int8", "nf4": REPO}


def test_preflight_passes_what_can_be_published_and_asks_little(hub: Hub) -> None:
    assert preflight(recipe(), TARGETS, found("apache-2.0", False, 10**6)) == []
    assert preflight(recipe(), {"int8": "org/a", "nf4": "tiny-nf4"}, None) == []  # nobody has looked yet
    assert writes(hub) == []
    assert len(hub.requests) <= 5
    assert "no licence" in preflight(recipe(), TARGETS, found(None, False, 10**6))[0]
    warnings = preflight(recipe(), TARGETS, found("llama3.2", True, 0))
    assert any("llama3.2" in warning for warning in warnings)
    assert any("gated" in warning for warning in warnings)
    assert any("'cc-by-nd-4.0, mit'" in warning for warning in preflight(recipe(), TARGETS, found("cc-by-nd-4.0, mit")))
    with pytest.raises(BadInputError, match=r"licence_check"):
        preflight(recipe(licence_check="refuse"), TARGETS, found("llama3.2", True, 0))


def test_a_repo_without_an_owner_is_the_tokens(hub: Hub) -> None:
    assert full_names({"int8": "org/a", "nf4": "tiny-nf4"}) == {"int8": "org/a", "nf4": "me/tiny-nf4"}


def test_what_the_recipe_says_for_the_card_is_checked_too(hub: Hub) -> None:
    with pytest.raises(BadInputError, match=r"publish\.card has metadata that"):
        preflight(recipe(card={"license": "mit-ish"}), TARGETS, found(None))
    assert preflight(recipe(card={"license": "mit"}), TARGETS, found(None)) == []


def test_a_card_that_the_hub_would_refuse_is_told_before_anything_is_made(hub: Hub, checkpoint: Path) -> None:
    card = {"language": ["english", "de"], "license": "mit-ish", "datasets": ["a/b"]}
    with pytest.raises(BadInputError) as caught:
        preflight(recipe(), TARGETS, found(card=card))
    assert str(caught.value).startswith("the card of org/tiny, from which the new ones inherit, has metadata that")
    for reason in ('"license" must be one of', "'english'", "no language"):  # all of them, and in full
        assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert preflight(recipe(), TARGETS, found(card={"language": "en", "license": ["mit", "apache-2.0"]})) == []
    (checkpoint / "README.md").write_text("---\nlicense: mit-ish\n---\n# Mine\n")
    with pytest.raises(BadInputError, match=r"README\.md has metadata that .* does not take: \"license\" must be"):
        publish_folder(checkpoint, "mine", False, silent)
    assert hub.repos == {}
    hub.fail("validate-yaml", 404, times=9)  # a Hub that does not check
    assert preflight(recipe(), TARGETS, found(card=card)) == []


@pytest.mark.parametrize("token", [None, "hf_expired", "read"])
def test_a_bad_token_is_told_before_anything_is_made(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    given = hub.token("read") if token == "read" else token
    monkeypatch.setenv("HF_TOKEN", given) if given else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInputError, match="HF_TOKEN") as caught:
        preflight(recipe(), TARGETS, found("mit", False, 0))
    assert len(hub.requests) < 5
    assert str(given) not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "me/../x", "me/a--b", "me/a b", "a/b/c", "me/" + "x" * 97, "me/x.git", ""])
def test_a_name_that_the_hub_does_not_allow(hub: Hub, folder: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="not a name that the Hub allows"):
        preflight(recipe(), {"int8": "me/a", "nf4": name}, found("mit", False, 0))
    with pytest.raises(BadInputError, match="not a name that the Hub allows"):
        publish_folder(folder, name, True, silent)
    assert hub.requests == []


def test_a_target_that_is_not_ours(hub: Hub, folder: Path) -> None:
    hub.add_model(REPO, folder)
    with pytest.raises(BadInputError, match=f"{REPO} is there and tame did not make it"):
        preflight(recipe(), TARGETS, found("mit", False, 0))
    with pytest.raises(TameError, match=f"{REPO} holds files that tame did not put there"):
        release(folder)
    with pytest.raises(BadInputError, match=r"me .* may not write to you/tiny"):
        preflight(recipe(), {"nf4": "you/tiny"}, found("mit", False, 0))
    with pytest.raises(BadInputError, match="same for two variants"):
        preflight(recipe(), {"int8": "me/tiny", "nf4": "me/Tiny"}, found("mit", False, 0))
    assert writes(hub) == []


def test_a_renamed_repo_is_not_followed(hub: Hub, folder: Path, checkpoint: Path) -> None:
    release(folder)
    hub.rename(REPO, "me/precious")
    before = remote(hub, "me/precious")
    hub.requests.clear()
    said = "me/tiny-nf4 was renamed to me/precious.* give me/precious, or a new name"
    with pytest.raises(BadInputError, match=said):
        preflight(recipe(), TARGETS, found("mit", False, 0))
    with pytest.raises(BadInputError, match=said):
        publish_folder(checkpoint, REPO, False, silent)
    with pytest.raises(TameError, match=said) as caught:
        release(folder, extra=documents(folder, "# Another card\n", limit=0.2))
    assert not isinstance(caught.value, BadInputError)  # in a run, work has been done by then
    assert (writes(hub), remote(hub, "me/precious")) == ([], before)
    assert check(REPO, None, silent) == []  # reading harms nobody


def test_a_repo_that_is_renamed_meanwhile_is_not_shown(hub: Hub, folder: Path) -> None:
    renamed = []

    def somebody(what: str, done: int, total: int) -> None:
        if what.startswith("verify") and not renamed:
            renamed.append(hub.rename(REPO, "me/precious"))

    with pytest.raises(TameError, match="was renamed to me/precious"):
        publish(folder, files(folder), documents(folder), REPO, PUBLIC, progress=somebody, pauses=())
    assert hub.model("me/precious").private


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Private repository storage limit reached, please upgrade your plan", "/settings/billing"),
        ("Your organization's policy does not allow public models?", "owner's settings"),
        ("Discussions are disabled for this repo", f"allow discussions on .*{REPO}/settings"),
        ("You don't have the rights to write to it", "a token in HF_TOKEN that may"),
    ],
)
def test_a_refusal_says_what_the_hub_said(hub: Hub, folder: Path, said: str, remedy: str) -> None:
    release(folder)
    hub.fail("POST .*/commit/", 403, times=99, headers={"X-Error-Message": said})
    with pytest.raises(TameError) as caught:
        release(folder, extra=documents(folder, "# Another card\n", limit=0.2))
    assert said in str(caught.value)
    assert re.search(remedy, str(caught.value))
    assert ("HF_TOKEN" in str(caught.value)) == ("HF_TOKEN" in remedy)


def test_a_release_of_another_model_is_replaced_only_with_a_warning(hub: Hub, folder: Path) -> None:
    release(folder, PRIVATE)
    warnings = preflight(recipe(), TARGETS, found("mit", False, 0))
    assert warnings == [f"{REPO} holds a release made from org/another; what is made from org/tiny will replace it"]


def test_a_public_repo_is_not_made_private_nor_fed_what_should_be(hub: Hub, folder: Path) -> None:
    release(folder)
    with pytest.raises(BadInputError, match=f"{REPO} is public and publish.private is true"):
        preflight(recipe(), TARGETS, found("mit", False, 0))
    with pytest.raises(TameError, match=f"{REPO} is public and publish.private is true"):
        release(folder, PRIVATE, documents(folder, "# Another\n", limit=0.2))
    assert not hub.model(REPO).private


def test_the_token_is_written_nowhere(
    hub: Hub, folder: Path, tame_home: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    token = os.environ["HF_TOKEN"]
    caplog.set_level("DEBUG", "tame")
    caplog.set_level("DEBUG", "huggingface_hub")
    errors = []
    for match in ("POST .*batch", "PUT /lfs", "/commit/", "/resolve/", "settings", "/tag/"):
        hub.faults.clear()
        hub.fail(match, 403, times=99, headers={"X-Error-Message": f"no, {token}"})
        try:
            release(folder)
        except TameError as error:
            errors.append(str(error))
    hub.faults.clear()
    release(folder)
    assert len(errors) >= 5
    told = "".join([caplog.text, *capfd.readouterr(), *errors])
    stored = b"".join(path.read_bytes() for path in tame_home.rglob("*") if path.is_file())
    public = b"".join(file.place.read_bytes() for file in hub.model(REPO).files().values())
    assert token not in told
    assert token.encode() not in stored + public


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two real shards with their index, and no model."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, shard in shards.items():
        save_file({tensor: torch.arange(8)}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "generation_config.json").write_text('{"max_new_tokens": 8}\n')
    (folder / "LICENSE").write_text("Do as you like.\n")
    return folder


def test_a_folder_of_ones_own_is_published_and_checked(hub: Hub, checkpoint: Path) -> None:
    folder = checkpoint
    done = publish_folder(folder, "mine-nf4", False, silent)
    assert (done.repo, done.visibility, done.already) == ("me/mine-nf4", "public", False)
    assert remote(hub, "me/mine-nf4").keys() == {*files(folder), "README.md", "tame.json"}
    assert publish_folder(folder, "mine-nf4", False, silent).already
    assert check("me/mine-nf4", None, silent) == []
    for name, content in documents(folder).items():
        (folder / name).write_bytes(content)
    assert publish_folder(folder, "whole", False, silent).repo == "me/whole"
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"generation_config\.json was changed: .* its tame\.json"):
        publish_folder(folder, "changed", False, silent)
    (folder / "empty").mkdir()
    for nothing in (folder / "empty", folder / "LICENSE", folder / "missing"):
        with pytest.raises(BadInputError, match=r"no folder with \.safetensors files"):
            publish_folder(nothing, "mine", True, silent)
    with pytest.raises(BadInputError, match="tame did not publish this"):
        check(str(folder / "empty"), None, silent)
    with pytest.raises(BadInputError, match="me/nothing is not on"):
        check("me/nothing", None, silent)


RUBBISH = (".env", ".DS_Store", ".ipynb_checkpoints/config-checkpoint.json", "training_args.bin", "optimizer.pt", "notes.txt",
           "checkpoint-500/model.safetensors", ".git/config", "tokenizer.pkl", "handler.py", "runs/events.out.1", ".netrc",
           "wandb-summary.json", "trainer_state.json", "data.parquet")  # fmt: skip


@pytest.mark.parametrize("ours", [False, True], ids=["somebody's", "tame's"])
def test_only_what_a_checkpoint_consists_of_is_published(
    hub: Hub, checkpoint: Path, caplog: pytest.LogCaptureFixture, ours: bool
) -> None:
    if ours:
        (checkpoint / "more").mkdir()
        (checkpoint / "more" / "what tame put there").write_text("")
        for name, content in documents(checkpoint).items():
            (checkpoint / name).write_bytes(content)
    wanted = {*files(checkpoint), "README.md", "tame.json"}
    for name in RUBBISH:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("TOKEN=hf_secret")
    publish_folder(checkpoint, "mine", False, silent)
    assert remote(hub, "me/mine").keys() == wanted
    for name in RUBBISH:
        assert name.partition("/")[0] in caplog.text or name.startswith(".git")
    assert check("me/mine", None, silent) == []
    (checkpoint / "config.json").write_text('{"auto_map": {"AutoModel": "handler.Model"}}')
    if ours:
        with pytest.raises(BadInputError, match="was not published by tame"):
            publish_folder(checkpoint, "mine", False, silent)
    else:
        publish_folder(checkpoint, "code", False, silent)
        assert {"handler.py", "config.json"} < remote(hub, "me/code").keys()


def test_a_checkpoint_that_is_not_whole_is_refused(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    shard, index = checkpoint / "model-00002-of-00002.safetensors", checkpoint / "model.safetensors.index.json"
    elsewhere = shard.rename(tmp_path / "elsewhere")

    def refused(match: str) -> None:
        with pytest.raises(BadInputError, match=match) as caught:
            publish_folder(checkpoint, "mine", False, silent)
        assert "\n" not in str(caught.value)

    refused(r"index\.json names model-00002-of-00002\.safetensors, which is not there")
    shard.symlink_to(tmp_path / "gone")
    refused("model-00002-of-00002.safetensors: a link to .*gone, which is not there")
    shard.unlink()
    shard.symlink_to(elsewhere)  # as the Hub's cache does
    publish_folder(checkpoint, "whole", True, silent)
    stray = checkpoint / "tokenizer.model"
    stray.symlink_to(tmp_path / "gone")
    refused(r"tokenizer\.model: a link to .*gone")
    stray.unlink()
    extra = checkpoint / "model-00003-of-00003.safetensors"
    save_file({"c": torch.arange(8)}, extra)
    refused(r"model-00003-of-00003\.safetensors is a shard that no index names")
    single = extra.rename(checkpoint / "model.safetensors")
    refused(r"holds model\.safetensors and model-00001-of-00002\.safetensors, .* two checkpoints")
    single.unlink()
    index.write_text(index.read_text().replace('"b"', '"another"'))
    refused("does not hold another, which the index places there")
    index.write_text("{}")
    refused("no weight_map")
    index.unlink()
    refused("is a shard that no index names")
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 100)
    refused(r"model\.safetensors: the header claims")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "tiny-00001-of-00002.gguf").write_bytes(b"GGUF")
    refused(r"tiny-00002-of-00002\.gguf is not there")
    assert [name for _, name in hub.repos] == ["me/whole"]


def test_a_card_that_is_not_utf_8_is_refused(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_bytes("# Modèle\n".encode("latin-1"))
    with pytest.raises(BadInputError, match=r"README\.md: byte 5 is not UTF-8"):
        publish_folder(checkpoint, "mine", False, silent)
    assert hub.requests == []


def test_a_check_finds_a_changed_byte_and_a_missing_or_added_file(hub: Hub, folder: Path) -> None:
    release(folder)
    assert check(REPO, None, silent) == []
    shard = "model-00001-of-00002.safetensors"
    hub.corrupt(REPO, shard, honest=False)
    assert check(REPO, None, silent) == [line for line in check(REPO, None, silent) if line.startswith(f"{shard} was")]
    assert len(check(REPO, None, silent)) == 1
    hub.write(REPO, "generation_config.json", None)
    hub.write(REPO, "pytorch_model.bin", b"\x80")
    hub.write(REPO, "README.md", hub.read(REPO, "README.md") + b"better than the base model")
    found = "\n".join(check(REPO, None, silent))
    for line in ("generation_config.json is missing", "pytorch_model.bin was not published", "README.md was changed"):
        assert line in found


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pairs of keys; the first is configured."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("one", "other"):
        private = ec.generate_private_key(ec.SECP256R1())
        (tmp_path / f"{name}.key").write_bytes(
            private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (tmp_path / f"{name}.pub").write_bytes(
            private.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    monkeypatch.setenv("TAME_SIGNING_KEY", str(tmp_path / "one.key"))
    monkeypatch.setenv("TAME_SIGNING_PUBLIC_KEY", str(tmp_path / "one.pub"))
    return tmp_path


def test_signed_and_verified(hub: Hub, folder: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model.sig" in release(folder).uploaded
    assert release(folder).already  # a signature is new each time; an old one that fits stays
    assert check(REPO, None, silent) == []
    monkeypatch.delenv("TAME_SIGNING_KEY")
    assert release(folder).already  # whoever has no key leaves a signature that fits
    monkeypatch.setenv("TAME_SIGNING_KEY", str(keys / "one.key"))
    release(folder, extra=documents(folder, "# Another card\n", limit=0.2))
    assert check(REPO, None, silent) == []
    hub.corrupt(REPO, "tame.json")
    assert any("model.sig does not verify" in line for line in check(REPO, None, silent))
    hub.corrupt(REPO, "tame.json")
    monkeypatch.setenv("TAME_SIGNING_PUBLIC_KEY", str(keys / "other.pub"))
    assert any("model.sig does not verify" in line for line in check(REPO, None, silent))
    hub.write(REPO, "model.sig", None)
    assert check(REPO, None, silent) == ["model.sig is missing: it is not signed"]
    monkeypatch.setenv("TAME_SIGNING_KEY", str(keys / "nothing.key"))
    with pytest.raises(BadInputError, match="TAME_SIGNING_KEY"):
        preflight(recipe(), TARGETS, found("mit", False, 0))


def test_a_signed_folder_satisfies_the_format_s_own_program(folder: Path, keys: Path, tame_home: Path) -> None:
    target, spec = keys / "out" / "tiny-nf4", Publish(to="folder")
    for already in (False, True):
        done = publish(folder, files(folder), documents(folder), str(target), spec, progress=silent)
        assert done.already == already
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        str(target),
        "--public_key",
        str(keys / "one.pub"),
    ]
    command += ["--signature", str(target / "model.sig"), "--ignore-paths", str(target / "model.sig")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (target / "generation_config.json").write_text("{}")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert any("model.sig does not verify" in line for line in check(str(target), None, silent))
