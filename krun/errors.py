"""The few kinds of error that krun reports, each with the exit status it ends in.

A message says what failed, on what and why; the way out is the hint.
"""

from __future__ import annotations


class KrunError(Exception):
    """A failure with a cause that its user can act on."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(KrunError):
    """The command line is wrong."""

    exit_code = 2


class BadSpec(KrunError):
    """config.json (or a file like it) breaks the specification at one JSON path."""

    def __init__(self, path: str, text: str, hint: str = "", document: str = "config.json") -> None:
        where = f"{document}: {path}" if path else document
        super().__init__(f"{where}: {text}", hint)
        self.path = path
        self.text = text


class BadState(KrunError):
    """The container's status does not allow the operation."""


class NotFound(KrunError):
    """There is no such container."""


class PolicyDenied(KrunError):
    """The host's policy does not allow what the bundle asks for."""


class HookFailed(KrunError):
    """An OCI hook failed or ran out of time."""


class CannotExecute(KrunError):
    """The payload cannot be executed: status 127 when it is not there, 126 otherwise.

    podman and docker tell the two apart by the text: "executable file not found in $PATH" and
    "no such file or directory" become 127, "permission denied" becomes 126.
    """

    def __init__(self, message: str, exit_code: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class ExecFailed(CannotExecute):
    """The payload's own execve failed, in the last step; `run` tells it as the payload would."""
