"""How tame speaks to the Hub through huggingface_hub, for reading and for publishing: where it is, and what its answers mean.

One translation of what the client raises, so that the same answer is told in the same words wherever it is met.
"""

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

from configs.errors import BadInputError, BusyError, ChangedError, MissingError, TameError, UnreachableError


def endpoint() -> str:
    """The Hub's address."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


@contextmanager
def explained(repo: str, revision: str | None = None, publishing: bool = False) -> Iterator[None]:
    """Turn what the Hub client raises about `repo` into one sentence that says what to do.

    While `publishing`, RepositoryNotFoundError passes: whether that is wrong, the caller knows.

    Raises:
        BadInputError: gated, missing or private repo, unknown revision, a token that is not accepted or may not do it.
        UnreachableError: no connection. BusyError, a kind of it: 408, 429, 5xx; its `after` is the Hub's Retry-After, s.
        ChangedError: somebody else has changed the repo meanwhile (409, 412).
        MissingError: the repo has no such page (404).
        TameError: anything else that the Hub refuses, or that the client cannot do.
    """
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        if publishing:
            raise
        raise _absent(repo, error) from None
    except errors.LocalEntryNotFoundError:
        raise UnreachableError(f"the Hub at {endpoint()} cannot be reached") from None
    except errors.HfHubHTTPError as error:
        raise _answered(repo, revision, error, publishing) from None
    except errors.OfflineModeIsEnabled:
        if publishing:
            raise BadInputError(
                f"{repo}: HF_HUB_OFFLINE is set, so nothing can be published to {endpoint()}; unset it"
            ) from None
        raise UnreachableError(f"the Hub at {endpoint()} is not asked (HF_HUB_OFFLINE is set)") from None
    except errors.HFValidationError:
        raise BadInputError(f"{repo!r} is not a legal Hub repo id; expected owner/name") from None
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise _broken(error) from None
    except json.JSONDecodeError:
        raise UnreachableError(f"{endpoint()} answered something that is not the Hub's") from None
    except RuntimeError as error:  # of Xet, or where the client moves several files at once
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _answered(repo, revision, cause, publishing) from None
        if isinstance(cause, httpx2.HTTPError | ConnectionError | TimeoutError):
            raise _broken(cause) from None
        raise UnreachableError(f"the Hub's client at {endpoint()} failed ({_clean(str(error))})") from None
    except (ValueError, OSError) as error:
        raise TameError(f"{repo}: {_clean(str(error))}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no warnings of the client's own: tame shows its own progress."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not before:
            enable_progress_bars()


def _absent(repo: str, error: Any) -> TameError:
    """What it means that there is no such repo, as far as this token may know."""
    from huggingface_hub.errors import GatedRepoError

    page = f"{endpoint()}/{repo}"
    if isinstance(error, GatedRepoError):
        return BadInputError(
            f"{repo} is gated: ask for access on {page}, then set HF_TOKEN to a token of that account (or run `hf auth login`)"
        )
    if error.response.status_code == 401 and os.environ.get("HF_TOKEN"):
        return BadInputError(
            f"{repo}: the Hub does not accept the token in HF_TOKEN (401), or there is no such repo; see {page}"
        )
    return BadInputError(
        f"{repo} does not exist on {endpoint()}, or is private: check the name, or set HF_TOKEN to a token that may read it"
    )


def _answered(repo: str, revision: str | None, error: Any, publishing: bool) -> TameError:
    """What an answer other than 2xx means."""
    from huggingface_hub.errors import RevisionNotFoundError

    code, page, said = error.response.status_code, f"{endpoint()}/{repo}", _said(error)
    if isinstance(error, RevisionNotFoundError):
        return BadInputError(f"{repo} has no revision {revision!r}; see {page}/tree/main for its branches and tags")
    if code == 401:
        may = "may write" if publishing else f"may read {page}"
        return BadInputError(
            f"{endpoint()} does not accept the token in HF_TOKEN (or of `hf auth login`); make one that {may} on "
            f"{endpoint()}/settings/tokens"
        )
    if code == 403:
        return BadInputError(f"{repo}: the Hub at {endpoint()} refuses it: {said}; {_remedy(repo, said)}")
    if code in (408, 429) or code >= 500:
        return BusyError(f"the Hub at {endpoint()} answers {code}", _asked_to_wait(error.response.headers))
    if code in (409, 412):
        return ChangedError(f"{repo} changed while it was being published ({said}); run it again")
    kind = MissingError if code == 404 else TameError
    return kind(f"{repo}: the Hub at {endpoint()} answers {code} ({said})")


def _broken(error: BaseException) -> UnreachableError:
    return UnreachableError(f"the Hub at {endpoint()} cannot be reached ({type(error).__name__})")


def _remedy(repo: str, said: str) -> str:
    """What to do about a 403, which the Hub gives for more than a token that may not do it."""
    words = said.lower()
    if "discussion" in words or "pull request" in words:
        return f"a published repo is changed by a pull request: allow discussions on {endpoint()}/{repo}/settings"
    if any(word in words for word in ("storage", "quota", "limit", "billing", "upgrade")):
        return f"remove what is not needed any more, or see {endpoint()}/settings/billing"
    if any(word in words for word in ("rights", "permission", "write", "token", "authorized", "credentials")):
        return "use a token in HF_TOKEN that may, or another name"
    return "see its owner's settings, or give another name"


def _said(error: Any) -> str:
    said = error.response.headers.get("X-Error-Message") or getattr(error, "server_message", None) or "no reason given"
    return _clean(str(said))


def _clean(text: str) -> str:
    """`text` on one line, without the token, and without the queries of addresses, which may sign a download."""
    from huggingface_hub import get_token

    line = "; ".join(part for part in (line.strip(" -") for line in text.splitlines()) if part) or "no reason given"
    for secret in {get_token(), os.environ.get("HF_TOKEN")} - {None, ""}:
        line = line.replace(str(secret), "hf_…")
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", line)[:2000]


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds, from Retry-After (a number or a date, RFC 9110) or the Hub's own RateLimit header."""
    from huggingface_hub.utils import parse_ratelimit_headers

    given = headers.get("Retry-After", "").strip()
    if given.isdecimal():
        return float(given)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else 0.0
