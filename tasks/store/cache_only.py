"""Finds out whether everything is cached: inside `nothing_made`, a missing artifact raises, and is neither made nor waited for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from configs.errors import NotCachedError

_only_there: ContextVar[bool] = ContextVar("_only_there", default=False)


@contextmanager
def nothing_made() -> Iterator[None]:
    """Within this, whatever is not on this machine yet raises NotCachedError instead of being made, fetched or waited for."""
    token = _only_there.set(True)
    try:
        yield
    finally:
        _only_there.reset(token)


def may_make(what: str) -> None:
    """See that `what` may be made or fetched.

    Raises:
        NotCachedError: it is asked for only in case it is there, within `nothing_made`.
    """
    if _only_there.get():
        raise NotCachedError(f"{what} is not in the cache")
