"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Bad input from outside: a file, an option, a folder. Its text is one sentence that says what was expected, what
    came and what to do; the command line prints it and exits with status 2."""
