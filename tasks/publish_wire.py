"""What publishing says to the Hub, through huggingface_hub: one upload, one download, and what to do when it says no.

The client tries again by itself where files are moved; `ask` does so for the requests where it does not and where
asking twice is the same as asking once. A commit is neither: whoever makes one looks at what is there before the next.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import Any, BinaryIO, TypeVar

from configs.errors import BadInputError, TameError
from tasks.hub import UnreachableError, endpoint
from tasks.progress import Progress

T = TypeVar("T")
log = logging.getLogger("tame.publish")

ASKS = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT = 300.0
TIMEOUT = 60.0  # seconds, of questions
LIMITS = {"connect": 20.0, "read": 300.0, "write": 300.0, "pool": None}  # seconds
TOO_LARGE = 50_000_000_000  # the Hub serves larger files by Xet alone


class ChangedError(TameError):
    """Somebody, or an attempt whose answer was lost, was there before."""


class MissingError(TameError):
    """The Hub has no such page."""


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
    seconds = max(pause, getattr(error, "after", 0.0))
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
        return BadInputError(
            f"the token in HF_TOKEN may not write to {repo} ({said}); use one that may, or another name"
        )
    if code in (408, 429) or code >= 500:
        later = UnreachableError(f"the Hub at {endpoint()} answers {code}")
        later.after = _asked_to_wait(error.response.headers)  # type: ignore[attr-defined]
        return later
    if code in (409, 412):
        return ChangedError(f"{repo} changed while it was being published ({said}); run it again")
    kind = MissingError if code == 404 else TameError
    return kind(f"{repo}: the Hub at {endpoint()} answers {code} ({said})")


def _bad_token() -> BadInputError:
    return BadInputError(
        f"{endpoint()} does not accept the token in HF_TOKEN (or of `hf auth login`); make one that may write on "
        f"{endpoint()}/settings/tokens"
    )


def _said(error: Any) -> str:
    said = error.response.headers.get("X-Error-Message") or getattr(error, "server_message", None) or "no reason given"
    return _clean(str(said))


def _clean(text: str) -> str:
    """The first line of `text`, short, and without the token."""
    from huggingface_hub import get_token

    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    for secret in {get_token(), os.environ.get("HF_TOKEN")} - {None, ""}:
        line = line.replace(str(secret), "hf_…")
    return line.split("?")[0][:300]


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds, from Retry-After (a number or a date, RFC 9110) or the Hub's own RateLimit header."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    given = headers.get("Retry-After", "").strip()
    if given.isdecimal():
        return float(given)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else 0.0


def upload(
    api: Any,
    repo: str,
    additions: dict[str, str | bytes],
    removals: list[str],
    parent: str,
    message: str,
    progress: Progress,
    revision: str | None = None,
    pull_request: bool = False,
) -> Any:
    """Upload `additions` (paths or contents by name) and make one commit on `parent`, as a pull request if asked."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    class Addition(CommitOperationAdd):
        """A file that tells how far it has been read."""

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
            with super().as_file() as file:
                if with_tqdm:
                    read = file.read
                    file.read = lambda size=-1: told(read(size))  # type: ignore[method-assign]
                yield file

    operations = [Addition(name, content) for name, content in sorted(additions.items())]
    total = sum(operation.upload_info.size for operation in operations)
    done = 0

    def told(piece: bytes) -> bytes:
        nonlocal done
        done += len(piece)
        progress(f"upload {repo}", min(done, total - 1), total)  # what is sent again counts again, up to the end
        return piece

    removing = [CommitOperationDelete(name) for name in removals]
    log.info("upload %s: %d files, %.1f MB", repo, len(operations), total / 1e6)
    with explained(repo), _quiet():
        _choose_transfer(api, repo)
        commit = api.create_commit(
            repo,
            [*operations, *removing],
            commit_message=message,
            revision=revision,
            create_pr=pull_request,
            parent_commit=parent,
        )
    progress(f"upload {repo}", total, total)
    return commit


def _choose_transfer(api: Any, repo: str) -> None:
    """Large files go by Xet where the Hub has it. Where it has not, the client does not find out by itself."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils._headers import build_hf_headers

    if constants.HF_HUB_DISABLE_XET or endpoint() == "https://huggingface.co":
        return
    url = f"{api.endpoint}/api/models/{repo}/xet-write-token/main"
    answer = get_session().get(url, headers=build_hf_headers(token=api.token))
    if "x-xet-cas-url" not in answer.headers:
        log.debug("%s has no Xet storage (%d): large files go by LFS", api.endpoint, answer.status_code)
        constants.HF_HUB_DISABLE_XET = True


def fetch(
    api: Any,
    repo: str,
    commit: str,
    name: str,
    size: int,
    sink: BinaryIO | None = None,
    told: Callable[[int], None] = lambda size: None,
) -> str:
    """Download one file past every cache, into `sink` if there is one, and return its sha256.

    A connection that breaks is resumed by the client. `told` hears the size of each piece. Files larger than TOO_LARGE
    are not fetched: "".
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    if size > TOO_LARGE:
        return ""
    url = hf_hub_url(repo, name, revision=commit, endpoint=api.endpoint)

    def once() -> str:
        hasher = _Hasher(sink, told)
        with _quiet():
            http_get(url, hasher, headers=build_hf_headers(token=api.token), expected_size=size or None)  # type: ignore[arg-type]
        return hasher.digest.hexdigest()

    return ask(repo, once)


def content(api: Any, repo: str, commit: str, name: str, size: int) -> bytes:
    """The content of one small file."""
    sink = BytesIO()
    fetch(api, repo, commit, name, size, sink)
    return sink.getvalue()


class _Hasher:
    """What the client writes a download into: it may start over, and never skips."""

    def __init__(self, sink: BinaryIO | None, told: Callable[[int], None]) -> None:
        self.sink, self.told = sink, told
        self.restart()

    def restart(self) -> None:
        self.digest, self.at = hashlib.sha256(), 0
        if self.sink:
            self.sink.seek(0)
            self.sink.truncate()

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        self.at += len(piece)
        if self.sink:
            self.sink.write(piece)
        self.told(len(piece))
        return len(piece)

    def tell(self) -> int:
        return self.at

    def seek(self, position: int) -> int:
        if position != self.at:
            self.restart()
        return self.at

    def truncate(self) -> int:
        return self.at


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings of the client's own: tame shows its own progress."""
    import warnings

    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not before:
            enable_progress_bars()
