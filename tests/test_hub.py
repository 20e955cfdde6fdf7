"""The Hub that the other tests publish to, tried by the real client."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.hub import Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub(part_size=1 << 20) as hub:
        yield hub


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(3_500_000))
    return path


def upload(api: HfApi, weights: Path, **commit: object) -> str:
    operations = [CommitOperationAdd("model.safetensors", weights), CommitOperationAdd("config.json", b"{}\n")]
    return api.create_commit("me/tiny", operations, commit_message="files", **commit).oid


def test_what_is_uploaded_in_parts_comes_back_and_is_listed_by_digest(hub: Hub, weights: Path, tmp_path: Path) -> None:
    api = HfApi(hub.url, token=hub.token())
    api.create_repo("me/tiny", private=True)
    commit = upload(api, weights)
    assert sum("/lfs/" in request and request.startswith("PUT") for request in hub.requests) == 4
    tree = {file.path: file for file in api.list_repo_tree("me/tiny", recursive=True)}
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (tree["model.safetensors"].lfs.sha256, tree["model.safetensors"].size) == (digest, 3_500_000)
    info = api.model_info("me/tiny", files_metadata=True)
    assert (info.private, info.sha) == (True, commit)
    assert {s.rfilename: s.blob_id for s in info.siblings}["config.json"] == tree["config.json"].blob_id
    folder = Path(snapshot_download("me/tiny", endpoint=hub.url, token=hub.token(), cache_dir=tmp_path / "cache"))
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert (folder / "config.json").read_bytes() == b"{}\n"
    assert folder.name == commit


def test_who_may_do_what(hub: Hub, weights: Path, tmp_path: Path) -> None:
    owner, reader = HfApi(hub.url, token=hub.token()), HfApi(hub.url, token=hub.token("read"))
    stranger, nobody = HfApi(hub.url, token=hub.token(user="you", orgs=())), HfApi(hub.url, token=False)
    owner.create_repo("org/tiny", private=True)
    assert reader.model_info("org/tiny").private
    for api in (stranger, nobody):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/tiny")
    owner.update_repo_settings("org/tiny", private=False, gated="manual")
    assert nobody.model_info("org/tiny").gated == "manual"
    with pytest.raises(GatedRepoError):
        snapshot_download("org/tiny", endpoint=hub.url, token=hub.token(user="you", orgs=()), cache_dir=tmp_path)
    hub.grant("you", "org/tiny")
    snapshot_download("org/tiny", endpoint=hub.url, token=hub.token(user="you", orgs=()), cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("org/other")
    owner.create_repo("me/tiny")
    with pytest.raises(HfHubHTTPError, match="403"):
        upload(reader, weights)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(hub.url, token="hf_nonsense").whoami()


def test_pull_requests_tags_and_parents(hub: Hub, weights: Path) -> None:
    api = HfApi(hub.url, token=hub.token())
    api.create_repo("me/tiny")
    first = upload(api, weights)
    operations = [CommitOperationAdd("README.md", b"# hello\n"), CommitOperationDelete("config.json")]
    proposed = api.create_commit("me/tiny", operations, commit_message="a card", create_pr=True, parent_commit=first)
    assert proposed.pr_revision == "refs/pr/1"
    assert "README.md" not in hub.model("me/tiny").files()
    assert [d.title for d in api.get_repo_discussions("me/tiny", discussion_status="open")] == ["a card"]
    api.merge_pull_request("me/tiny", 1)
    assert {"README.md", "model.safetensors"} <= hub.model("me/tiny").files().keys()
    assert "config.json" not in hub.model("me/tiny").files()
    api.create_tag("me/tiny", tag="v1")
    refs = api.list_repo_refs("me/tiny", include_pull_requests=True)
    assert refs.tags[0].target_commit == refs.branches[0].target_commit == hub.model("me/tiny").at("main")
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(api, weights, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("me/tiny", tag="v1")


def test_faults_come_when_they_are_asked_for(hub: Hub, weights: Path, tmp_path: Path) -> None:
    hub.add_model("org/tiny", weights.parent)
    api = HfApi(hub.url, token=hub.token())
    hub.fail("/api/models/org/tiny", 503, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="503"):
            api.model_info("org/tiny")
    hub.fail("/cdn/", cut=1_000_000)
    folder = Path(snapshot_download("org/tiny", endpoint=hub.url, token=False, cache_dir=tmp_path / "a"))
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert sum("GET /cdn/" in request for request in hub.requests) == 2
    hub.fail("/cdn/", corrupt=True)
    folder = Path(snapshot_download("org/tiny", endpoint=hub.url, token=False, cache_dir=tmp_path / "b"))
    assert (folder / "model.safetensors").read_bytes() != weights.read_bytes()
