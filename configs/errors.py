"""The two ways a release ends early. The message is one line for a person: what, where, the value, what to do."""

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


def line(error: BaseException) -> str:
    """What an exception of somebody else's says, in one line of at most 300 characters."""
    return without_credentials(" ".join(str(error).split()))[:300]


def named_line(error: BaseException) -> str:
    """The same with its class."""
    text = line(error)
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
