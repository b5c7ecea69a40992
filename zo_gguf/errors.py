"""Errors shown to users: one sentence that names the offending value and the fix, no traceback."""


class ZoError(ValueError):
    """Bad input or a request that cannot be met; the command line exits with `exit_code`."""

    exit_code = 2


class DoesNotFitError(ZoError):
    """The job needs more memory or disk than the machine has."""

    exit_code = 3
