"""The one exception that means: the input or the configuration is wrong, not the program."""


class UserError(ValueError):
    """Wrong input or configuration; its text says what is, what was wanted and what to do.

    The command prints the text as one line and exits with status 2.
    """
