"""The native engine's verbs: krun builds the container itself."""

from __future__ import annotations

from krun.errors import KrunError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from krun.grammar import Call
    from krun.prepare import Prepared


def _absent() -> NoReturn:
    raise KrunError("the native engine is not part of this version", "use --engine crun")


def create(call: Call, prepared: Prepared, container: str) -> int:
    """Create (or, for the verb run, run) a container."""
    _absent()


def start(root: str, container: str) -> int:
    """Let a created container's payload go."""
    _absent()


def state(root: str, container: str) -> dict[str, Any]:
    """Return the container's state."""
    _absent()


def kill(root: str, container: str, signal: str, everything: bool) -> int:
    """Send a signal."""
    _absent()


def delete(root: str, container: str, force: bool) -> int:
    """Remove a container."""
    _absent()


def exec_(call: Call, root: str, container: str) -> int:
    """Run one more process."""
    _absent()


def pause(root: str, container: str) -> int:
    """Freeze."""
    _absent()


def resume(root: str, container: str) -> int:
    """Thaw."""
    _absent()


def ps(root: str, container: str, form: str, options: list[str]) -> int:
    """List processes."""
    _absent()


def update(root: str, container: str, options: dict[str, Any]) -> int:
    """Change limits."""
    _absent()


def events(root: str, container: str, stats: bool, interval: str) -> int:
    """Print statistics and events."""
    _absent()
