"""The one exception of this package that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right; the command line prints its message without a traceback."""
