"""The one exception that means: the user can fix this. Every verb prints it without a traceback and exits
with code 2."""


class UserError(ValueError):
    """Bad configuration or input. The message names the key or file:line, the value found, and the fix."""
