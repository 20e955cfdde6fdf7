"""Can it be published there at all? Asked before anything is made, without Prefect.

BadInputError where the recipe or the token is wrong, TameError where this machine is not up to it.
"""

import functools
import os
import shutil
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, MissingError, TameError, line
from configs.schema import CardFacts, Recipe
from tasks.download.hub_client import endpoint
from tasks.publish import provenance
from tasks.publish.card_metadata import inherited, with_front_matter
from tasks.publish.client import TIMEOUT, ask, connect
from tasks.publish.repo import not_renamed
from tasks.publish.signing import signer
from tasks.publish.transfer import content
from tasks.values import Found

# Licences whose text sets conditions on passing the model on, or forbids it. None is one too: no licence, no permission.
CONDITIONAL = (
    "llama",
    "gemma",
    "other",
    "cc-by-nd",
    "cc-by-nc-nd",
    "openrail",
    "bigscience",
    "falcon",
    "qwen",
    "unknown",
)


def preflight(recipe: Recipe, repos: dict[str, str], found: Found | None) -> list[str]:
    """Check, before anything is made, that every variant can be published where it is to go. Returns warnings.

    `found` is the source; None while nobody has looked at it.

    Raises:
        BadInputError: no token, or one that is not accepted or may not write there; a name that the Hub does not allow; a
            target that holds what tame did not put there, or is public and should be private; no space in a folder; a card
            of the source whose metadata the Hub does not take.
        UnreachableError: the Hub does not answer.
    """
    spec = recipe.publish
    if spec.to == "nowhere" or not repos:
        return []
    if len({repo.lower() for repo in repos.values()}) < len(repos):
        raise BadInputError(f"publish.repo {spec.repo!r} is the same for two variants; put {{variant}} in it")
    signer("")
    if spec.to == "folder":
        for repo in repos.values():
            folder(Path(repo))
        return space(repos, found.bytes if found else 0)
    for repo in repos.values():
        legal(repo)
    api = connect()
    replaced = []
    for repo in repos.values():
        name = full_name(repo, api)
        may_write(api, name)
        replaced += free(api, name, spec.private, recipe.source.model)
    if found is None:
        return replaced
    model = recipe.source.model
    if found.card or spec.card != CardFacts():
        front = inherited(model, found.commit, found.licence, found.card, facts=spec.card)
        front["tags"] = spec.card.tags
        whose = f"the card of {model}, from which the new ones inherit,"
        metadata(api, with_front_matter(front, []), whose if found.card else "publish.card")
    warnings = licence(model, spec.card.license or found.licence, found.gated)
    if warnings and spec.licence_check == "refuse":
        raise BadInputError(f"{warnings[0]}; publish.licence_check is refuse")
    return warnings + replaced


def legal(repo: str) -> None:
    """Check that the Hub allows the name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise BadInputError(
            f"{repo!r} is not a name that the Hub allows: owner/name of letters, digits, '-', '_', '.', 96 characters at most, "
            "no '--' or '..'"
        ) from None


def utf8(card: Path) -> None:
    """Check that a card is text that the Hub can read."""
    try:
        card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{card}: byte {error.start} is not UTF-8; save it as UTF-8") from None


@functools.cache
def account(address: str, token: str) -> dict[str, Any]:
    """Who the token belongs to, asked once: the Hub answers this seldom to those who ask often."""
    from huggingface_hub import HfApi

    who: dict[str, Any] = ask("your account", HfApi(endpoint=address, token=token).whoami)
    return who


def full_name(repo: str, api: Any) -> str:
    """`repo` with its owner: who the token belongs to, where it has none."""
    return repo if "/" in repo else f"{account(api.endpoint, api.token)['name']}/{repo}"


def full_names(repos: dict[str, str]) -> dict[str, str]:
    """`full_name` of each Hub repo, by its label."""
    api = connect()
    return {label: full_name(repo, api) for label, repo in repos.items()}


def may_write(api: Any, repo: str) -> None:
    """Check that the token may write to `repo`."""
    who, owner = account(api.endpoint, api.token), repo.split("/")[0]
    access = (who.get("auth") or {}).get("accessToken") or {}
    mine = {who["name"]} | {org["name"] for org in who.get("orgs") or [] if org.get("roleInOrg") != "read"}
    if access.get("role") == "read":
        raise BadInputError(
            f"the token in HF_TOKEN may only read; make one that may write to {repo} on {endpoint()}/settings/tokens"
        )
    if owner.lower() not in {name.lower() for name in mine}:
        raise BadInputError(
            f"{who['name']} (the token in HF_TOKEN) may not write to {repo}; names that may: {', '.join(sorted(mine))}"
        )
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if scopes is not None and not _scoped(scopes, repo):
        raise BadInputError(
            f"the token in HF_TOKEN has no write permission for {repo}; grant it on {endpoint()}/settings/tokens"
        )


def free(api: Any, repo: str, private: bool, model: str | None) -> list[str]:
    """Check that `repo` does not exist yet, or is one of tame's. Warns if it holds another model's release."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = ask(repo, lambda: api.model_info(repo, timeout=TIMEOUT))
    except (RepositoryNotFoundError, MissingError):
        return []
    not_renamed(repo, info.id)
    names = {sibling.rfilename for sibling in info.siblings or []}
    if not names - {".gitattributes"}:
        return []
    if provenance.NAME not in names:
        raise BadInputError(
            f"{repo} is there and tame did not make it (it has no {provenance.NAME}); give another name, or empty it"
        )
    if private and not info.private:
        raise BadInputError(
            f"{repo} is public and publish.private is true; set publish.private: false, or make it private on "
            f"{endpoint()}/{repo}/settings"
        )
    before = provenance.source_of(content(api, repo, info.sha, provenance.NAME, 0))
    if model is None or before in (None, provenance.base_name(model)):
        return []
    return [f"{repo} holds a release made from {before}; what is made from {model} will replace it"]


def metadata(api: Any, card: str, whose: str) -> None:
    """Check that the Hub accepts the front matter of `card`. Otherwise it would refuse the card when all work is done.

    Raises:
        BadInputError: the Hub refuses it. The message has all of its reasons, and says `whose` card it is.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    def once() -> Any:
        url = f"{api.endpoint}/api/validate-yaml"
        answer = get_session().post(
            url, json={"content": card, "repoType": "model"}, headers=build_hf_headers(token=api.token)
        )
        if answer.status_code != 400:
            hf_raise_for_status(answer)
        return answer.json()

    try:
        validation = ask("the card", once)
    except MissingError:  # a Hub that does not check cards
        return
    if reasons := [line(str(error.get("message")), limit=None) for error in validation.get("errors") or []]:
        raise BadInputError(f"{whose} has metadata that {endpoint()} does not take: {'; '.join(reasons)}")


def _scoped(scopes: list[dict[str, Any]], repo: str) -> bool:
    names = {repo.lower(), repo.split("/")[0].lower()}
    return any(
        str((scope.get("entity") or {}).get("name", "")).lower() in names
        and "repo.write" in (scope.get("permissions") or [])
        for scope in scopes
    )


def licence(model: str, licence: str | None, gated: bool) -> list[str]:
    """What the base model's licence (or licences, with commas) and gating say about passing it on."""
    warnings = []
    licences = licence.lower().split(", ") if licence else []
    local = model.startswith("package:") or provenance.is_path(model) or Path(model).exists()
    if not licence and not local:
        warnings.append(f"{model} states no licence, so nothing permits passing it on; ask its owner")
    if any(one.startswith(CONDITIONAL) for one in licences):
        warnings.append(
            f"{model} is under {licence!r}, which sets conditions on passing it on; read it before you publish"
        )
    if any(one.startswith("cc-by-nc") for one in licences):
        warnings.append(f"{model} is under {licence!r}: not for commercial use, and neither is what is made from it")
    if gated:
        warnings.append(f"{model} is gated: its owner decides who gets it, and what is published here goes around that")
    return warnings


def folder(target: Path) -> None:
    """Check that the folder can be made, or written, and holds nothing of somebody else's."""
    at = target = target.resolve()
    while not at.exists():
        at = at.parent
    if not at.is_dir():
        raise TameError(f"{target}: {at} is a file, so no folder can be made there; give another publish.repo")
    if not os.access(at if at != target else at.parent, os.W_OK | os.X_OK):
        raise TameError(f"{target}: {at} cannot be written; make it writable or give another publish.repo")
    if at == target and any(target.iterdir()) and not (target / provenance.NAME).exists():
        raise BadInputError(f"{target} holds files that tame did not put there; give another publish.repo, or empty it")


def space(repos: dict[str, str], source_bytes: int) -> list[str]:
    """Check that there is room for every variant: at least a quarter of the source's size. Warns below the source's size."""
    at = Path(next(iter(repos.values())))
    while not at.exists():
        at = at.parent
    free, least = shutil.disk_usage(at).free, source_bytes // 4 * len(repos)
    if free < least:
        raise TameError(f"{at} has {free / 1e9:.1f} GB free; {len(repos)} variants need {least / 1e9:.1f} GB or more")
    if free < source_bytes * len(repos):
        return [f"{at} has {free / 1e9:.1f} GB free, which may not be enough for {len(repos)} variants"]
    return []
