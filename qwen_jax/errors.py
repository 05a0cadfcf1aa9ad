"""What ends a command with one sentence, which says what was wrong and what to do; and its exit status."""


class Failure(Exception):
    """Ends a command; its message is printed as one sentence, without a stack trace."""

    status = 1


class InputError(Failure):
    """Bad input: the same command fails again."""

    status = 2


class CheckFailed(Failure):
    """A number that must hold did not, such as a loss that is not finite."""

    status = 1


class EnvironmentFailed(Failure):
    """A disk, a network or another process failed: the same command may do well later (EX_TEMPFAIL of sysexits.h)."""

    status = 75
