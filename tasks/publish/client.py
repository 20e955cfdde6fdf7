"""How publishing talks to the Hub, through huggingface_hub: with whose token, how patiently, and what a no means.

The client tries again by itself where files are moved; `ask` does so for the requests where it does not and where
asking twice is the same as asking once. A commit is neither: whoever makes one looks at what is there before the next.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from configs.errors import BadInputError, TameError, UnreachableError
from tasks.download.hub_client import endpoint, explained
from tasks.runtime.retry import retry

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

    def attempt() -> T:
        with explained(repo, publishing=True):
            return request()

    return again_when_reached(attempt, ASKS)


def again_when_reached(attempt: Callable[[], T], pauses: Iterable[float]) -> T:
    """Call `attempt` again after each of `pauses`, or after as many seconds as the Hub asks for, while it cannot be reached."""
    return retry(
        attempt,
        pauses,
        lambda error: isinstance(error, UnreachableError),
        lambda error, pause, _: seconds_to_wait(error, pause),
    )


def seconds_to_wait(error: Exception, pause: float) -> float:
    """`pause`, or the seconds that the Hub asked to wait, if those are more; says so.

    Raises:
        TameError: the Hub asks for more than LONGEST_WAIT.
    """
    seconds = max(pause, error.after if isinstance(error, UnreachableError) else 0.0)
    if seconds > LONGEST_WAIT:
        raise TameError(f"{error}, and asks to wait {seconds:.0f} s; run it again then") from None
    log.info("%s; trying again in %.0f s", error, seconds)
    return seconds
