"""The table of `krun monitor -S`: calls, failures and time per system call."""

from __future__ import annotations

import os

from krun.monitor.builtin import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.monitor.builtin.process import Process


def lines(
    statistics: dict[int, list[float]], exits: dict[str, int], unimplemented: dict[int, int]
) -> list[str]:
    """The table's lines, the most expensive call first."""
    found = [f"{'system call':<20} {'calls':>9} {'errors':>8} {'ms':>10} {'µs/call':>9}"]
    total = [0.0, 0.0, 0.0]
    for number, entry in sorted(statistics.items(), key=lambda item: -item[1][2]):
        calls, errors, seconds = entry
        name = table.NAMES.get(number, f"#{number}")
        if number in unimplemented:
            name += " (ENOSYS)"
        found.append(
            f"{name:<20} {calls:>9.0f} {errors:>8.0f} {seconds * 1e3:>10.3f}"
            f" {seconds * 1e6 / calls:>9.1f}"
        )
        total = [before + each for before, each in zip(total, entry, strict=True)]
    found.append(f"{'total':<20} {total[0]:>9.0f} {total[1]:>8.0f} {total[2] * 1e3:>10.3f}")
    for name, count in exits.items():
        found.append(f"{name}: {count}")
    return found


def show(process: Process) -> None:
    """Write the table to the monitor's log file, or to stderr."""
    table.load()
    exits = {
        "exits that were no system call": process.other_exits,
        "guest-physical MiB": (process.memory.next_gpa - (1 << 32)) >> 20,
        "page table KiB": process.memory.tables.used >> 10,
    }
    text = f"process {process.memory.pid}\n" + "\n".join(
        lines(process.statistics, exits, process.unimplemented)
    )
    target = process.settings.log_to
    if target in (None, "stderr"):
        process.say(text)
        return
    if target == "none":
        return
    try:
        fd = os.open(str(target), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        process.say(f"{target}: {error.strerror}")
        return
    try:
        os.write(fd, text.encode() + b"\n")
    finally:
        os.close(fd)
