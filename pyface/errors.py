"""Errors that a caller can act on."""


class UserError(Exception):
    """Something the user gave or asked for cannot be served.

    The message says what was wrong, what was expected and what to do. The command line prints it as one line and exits
    with code 2; library callers may catch this class to separate their own mistakes from ours.
    """
