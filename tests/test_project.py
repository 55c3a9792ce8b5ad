"""The rules of the tree: linters, types, layers, and what each verb may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

CHECKS = {
    "ruff-format": ["ruff", "format", "--check", "."],
    "ruff": ["ruff", "check", "."],
    "mypy": ["mypy"],
    "layers": ["lint-imports"],
}


@pytest.mark.parametrize("name", CHECKS)
def test_check_is_clean(name: str) -> None:
    command = CHECKS[name]
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def loaded(statements: str, word: str) -> set[str]:
    """Return the modules that statements load in a bare interpreter; `word` is sys.argv[2]."""
    program = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1])\n"
        f"{statements}\n"
        "print('\\n'.join(sorted(set(sys.modules) - before)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(ROOT), word],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def imported(verb: str) -> set[str]:
    """Return the modules that reading and loading a verb's code imports, beyond the bare start."""
    statements = (
        "import krun.__main__\n"
        "from krun import grammar\n"
        "command = grammar.command_of(sys.argv[2])\n"
        "__import__(command.implementation)\n"
    )
    return loaded(statements, verb)


VERBS = ("create", "run", "start", "state", "kill", "delete", "exec")


@pytest.mark.parametrize("verb", VERBS)
def test_verb_keeps_its_import_budget(verb: str) -> None:
    allowed = set((ROOT / "tests" / "imports" / f"{verb}.txt").read_text().split())
    modules = imported(verb)
    extra = modules - allowed
    assert not extra, f"krun {verb} imports {sorted(extra)}, which its budget does not list"
    # What the library imports for itself may differ from one Python to the next.
    stale = {name for name in allowed - modules if name.partition(".")[0] == "krun"}
    assert not stale, f"krun {verb} no longer imports {sorted(stale)}"


@pytest.mark.parametrize(
    ("name", "part"), [("frozen", "freezer"), ("kill", "removal"), ("apply", "limits")]
)
def test_a_use_of_cgroupfs_loads_the_module_of_its_job_alone(name: str, part: str) -> None:
    statements = "from krun.linux import cgroupfs\ngetattr(cgroupfs, sys.argv[2])\n"
    parts = {one for one in loaded(statements, name) if one.startswith("krun.linux.cgroupfs.")}
    assert parts == {f"krun.linux.cgroupfs.{part}"}


def test_budgets_hold_no_heavy_module() -> None:
    heavy = {
        "argparse",
        "click",
        "collections",
        "contextlib",
        "ctypes",
        "dataclasses",
        "enum",
        "functools",
        "json",
        "jsonschema",
        "logging",
        "pathlib",
        "prctl",
        "psutil",
        "pyroute2",
        "re",
        "subprocess",
        "typing",
    }
    budgets = list((ROOT / "tests" / "imports").iterdir())
    assert {budget.stem for budget in budgets} == set(VERBS)
    for budget in budgets:
        found = heavy & set(budget.read_text().split())
        assert not found, f"{budget.name} allows {sorted(found)}"


def test_only_named_importers_of_third_party_packages() -> None:
    """Those that import-linter does not hold."""
    images = "krun/images"
    importers: dict[str, set[str]] = {
        "click": {"krun/help.py"},
        "jsonschema": {"krun/schema.py"},
        "prctl": {"krun/inspection.py"},
        "psutil": {"krun/network/usermode.py"},
        "requests": {f"{images}/{name}.py" for name in ("kubernetes", "registry", "stores/docker")},
        "rich": {"krun/commands/check.py", f"{images}/progress.py"},
        "tomlkit": {"krun/install/clients.py"},
    }
    for package, allowed in importers.items():
        found = set()
        for path in (ROOT / "krun").rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            if any(line.startswith((f"import {package}", f"from {package}")) for line in lines):
                found.add(str(path.relative_to(ROOT)))
        assert found == allowed, package
