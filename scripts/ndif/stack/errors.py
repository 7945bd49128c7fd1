"""The one error of these commands; `command.run` prints it without a traceback."""


class StackError(Exception):
    """What went wrong, with the values, and the next step."""
