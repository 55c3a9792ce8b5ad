"""createRuntime hook: was the container's image on the node, pinned, at the policy's digest?

The policy file (spec-schema/images-policy.schema.json) names the mode and what is required; an
annotation can only tighten the mode.
"""

from __future__ import annotations

import time

from krun import jsontext
from krun.errors import KrunError
from krun.images import index, ledger
from krun.images.hooks import container, program
from krun.images.references import familiar, parse
from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.images.hooks.container import Container
    from krun.images.index import Known


class BadPolicy(KrunError):
    """The policy file cannot be read."""


class Requirement(Record):
    """What the policy wants of one image: its `digest` or "", and whether it is `pinned`."""

    digest: str = ""
    pinned: bool = False


def load_policy(path: str) -> dict[str, Any]:
    """Return the policy, {} when there is none; raises BadPolicy."""
    try:
        with open(path, "rb") as file:
            policy = jsontext.loads(file.read())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadPolicy(f"{path}: {error}") from None
    if not isinstance(policy, dict) or not isinstance(policy.get("images", {}), dict):
        raise BadPolicy(f"{path}: must be an object, and so must its images")
    return policy


def mode_of(*wishes: object) -> str:
    """Return the strictest of the modes that the policy, the hook's file and annotations name."""
    strictest = 0
    for wish in wishes:
        if wish in program.MODES:
            strictest = max(strictest, program.MODES.index(str(wish)))
        elif wish:
            raise BadPolicy(f"mode {wish!r} is not one of {', '.join(program.MODES)}")
    return program.MODES[strictest]


def requirement_of(policy: dict[str, Any], name: str) -> Requirement:
    """Return what the policy wants: by full or familiar name, by repository, or in general."""
    pinned = bool(policy.get("pinned", False))
    images = policy.get("images", {})
    if name:
        reference = parse(name)
        for key in (name, familiar(reference), reference.name):
            found = images.get(key)
            if isinstance(found, dict):
                digest = found.get("digest", "")
                return Requirement(str(digest), bool(found.get("pinned", pinned)))
    return Requirement("", pinned)


def findings(
    one: Container, known: Known | None, indexed: bool, requirement: Requirement
) -> list[str]:
    """Return what is wrong, in words that follow the image's name."""
    if not one.name:
        return [f"the image's name is not known (set the annotation {container.IMAGE})"]
    if not indexed:
        return ["nothing is known to be pre-pulled on this node"]
    if known is None:
        return ["was not pre-pulled"]
    if one.image_id and known.id != one.image_id:
        return [f"is {one.image_id[:19]}, pre-pulled was {known.id[:19]}"]
    found = []
    wanted = requirement.digest or parse(one.name).digest
    if wanted and known.digest and known.digest != wanted:
        found.append(f"is at digest {known.digest}, wanted is {wanted}")
    if requirement.pinned and not known.pinned:
        found.append("is not pinned")
    return found


def _way_out(name: str, requirement: Requirement) -> str:
    if not name:
        return ""
    reference = parse(name)
    if requirement.digest:
        reference = reference._replace(digest=requirement.digest)
    return f"krun images warm {'--pin ' if requirement.pinned else ''}{reference}"


def act(options: dict[str, str]) -> int:
    """Check one container; 1 refuses its start."""
    state = container.read_state()
    if container.is_sandbox(state["annotations"]):
        return 0
    one = container.describe(state)
    settings = container.settings_of(one.annotations)
    # An annotation asks; only from here on a failure is judged by the container's own mode.
    options["mode"] = mode_of(options["mode"], settings.get("check"))
    policy = load_policy(options["policy"])
    mode = mode_of(options["mode"], policy.get("check"))
    requirement = requirement_of(policy, one.name)
    known, indexed = None, True
    try:
        known = index.find(options["state"], one.name) if one.name else None
    except FileNotFoundError:
        indexed = False
    found = findings(one, known, indexed, requirement)
    if not found:
        return 0
    text = f"image {one.name or '?'}: {'; '.join(found)}"
    way_out = _way_out(one.name, requirement)
    if mode == "refuse":
        program.say("krun-image-check", f"{text}; refused, warm it with: {way_out}")
    elif mode == "warn":
        program.say("krun-image-check", f"warning: {text}; warm it with: {way_out}")
    entry = {
        "event": "check",
        "time": round(time.time(), 3),
        "container": one.id,
        "image": one.name,
        "id": one.image_id,
        "mode": mode,
        "findings": found,
    }
    try:
        ledger.append(options["state"], entry)
    except OSError as error:
        program.say("krun-image-check", f"ledger: {error.filename}: {error.strerror}")
    return 1 if mode == "refuse" else 0
