"""How publishing talks to the Hub, through huggingface_hub: with whose token, how patiently, and what a no means.

The client tries again by itself where files are moved; `ask` does so for the requests where it does not and where
asking twice is the same as asking once. A commit is neither: whoever makes one looks at what is there before the next.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from configs.errors import BadInputError, TameError, UnreachableError
from tasks.download.hub_client import endpoint, explained

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
            with explained(repo, publishing=True):
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
