"""The exception for wrong input or configuration."""


class UserError(ValueError):
    """The input or the configuration is wrong; the message says what is, what was expected and what to do.

    The command line prints the message as one line and exits with status 2.
    """
