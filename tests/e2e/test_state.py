"""What krun prints and stores of a real container is what the schemas say."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from e2e.machine import Client

from krun import schema


def test_state(krun: Client, bundle: Callable[..., Path], engine: str) -> None:
    name = f"krun-schema-{os.urandom(6).hex()}"
    create = [*krun.argv, "create", "--bundle", bundle("/payload", "nap"), name]
    # The payload keeps its output open: a pipe would not end before it does.
    subprocess.run(krun.machine.inside(*create), stdout=subprocess.DEVNULL, check=True)
    try:
        for verb, status in (("start", "created"), ("pause", "running"), ("resume", "paused")):
            printed = json.loads(krun("state", name).stdout)
            assert printed["status"] == status
            assert schema.explain(printed, schema.STATE) == []
            krun(verb, name)
        listed = json.loads(krun("list", "--format", "json").stdout)
        (entry,) = [entry for entry in listed if entry["id"] == name]
        assert {"ociVersion", "status", "pid", "bundle", "created"} <= entry.keys()
        if engine == "native":
            root = Path(str(krun.argv[krun.argv.index("--root") + 1]))
            stored = json.loads((root / name / "state.json").read_text())
            assert schema.explain(stored, schema.STORED_STATE) == []
    finally:
        krun("delete", "--force", name)
