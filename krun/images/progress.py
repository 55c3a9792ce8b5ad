"""Show pulls as they go: bars on a terminal, plain lines elsewhere; sole importer of rich."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Protocol

from krun.images.decide import Outcome
from krun.images.stores.model import Progress


class Shown(Protocol):
    """A reporter that is shown for the length of a `with` block."""

    shows_bytes: bool

    def __enter__(self) -> Shown: ...
    def __exit__(self, *error: object) -> None: ...
    def begin(self, name: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def retry(self, name: str, error: str, seconds: float) -> None: ...
    def end(self, outcome: Outcome, seconds: float) -> None: ...


class Silent:
    """Nothing is shown: the caller prints a document at the end."""

    shows_bytes = False

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def begin(self, name: str) -> None:
        """A pull starts."""

    def progress(self, progress: Progress) -> None:
        """A pull goes on."""

    def retry(self, name: str, error: str, seconds: float) -> None:
        """A pull failed and will be tried again."""

    def end(self, outcome: Outcome, seconds: float) -> None:
        """A pull or removal ended."""


class Lines(Silent):
    """One line when a pull starts and one when it ends, on stderr."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> Lines:
        return self

    def _say(self, text: str) -> None:
        with self._lock:
            os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))

    def begin(self, name: str) -> None:
        """A pull starts."""
        self._say(f"{name}: pulling")

    def retry(self, name: str, error: str, seconds: float) -> None:
        """A pull failed and will be tried again."""
        self._say(f"{name}: {error}; again in {seconds:.0f} s")

    def end(self, outcome: Outcome, seconds: float) -> None:
        """A pull or removal ended."""
        self._say(f"{outcome.name}: {_ending(outcome)} ({seconds:.1f} s)")


class Bars:
    """A bar for each pull under way, on a terminal."""

    shows_bytes = True

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[stage]}", markup=False),
            DownloadColumn(binary_units=True),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def begin(self, name: str) -> None:
        """A pull starts."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=None, stage="asking the registry")

    def progress(self, progress: Progress) -> None:
        """A pull goes on."""
        task = self._tasks.get(progress.image)
        if task is None:
            return
        if progress.total:
            self._bars.update(
                task, completed=progress.done, total=progress.total, stage=progress.stage
            )
        else:
            self._bars.update(task, stage=progress.stage)

    def retry(self, name: str, error: str, seconds: float) -> None:
        """A pull failed and will be tried again."""
        self._bars.console.print(f"{name}: {error}; again in {seconds:.0f} s", markup=False)

    def end(self, outcome: Outcome, seconds: float) -> None:
        """A pull or removal ended."""
        task = self._tasks.pop(outcome.name, None)
        if task is not None:
            self._bars.remove_task(task)
        self._bars.console.print(
            f"{outcome.name}: {_ending(outcome)} ({seconds:.1f} s)", markup=False, highlight=False
        )


def _ending(outcome: Outcome) -> str:
    if outcome.reason:
        return f"failed, {outcome.message}"
    if outcome.removed:
        return "removed"
    return "pulled" if outcome.pulled else "is up to date"


def choose(form: str) -> Shown:
    """Return the reporter for an output form: nothing for JSON, bars only on a terminal."""
    if form == "json":
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()
