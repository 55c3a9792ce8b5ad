"""Builds the C programs of the tests: the km stand-in and the freestanding payload."""

from __future__ import annotations

import subprocess
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-format-truncation", "-Wno-array-bounds")
# km needs code without SSE where there is no hardware virtualization, and its system call entry
# overwrites the red zone.
FREESTANDING = (
    "-nostdlib",
    "-ffreestanding",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fno-stack-protector",
    "-fno-pie",
    "-no-pie",
    "-fno-builtin",
)


def compile_static(source: Path, target: Path, *flags: str) -> Path:
    """Compile one C file to a static program; raise with gcc's own words."""
    command = ["gcc", "-O1", "-static", *WARNINGS, *flags, "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return target


def km(directory: Path) -> Path:
    """The stand-in as `directory`/km."""
    return compile_static(TESTS / "km" / "km.c", directory / "km")


def loader(target: Path) -> Path:
    """The dynamic loader of a hostile image as target, see tests/payloads/loader.c."""
    flags = [flag for flag in FREESTANDING if "pie" not in flag]
    # At any address, beside the program that it is loaded for.
    flags += ["-fPIE", "-static-pie"]
    return compile_static(TESTS / "payloads" / "loader.c", target, *flags)


def payload(directory: Path) -> Path:
    """The test payload as `directory`/payload."""
    return compile_static(TESTS / "payloads" / "payload.c", directory / "payload", *FREESTANDING)
