"""krun exec: one more process in a container, wrapped by the same rule as the first."""

from __future__ import annotations

import os

from krun import bundle, direct, engine, extension, jsontext, log, payload, spec, translate, view
from krun.errors import KrunError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from krun.grammar import Call
    from krun.types import Process, Spec, User


def _user(text: str) -> User:
    uid, _, gid = text.partition(":")
    # Of ten digits at most, and in ASCII: isdigit() takes others too, which int() refuses.
    if not (text.isascii() and uid.isdigit() and (gid or "0").isdigit() and len(text) <= 21):
        raise UsageError(f"--user {text}: must be UID[:GID] in numbers")
    return {"uid": int(uid), "gid": int(gid or 0)}


def _variable(text: str) -> str:
    if text.find("=") < 1:
        raise UsageError(f"--env {text}: must be KEY=VALUE")
    return text


def _capabilities(process: Process, added: list[str]) -> None:
    """Add to the sets that runc's --cap adds to.

    Inheritable is never among them (CVE-2022-29162); ambient is where there is an inheritable set,
    outside of which it has no effect.
    """
    names = [
        name.upper() if name.upper()[:4] == "CAP_" else f"CAP_{name.upper()}" for name in added
    ]
    sets: dict[str, Any] = {**(process.get("capabilities") or {})}
    inherits = ("ambient",) if sets.get("inheritable") else ()
    for which in ("bounding", "effective", "permitted", *inherits):
        sets[which] = [*dict.fromkeys([*(sets.get(which) or []), *names])]
    process["capabilities"] = sets  # type: ignore[typeddict-item]


def process_of(call: Call, config: Spec) -> Process:
    """Return the process to run: --process, or the container's own with the options over it."""
    options = call.options
    if options["process"] is not None:
        document = bundle.read_json(options["process"], "process.json")
        process = spec.accept(spec.parse_process, document)
        own = (config.get("process") or {}).get("capabilities")
        # As with runc, one that says nothing of capabilities has the container's.
        return {"capabilities": own, **process} if own else process
    args = call.arguments[1:]
    if not args:
        raise UsageError("exec: no command given", "krun exec ID COMMAND [ARG...]")
    process = {**(config.get("process") or {})}
    process["args"] = args
    process["terminal"] = options["tty"]
    process.pop("consoleSize", None)
    process["env"] = [*(process.get("env") or []), *map(_variable, options["env"])]
    if options["cwd"] is not None:
        process["cwd"] = options["cwd"]
    if options["user"] is not None:
        process["user"] = _user(options["user"])
    if options["additional_gids"]:
        gids = options["additional_gids"]
        process["user"] = {**process.get("user", {}), "additionalGids": gids}
    if options["cap"]:
        _capabilities(process, options["cap"])
    if options["no_new_privs"]:
        process["noNewPrivileges"] = True
    if options["apparmor"] is not None:
        process["apparmorProfile"] = options["apparmor"]
    if options["process_label"] is not None:
        process["selinuxLabel"] = options["process_label"]
    return spec.parse_process(process)


def _direct(found: payload.Payload, asked: str, state: dict[str, Any]) -> str:
    """Return the pinned copy to run instead, or nothing."""
    if found.script or not state.get("execOutsideVM"):
        return ""
    from krun.policy import Direct

    for pin in state.get("direct") or []:
        entry = Direct(pin["path"], pin["pattern"], "", "")
        if direct.matches(entry, (found.named, found.real)):
            name = os.path.basename(asked)
            direct.alias(pin["directory"], pin["name"], name)
            return f"{pin['place']}/{name}"
    return ""


def wrap(process: Process, state: dict[str, Any], pid: int) -> tuple[Process, bool]:
    """Return process with its program in a VM, or pinned; and whether it is in a VM.

    Looks the program up in the container.  Raises CannotExecute.
    """
    args = process.get("args") or []
    try:
        files = view.View(f"/proc/{pid}/root")
    except OSError as error:
        raise KrunError(f"cannot exec in a stopped container: {error.strerror}") from error
    with files:
        files.mount("/proc", "", "proc")
        found = payload.look_up(files, args, process)
    pinned = _direct(found, args[0], state)
    process = {**process}
    if pinned:
        process["args"] = [pinned, *args[1:]]
        return process, False
    if state["monitor"] == "builtin":
        process["args"] = found.argv
        return process, True
    notes: list[translate.Note] = []
    env = translate.clean_environment(process.get("env") or [], notes)
    for note in notes:
        log.emit(note.level, note.text)
    process["env"] = env
    if state["monitor"] == "none":
        raise KrunError(
            f"{args[0]}: no monitor in this container: it was created without km",
            "only its allow-listed programs can be run",
        )
    process["args"] = translate.wrap_exec(found.argv, env, state)
    return process, True


def saved_state(config: Spec) -> dict[str, Any] | None:
    """Return what create filed for exec; None for a container that goes without a VM."""
    text = (config.get("annotations") or {}).get(extension.STATE)
    if text is None:
        return None
    state: dict[str, Any] = jsontext.loads(text)
    return state


def _native(call: Call, root: str, container: str) -> int:
    from krun import native, store

    config = store.load_config(root, container)
    process = process_of(call, config)
    state = saved_state(config)
    inside = False
    if state is not None:
        process, inside = wrap(process, state, store.load(root, container).pid)
    return native.exec_(call, root, container, process, state if state and inside else {})


def run(call: Call) -> int:
    """Run the process; raises KrunError."""
    root, container, holder = engine.find(call)
    if holder == "native":
        return _native(call, root, container)
    engine.refuse(call, "ignore_paused")
    config: Spec = bundle.read_json(f"{root}/{container}/config.json", "config.json")
    process = process_of(call, config)
    state = saved_state(config)
    if state is not None:
        status = bundle.read_json(f"{root}/{container}/status", "crun's status")
        process, _ = wrap(process, state, status.get("pid") or 0)
    lowest = 3 + engine.listen_fds() + call.options["preserve_fds"]
    document = engine.document_fd(jsontext.dumps(process), lowest)
    skip = (
        "process",
        "env",
        "cwd",
        "user",
        "additional_gids",
        "cap",
        "no_new_privs",
        "apparmor",
        "process_label",
        "tty",
    )
    words = engine.crun_words(call, skip)
    if process.get("terminal"):
        words.append("--tty")
    engine.hand_over(engine.crun_path(call), [*words, "--process", document, container])
