"""When caches are refreshed: off, an interval, or a cron expression; sole importer of cronsim."""

from __future__ import annotations

from datetime import datetime

from krun.errors import KrunError
from krun.images.quantities import parse_duration
from krun.record import Record


class Schedule(Record):
    """`interval` in seconds (0 for none), or a `cron` expression; neither means off."""

    interval: float = 0.0
    cron: str = ""


OFF = Schedule()


def parse(text: str, where: str) -> Schedule:
    """Read "off", "0s", "15m" or "*/5 * * * *"; `where` names it in the error."""
    plain = text.strip()
    if plain == "off":
        return OFF
    if " " in plain:
        import cronsim

        try:
            cronsim.CronSim(plain, datetime(2000, 1, 1))
        except cronsim.CronSimError as error:
            raise KrunError(
                f"{where}: {text!r} is no cron expression: {error}",
                "five fields: minute hour day month weekday",
            ) from None
        return Schedule(cron=plain)
    return Schedule(interval=parse_duration(plain, where))


def next_after(schedule: Schedule, last: float) -> float | None:
    """Return when the schedule is due after `last` (seconds since the epoch), None if never.

    Cron fields are in the machine's local time.
    """
    if schedule.cron:
        import cronsim

        moment = next(cronsim.CronSim(schedule.cron, datetime.fromtimestamp(last).astimezone()))
        return moment.timestamp()
    if schedule.interval > 0:
        return last + schedule.interval
    return None
