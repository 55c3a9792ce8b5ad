"""What translation makes of every recorded configuration, held as the difference it makes.

KRUN_WRITE_GOLDEN=1 pytest tests/golden writes the files anew; read their diff before committing.
"""

from __future__ import annotations

import difflib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hosts import HOST

from krun import extension, jsontext, spec, survey, translate
from krun.errors import KrunError
from krun.grammar import Settings
from krun.host import Host, VirtDevice
from krun.policy import Policy

HERE = Path(__file__).parent
BUNDLES = HERE.parent / "data/bundles"
WRITE = bool(os.environ.get("KRUN_WRITE_GOLDEN"))

BOTH_DEVICES = HOST._replace(
    devices=(*HOST.devices, VirtDevice("kkm", "/dev/kkm", 10, 120, 0o666, 0, 0))
)


class Case(NamedTuple):
    """One translation: a bundle, and what the host and the user say besides."""

    name: str
    bundle: str
    annotations: dict[str, str] = {}
    policy: Policy = Policy()
    settings: Settings = Settings()
    host: Host | None = None


def host_of(bundle: str) -> Host:
    """Return the machine as seen from where the client starts krun."""
    if bundle.startswith("podman-rootless"):
        return HOST._replace(user_namespace=True)
    if bundle.endswith("-rootless"):
        return HOST._replace(euid=1000, egid=1000)
    return HOST


PLAIN = "podman-run-none"
KM_OPTIONS = {
    "app.kontain.km.membus-width": "36",
    "app.kontain.km.overcommit-memory": "true",
    "app.kontain.km.verbose": "signals",
    "app.kontain.km.coredump": "/cores/core",
    "app.kontain.km.copyenv": "SECRET_ TOKEN",
    "app.kontain.km.device": "kkm",
}
CASES = [
    *(Case(path.name, path.name) for path in sorted(BUNDLES.iterdir())),
    Case("km-options", PLAIN, KM_OPTIONS, host=BOTH_DEVICES),
    Case("no-init", PLAIN, {"app.kontain.init": "none"}),
    Case("label-unmarked", PLAIN, settings=Settings(mode="label")),
    Case("label-marked", PLAIN, {"app.kontain.version": "1"}, settings=Settings(mode="label")),
    Case("sandbox-native", "containerd-cri-sandbox", policy=Policy(sandbox="native")),
    Case("builtin", PLAIN, settings=Settings(monitor="builtin")),
    Case("monitor-none", PLAIN, settings=Settings(monitor="none")),
    Case("no-device", PLAIN, host=HOST._replace(devices=())),
    Case("no-km", PLAIN, settings=Settings(monitor="km"), host=HOST._replace(km="")),
    Case("no-crun", PLAIN, host=HOST._replace(crun="")),
]


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image of the recordings: a busybox."""
    top = tmp_path_factory.mktemp("image") / "rootfs"
    for name in ("bin", "dev", "etc", "proc", "run", "sbin", "sys", "tmp"):
        (top / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", top / "bin/busybox")
    for name in ("sh", "echo", "sleep", "id", "cat", "ls"):
        (top / "bin" / name).symlink_to("busybox")
    return top


def pretty(document: Any) -> list[str]:
    return jsontext.dumps(document, indent="  ").splitlines()


def outcome(case: Case, rootfs: Path) -> str:
    """Return what is decided, and what changes in the configuration."""
    document: Any = jsontext.loads((BUNDLES / case.bundle / "config.json").read_bytes())
    document["annotations"] = {**document.get("annotations", {}), **case.annotations}
    seen = {**document, "root": {**document["root"], "path": str(rootfs)}}
    try:
        choice = extension.choose(spec.parse(document), case.policy, case.settings)
        notes: list[translate.Note] = []
        facts = survey.survey(seen, "/", choice, case.policy, notes)
        host = case.host or host_of(case.bundle)
        result = translate.translate(document, choice, host, facts)
    except KrunError as error:
        return f"{type(error).__name__}, status {error.exit_code}: {error}\n"
    head = [f"engine {result.engine}, monitor {result.monitor}"]
    head += [f"{note.level}: {note.text}" for note in (*notes, *result.notes)]
    difference = difflib.unified_diff(
        pretty(document), pretty(result.spec), "config.json", "translated", lineterm="", n=1
    )
    return "\n".join([*head, *difference]) + "\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_translation(case: Case, rootfs: Path) -> None:
    golden = HERE / f"{case.name}.diff"
    text = outcome(case, rootfs)
    if WRITE:
        golden.write_text(text)
    assert text == golden.read_text()


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in HERE.glob("*.diff")} == {case.name for case in CASES}
