"""survey(...) -> Facts: look at the container's files once, for translate to decide on."""

from __future__ import annotations

import os
import stat

from krun import direct, extension, payload, view
from krun.errors import CannotExecute, KrunError
from krun.monitor import km
from krun.translate import KM_IN_IMAGE, Facts, Note, Pinned

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.extension import Choice
    from krun.policy import Policy
    from krun.types import Process, Spec

INIT_NAMES = ("catatonit", "docker-init", "tini", "tini-static", "podman-init", "dumb-init")
# Where hosts keep programs; images are unpacked elsewhere (/var, /run, /home, /tmp).
PROGRAM_DIRECTORIES = ("/usr/", "/bin/", "/sbin/", "/opt/", "/nix/store/")


def _is_hosts(source: str, rootfs: str, policy: Policy) -> bool:
    """Return whether a file named like an init is the host's program and not an image's.

    The files of an unpacked image are root's too, so where it lies decides.
    """
    real = os.path.realpath(source)
    if os.path.basename(real) not in INIT_NAMES and source != policy.init_path:
        return False
    if real.startswith(os.path.realpath(rootfs) + "/"):
        return False
    return source == policy.init_path or real.startswith(PROGRAM_DIRECTORIES)


def _host_init(spec: Spec, destination: str, bundle: str, policy: Policy) -> bool:
    """Return whether destination is an init of the host's, mounted by podman or docker.

    The name alone proves nothing: an image can hold a /sbin/docker-init of its own.  It must be
    a bind mount of a host's program that is root's, and nobody else's to write.
    """
    rootfs = os.path.join(bundle, (spec.get("root") or {}).get("path") or "rootfs")
    for mount in reversed(spec.get("mounts") or []):
        path = os.path.normpath(mount["destination"])
        if path == destination:
            source = mount.get("source") or ""
            if not {"bind", "rbind"} & {mount.get("type"), *(mount.get("options") or [])}:
                return False
            if "rw" in (mount.get("options") or []) or not source.startswith("/"):
                return False
            if not _is_hosts(source, rootfs, policy):
                return False
            try:
                status = os.stat(source)
            except OSError:
                return False
            return (
                stat.S_ISREG(status.st_mode)
                and status.st_uid in (0, 65534)
                and not status.st_mode & 0o022
            )
        if destination.startswith(path + "/"):
            return False
    return False


def _split_init(
    spec: Spec, args: list[str], bundle: str, policy: Policy
) -> tuple[list[str], list[str]]:
    """Split args into the words of a client's init, `--` included, and the program's.

    The program begins behind `--`, or with the first word that is no option: an init would run
    that one, whatever follows it.
    """
    if not args or not _host_init(spec, os.path.normpath(args[0]), bundle, policy):
        return [], args
    for at, word in enumerate(args[1:], 1):
        if word == "--":
            return args[: at + 1], args[at + 1 :]
        if not word.startswith("-"):
            return [*args[:at], "--"], args[at:]
    return args, []


def _dev_is_directory(files: view.View) -> bool:
    """Return whether the rootfs has a plain /dev: behind a link it could be moved away."""
    try:
        return files.bare("dev")
    except FileNotFoundError:
        return True


def _names_km(args: list[str], process: Process, files: view.View) -> bool:
    """Return whether an entrypoint is km itself, as in images made for plain runtimes."""
    for candidate in payload.candidates(args[0], process):
        if os.path.normpath(candidate) == KM_IN_IMAGE:
            return True
        try:
            found = files.find(candidate)
        except (OSError, view.Unseen):
            continue
        os.close(found.fd)
        return found.path == KM_IN_IMAGE
    return False


def _pins(
    files: view.View, choice: Choice, policy: Policy, notes: list[Note]
) -> tuple[direct.Pin, ...]:
    pins = []
    for entry in policy.direct:
        if choice.direct_sha256 is not None and entry.sha256 not in choice.direct_sha256:
            continue
        pin, why = direct.pin(files, entry)
        if pin is None:
            notes.append(Note("warning", f"direct invocation: {why}"))
        else:
            pins.append(pin)
    return tuple(pins)


def survey(spec: Spec, bundle: str, choice: Choice, policy: Policy, notes: list[Note]) -> Facts:
    """Find out what the payload is.

    Raises KrunError where there is no rootfs, CannotExecute where there is no such program.
    """
    process = spec.get("process") or {}
    args = process.get("args") or []
    init_words, words = _split_init(spec, args, bundle, policy)
    try:
        files = payload.files_of(spec, bundle)
    except OSError as error:
        raise KrunError(f"rootfs {error.filename}: {error.strerror}") from error
    with files:
        dev = _dev_is_directory(files)
        try:
            os.close(files.find(extension.MARK_PATH).fd)
            marked = True
        except (OSError, view.Unseen):
            marked = False
        if init_words and not words:
            return Facts(None, init_words, [], dev, marked)
        if not words:
            raise CannotExecute("process.args names no program", payload.NOT_FOUND)
        annotations = spec.get("annotations") or {}
        skipped = choice.sandbox == "native" and extension.is_sandbox(annotations)
        if skipped or (choice.mode == "label" and not (marked or extension.is_marked(annotations))):
            # Goes to the engine as it is, which will say what is wrong with the program.
            as_is = payload.Payload(words, words[0], words[0], "unseen")
            return Facts(as_is, init_words, [], dev, marked)
        km_words: list[str] = []
        if _names_km(words, process, files):
            km_words, members, words = km.split(words[1:])
            extension.permit_km(members, "process.args: km option", policy)
            if not words:
                raise CannotExecute("km: no payload given in process.args", payload.NOT_FOUND)
            words = [os.path.join(process.get("cwd") or "/", words[0]), *words[1:]]
        found = payload.look_up(files, words, process)
        pins = _pins(files, choice, policy, notes)
        chosen = None
        # A script's interpreter may be listed; what it would read is the image's.
        candidates = () if found.script or km_words else pins
        for index, pin in enumerate(candidates):
            if direct.matches(pin.entry, (found.named, found.real)):
                direct.alias(pin.directory, pin.name, os.path.basename(words[0]))
                chosen = index
                break
        pinned = tuple(Pinned(p.entry.path, p.entry.pattern, p.directory, p.name) for p in pins)
        return Facts(found, init_words, km_words, dev, marked, pinned, chosen)
