"""The one error type for input that the user can mend."""


class InputError(ValueError):
    """Bad input: a row, a file or a setting.

    The message names the place and says what to do. The command line prints it alone,
    without a traceback, and exits with status 2.
    """
