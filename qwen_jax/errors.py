"""What the user gave cannot be used: one sentence saying what was wrong, what was expected and what to do."""


class InputError(Exception):
    """Bad input. The command line prints its message as one sentence and exits with status 2."""
