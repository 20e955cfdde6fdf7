"""The two ways a release ends early. The message is one line for a person: what, where, the value, what to do."""

import re


class TameError(Exception):
    """Something failed that the user should read about in one line. Exit code 1."""

    exit_code = 1


class BadInputError(TameError):
    """The recipe, the arguments or the source are wrong, and nothing was touched. Exit code 2."""

    exit_code = 2


def line(error: BaseException) -> str:
    """What an exception of somebody else's says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def named_line(error: BaseException) -> str:
    """The same with its class, and without the credentials that an address in it may hold."""
    text = re.sub(r"//[^/@\s]*@", "//", line(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
