"""Every exception of tame, and how an exception becomes one line for a person: what, where, the value, what to do.

TameError              something failed; exit code 1
├── BadInputError      the recipe, the arguments or the source are wrong, and nothing was touched; exit code 2
│   └── AdapterError   the source is an adapter alone, of a base that is elsewhere
├── UnreachableError   a service does not answer, or not now; trying again may help
│   ├── BusyError      it answers that it cannot answer now (429, 5xx)
│   └── AwayError      it was tried again for as long as tame waits, and still does not answer
├── CorruptedError     a file is not what its digest or its manifest says
├── ChangedError       somebody else, or an attempt whose answer was lost, changed it first
├── MissingError       the Hub has no such page
├── KilledError        the process of a stage ended without a result
├── NotCachedError     no fault: something has to be made, and was asked for only in case it is there
└── ReachedError       no fault: a forward pass ends early, as what it was run for is known

Whoever can do something about one of them catches it by its name; everybody else lets it pass to the flow or to the command line.
"""

import re
from urllib.parse import urlsplit

ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]+")
SECRET = re.compile(r"(?i)([?&;][\w.-]*(?:password|passwd|pwd|token|secret|key|signature|credential)[\w.-]*=)[^&;#]*")


class TameError(Exception):
    """Something failed that the user should read about in one line. Exit code 1."""

    exit_code = 1


class BadInputError(TameError):
    """The recipe, the arguments or the source are wrong, and nothing was touched. Exit code 2."""

    exit_code = 2


class AdapterError(BadInputError):
    """The source is an adapter alone, not a model. Whoever looks at it looks at its base too."""


class UnreachableError(TameError):
    """A service (the Hub, the shared store) does not answer, or not now. Trying again may help.

    Args:
        message: The line for people.
        after: Seconds that the service asked to wait before the next request; 0 if it asked for nothing.
    """

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class BusyError(UnreachableError):
    """The service answers that it cannot answer now: HTTP 429 or 5xx."""


class AwayError(UnreachableError):
    """The service was tried again for as long as tame waits, and still does not answer: only a later run can help."""


class CorruptedError(TameError):
    """A file is not what its digest says, or a manifest does not describe its artifact."""


class ChangedError(TameError):
    """Somebody else, or an attempt of ours whose answer was lost, has changed a repo meanwhile."""


class MissingError(TameError):
    """The Hub has no such page: HTTP 404."""


class NotCachedError(TameError):
    """Something has to be made or fetched, and was asked for only in case it is there already."""


class KilledError(TameError):
    """The process of a stage ended without a result: it was killed, or it crashed."""


class ReachedError(TameError):
    """No fault: a forward pass ends early, as what it was run for is known. Whoever runs the pass catches it."""


def line(error: BaseException | str, limit: int | None = 300) -> str:
    """What an exception or a library's message says, in one line, without credentials.

    Args:
        error: The exception, or its text.
        limit: The most characters that are kept; None keeps all of them.
    """
    return without_credentials(" ".join(str(error).split()))[:limit]


def named_line(error: BaseException, limit: int | None = 300) -> str:
    """The same, with the exception's class before it. An exception of tame's own says all that there is to say: its text alone."""
    if isinstance(error, TameError):
        return line(error, limit=None)
    text = line(error, limit)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def without_credentials(text: str) -> str:
    """`text` with every address in it as `bare_address` gives it."""
    return ADDRESS.sub(lambda found: bare_address(found[0]), text)


def bare_address(address: str) -> str:
    """An address without its user, its password and the secrets in its query: what may be printed of it.

    A password in which `@`, `/`, `?` or `#` were not escaped ends for a parser where it does not end for the person who wrote
    it, so an `@` behind the host is taken for the end of the password, and what is before it is not printed either.
    """
    host = urlsplit(address.replace("[", "").replace("]", "")).netloc  # brackets of no IPv6 address are a ValueError
    if "@" in host or (":" in host and "@" in address):
        address = f"{address.partition('://')[0]}://{address.rpartition('@')[2]}"
    return SECRET.sub(r"\1…", address)
