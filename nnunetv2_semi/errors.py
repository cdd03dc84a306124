"""The one exception for what a user can mend, and how others are told of."""


class UserError(RuntimeError):
    """Something in the user's data, plan or call is wrong.

    The message says what is wrong, in which file, and how to mend it. It is raised before training starts, so that
    nothing is lost.
    """


def one_line(error: BaseException) -> str:
    """Kind and message of an error of any library, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
