"""The one exception for what a user can mend, and how messages put names and other errors."""

from collections.abc import Iterable


class UserError(RuntimeError):
    """Something in the user's data, plan or call is wrong.

    The message says what is wrong, in which file, and how to mend it. It is raised before training starts, so that
    nothing is lost.
    """


def one_line(error: BaseException) -> str:
    """Kind and message of an error of any library, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def shown(names: Iterable[object], at_most: int = 20) -> str:
    """Names separated by commas, cut off after `at_most` with the number of the others."""
    texts = [str(name) for name in names]
    rest = len(texts) - at_most
    return ", ".join(texts[:at_most]) + (f" and {rest} more" if rest > 0 else "")
