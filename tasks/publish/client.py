"""How publishing talks to the Hub, through huggingface_hub: with whose token, how patiently, and what a no means.

The client tries again by itself where files are moved; `ask` does so for the requests where it does not and where
asking twice is the same as asking once. A commit is neither: whoever makes one looks at what is there before the next.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from configs.errors import BadInputError, ChangedError, MissingError, TameError, UnreachableError
from tasks.download.hub import endpoint

T = TypeVar("T")
log = logging.getLogger("tame.publish")

ASKS = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT = 300.0
TIMEOUT = 60.0  # seconds, of questions
LIMITS = {"connect": 20.0, "read": 300.0, "write": 300.0, "pool": None}  # seconds


def connect(required: bool = True) -> Any:
    """The Hub's API with this user's token.

    Raises:
        BadInputError: no token is set, and one is `required`.
    """
    from httpx2 import Timeout
    from huggingface_hub import HfApi, get_session, get_token

    get_session().timeout = Timeout(**LIMITS)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    token = get_token()
    if not token and required:
        raise BadInputError(
            f"publishing to {endpoint()} needs a token: set HF_TOKEN to one that may write ({endpoint()}/settings/tokens), or "
            "run `hf auth login`"
        )
    return HfApi(endpoint=endpoint(), token=token or False)


def ask(repo: str, request: Callable[[], T]) -> T:
    """Make a request that is safe to repeat, again after a pause when the Hub has none of it for now."""
    for pause in (*ASKS, None):
        try:
            with explained(repo):
                return request()
        except UnreachableError as error:
            if pause is None:
                raise
            wait(error, pause)
    raise AssertionError


def wait(error: UnreachableError, pause: float) -> None:
    """Wait `pause` seconds, or as long as the Hub asked to wait, if that is longer.

    Raises:
        TameError: the Hub asks for more than LONGEST_WAIT.
    """
    seconds = max(pause, error.after)
    if seconds > LONGEST_WAIT:
        raise TameError(f"{error}, and asks to wait {seconds:.0f} s; run it again then") from None
    log.info("%s; trying again in %.0f s", error, seconds)
    time.sleep(seconds)


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn what the Hub client raises while publishing into one sentence that says what to do.

    Lets RepositoryNotFoundError pass: whether that is wrong, the caller knows.

    Raises:
        BadInputError: the token is not accepted, or may not write there.
        UnreachableError: no connection, 408, 429, 5xx. Its `after` is the Hub's Retry-After, s.
        TameError: anything else that the Hub refuses.
    """
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from None
    except errors.OfflineModeIsEnabled:
        raise BadInputError(
            f"{repo}: HF_HUB_OFFLINE is set, so nothing can be published to {endpoint()}; unset it"
        ) from None
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise UnreachableError(f"the connection to {endpoint()} broke ({type(error).__name__})") from None
    except json.JSONDecodeError:
        raise UnreachableError(f"{endpoint()} answered something that is not the Hub's") from None
    except RuntimeError as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(repo, cause) from None
        if isinstance(cause, httpx2.HTTPError | ConnectionError | TimeoutError):
            raise UnreachableError(f"the upload to {endpoint()} broke ({type(cause).__name__})") from None
        raise UnreachableError(f"the upload to {endpoint()} failed ({_clean(str(error))})") from None
    except (ValueError, OSError) as error:
        raise TameError(f"{repo}: {_clean(str(error))}") from None


def _refused(repo: str, error: Any) -> TameError:
    code = error.response.status_code
    said = _said(error)
    if code == 401:
        return _bad_token()
    if code == 403:
        return BadInputError(f"{repo}: the Hub at {endpoint()} refuses it: {said}; {_remedy(repo, said)}")
    if code in (408, 429) or code >= 500:
        return UnreachableError(f"the Hub at {endpoint()} answers {code}", _asked_to_wait(error.response.headers))
    if code in (409, 412):
        return ChangedError(f"{repo} changed while it was being published ({said}); run it again")
    kind = MissingError if code == 404 else TameError
    return kind(f"{repo}: the Hub at {endpoint()} answers {code} ({said})")


def _remedy(repo: str, said: str) -> str:
    """What to do about a 403, which the Hub gives for more than a token that may not write."""
    words = said.lower()
    if "discussion" in words or "pull request" in words:
        return f"a published repo is changed by a pull request: allow discussions on {endpoint()}/{repo}/settings"
    if any(word in words for word in ("storage", "quota", "limit", "billing", "upgrade")):
        return f"remove what is not needed any more, or see {endpoint()}/settings/billing"
    if any(word in words for word in ("rights", "permission", "write", "token", "authorized", "credentials")):
        return "use a token in HF_TOKEN that may, or another name"
    return "see its owner's settings, or give another name"


def _bad_token() -> BadInputError:
    return BadInputError(
        f"{endpoint()} does not accept the token in HF_TOKEN (or of `hf auth login`); make one that may write on "
        f"{endpoint()}/settings/tokens"
    )


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
