"""The one exception for what a user can mend."""


class UserError(RuntimeError):
    """Something in the user's data, plan or call is wrong.

    The message says what is wrong, in which file, and how to mend it. It is raised before training starts, so that
    nothing is lost.
    """
