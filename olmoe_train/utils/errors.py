"""The exception for mistakes that the user can correct."""


class UserError(ValueError):
    """Invalid configuration or input.

    Every verb prints the message without a traceback and exits with code 2. The message names the
    configuration key or file:line, the value found, and what to do about it.
    """
