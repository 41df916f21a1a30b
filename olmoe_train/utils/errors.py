"""The exception for mistakes that the user can correct."""


class UserError(ValueError):
    """Invalid configuration or input.

    Every verb prints the message without a traceback and exits with code 2. The message names the
    configuration key or file:line, the value found, and what to do about it.
    """


def configuration_error(errors: list[str]) -> UserError:
    """The exception that lists everything that is wrong with a configuration, one error per line."""
    count = f"{len(errors)} errors" if len(errors) > 1 else "1 error"
    return UserError("\n  - ".join([f"{count} in the configuration:", *errors]))
