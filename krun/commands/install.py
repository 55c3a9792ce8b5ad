"""krun install: put krun on this machine and tell podman, docker or containerd about it."""

from __future__ import annotations

import os
import sys

from krun import host, policy
from krun.commands.spec import document
from krun.errors import KrunError, UsageError
from krun.install import clients, launcher, library, manifest, memory, warm
from krun.install.manifest import Item

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call

NAMES = ("krun", "kontain")
LABEL_TRIGGER = "krun-label-trigger"
# A launcher called crun in PREFIX/bin would be the crun that it hands over to.
OTHERS = ("crun", "runc", "youki", "runsc", "kata")
DROP_IN = "50-krun.conf"
SHELLS = {
    "bash": "share/bash-completion/completions/krun",
    "zsh": "share/zsh/site-functions/_krun",
    "fish": "share/fish/vendor_completions.d/krun.fish",
}
# Where podman looks for programs called krun, crun's libkrun handler among them.
_PROGRAM_DIRECTORIES = ("/usr/bin", "/usr/local/bin", "/usr/sbin", "/bin")


def directories(destdir: str) -> dict[str, str]:
    """Return where each client's configuration is: the host's, or an ordinary user's own."""
    if destdir or not host.rootless():
        return {
            "podman": "/etc/containers",
            "docker": "/etc/docker",
            "containerd": "/etc/containerd",
            "crio": "/etc/crio",
        }
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    names = {"podman": "containers", "docker": "docker", "containerd": "containerd"}
    return {client: f"{home}/{name}" for client, name in names.items()}


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise KrunError(f"{path}: is not UTF-8", "krun leaves it as it is") from None


def _podman_files(directory: str, destdir: str) -> dict[str, str]:
    """Return the texts of the files that podman reads before krun's drop-in, by name."""
    roots = [f"{destdir}/usr/share/containers", f"{destdir}/etc/containers"]
    if f"{destdir}{directory}" not in roots:
        roots.append(f"{destdir}{directory}")
    paths = []
    for root in roots:
        paths.append(f"{root}/containers.conf")
        drop_ins = f"{root}/containers.conf.d"
        if os.path.isdir(drop_ins):
            names = sorted(os.listdir(drop_ins))
            paths += [
                f"{drop_ins}/{name}" for name in names if name.endswith(".conf") and name != DROP_IN
            ]
    return {path: _read(path) for path in paths if os.path.isfile(path)}


def _client_items(call: Call, runtimes: dict[str, str], destdir: str) -> list[Item]:
    """Return the clients' files with the runtimes in them; raises KrunError."""
    names = tuple(runtimes)
    where = directories(destdir)
    items = []
    if call.options["podman"]:
        directory = where["podman"]
        lists = clients.podman_lists(_podman_files(directory, destdir))
        text = clients.podman(runtimes, lists)
        items.append(Item(f"{directory}/containers.conf.d/{DROP_IN}", text.encode()))
    if call.options["crio"]:
        if "crio" not in where:
            raise KrunError("install --crio: CRI-O is a service of the host's root", "run as root")
        path = f"{where['crio']}/crio.conf.d/{DROP_IN}"
        items.append(Item(path, clients.crio(runtimes).encode()))
    for client, name, add in (
        ("docker", "daemon.json", clients.docker),
        ("containerd", "config.toml", clients.containerd),
    ):
        if call.options[client]:
            path = f"{where[client]}/{name}"
            if not destdir:
                # A link leads to the file that its owner edits.
                path = os.path.realpath(path)
            text = add(_read(f"{destdir}{path}"), runtimes, path)
            items.append(Item(path, text.encode(), edit=client, runtimes=names))
    return items


def _manual_items(prefix: str) -> list[Item]:
    from krun import man

    return [
        Item(f"{prefix}/share/man/man{man.SECTION}/{name}", text.encode())
        for name, text in man.pages().items()
    ]


def _completion_items(prefix: str) -> list[Item]:
    from krun import help as reader

    items = []
    for shell, path in SHELLS.items():
        text = reader.completion_script(shell)
        if text:
            items.append(Item(f"{prefix}/{path}", text.encode()))
    return items


def _check_names(prefix: str, names: list[str], destdir: str, base: str) -> None:
    """Raise KrunError for a program in the way: crun's libkrun handler is called krun, too."""
    ours = manifest.load(base, destdir)["entries"]
    for name in (*names, LABEL_TRIGGER):
        path = f"{prefix}/bin/{name}"
        real = f"{destdir}{path}"
        if path in ours or not os.path.lexists(real):
            continue
        with open(real, "rb") as file:
            head = file.read(4096)
        # pip's script for this package, or a launcher whose manifest was lost.
        if b"krun.__main__" not in head and launcher.MARK not in head:
            raise KrunError(
                f"{path} is another program" + _libkrun(real),
                "install under another name with --name kontain, or elsewhere with --prefix",
            )


def _libkrun(path: str) -> str:
    """Return a remark on a program called krun that is crun with its libkrun handler."""
    target = os.path.basename(os.path.realpath(path))
    return " (crun with its libkrun handler)" if target.startswith("crun") else ""


def _other_programs(prefix: str, names: list[str]) -> list[str]:
    """Return remarks on other programs that carry one of the names."""
    remarks = []
    seen = {os.path.realpath(f"{prefix}/bin/{name}") for name in names}
    for name in names:
        for directory in _PROGRAM_DIRECTORIES:
            path = f"{directory}/{name}"
            real = os.path.realpath(path)
            if os.path.exists(path) and real not in seen:
                seen.add(real)
                remarks.append(
                    f"{path} is another program{_libkrun(path)}; to tell them apart, use the "
                    f"name kontain or the whole path {prefix}/bin/{name}"
                )
    return remarks


def _found_policy(destdir: str) -> policy.Policy | None:
    # A staging directory is for other machines, whose policy is not known.
    return None if destdir else policy.load()


def _next_steps(call: Call, changed: list[str], runtimes: dict[str, str]) -> list[str]:
    name = next(iter(runtimes))
    steps = []
    if call.options["docker"] and any(path.endswith("daemon.json") for path in changed):
        steps.append("dockerd reads its runtimes anew: systemctl reload docker")
    if call.options["containerd"] and any(path.endswith("config.toml") for path in changed):
        steps.append("containerd reads its configuration anew: systemctl restart containerd")
    if call.options["crio"]:
        steps.append("CRI-O reads its drop-ins anew: systemctl reload crio")
    if call.options["podman"]:
        steps.append(f"try it: podman --runtime={name} run --rm IMAGE uname -r")
    return steps


def _warm(copy: library.Library, python: list[str], destdir: str, cold: bool) -> tuple[str, str]:
    """Return the warm start's program, or an empty string, and what there is to say of it."""
    if cold:
        warm.remove(f"{destdir}{copy.path}")
        return "", "starts cold"
    if destdir:
        # It is made from the processor and the libraries of the machine that it runs on.
        return "", "starts cold: run krun install once more on the machine itself"
    seed = launcher.seed_words(copy.python, f"{copy.path}/{library.ARCHIVE}")
    try:
        return warm.build(copy.path, python, seed, document(False, 2)), "starts warm"
    except memory.Unfit as error:
        return "", f"starts cold, which takes longer: {error}"


def run(call: Call) -> int:
    """Install; a second run changes nothing.  Raises KrunError, OSError."""
    options = call.options
    prefix = manifest.prefix(options["prefix"])
    destdir = os.path.abspath(options["destdir"]) if options["destdir"] else ""
    names = list(dict.fromkeys(options["name"])) or list(NAMES)
    for name in names:
        if (
            not name[:1].isalnum()
            or not name.replace("-", "").replace("_", "").isalnum()
            or not name.isascii()
        ):
            raise UsageError(f"--name {name}: use letters, digits, - and _")
        if name == LABEL_TRIGGER:
            raise UsageError(f"--name {name}: is made in any case")
        if name in OTHERS:
            raise UsageError(f"--name {name}: is another runtime's name")
    base = f"{prefix}/lib/krun"
    first = f"{prefix}/bin/{names[0]}"
    runtimes = {name: f"{prefix}/bin/{name}" for name in names}

    # Everything that can be refused is refused before anything is written.
    _check_names(prefix, names, destdir, base)
    rest = [*_client_items(call, runtimes, destdir), *_completion_items(prefix)]
    rest += _manual_items(prefix)
    manifest.check_writable([f"{base}/x", first, *(item.path for item in rest)], destdir)
    rules = _found_policy(destdir)

    manifest.begin(base, destdir)
    copy = library.build(base, destdir)
    python = launcher.python_words(copy.python, f"{copy.path}/{library.ARCHIVE}")
    program, temperature = _warm(copy, python, destdir, options["cold"])
    text = launcher.text(first, python, rules, warm=program)
    items = [Item(first, text.encode(), mode=0o755)]
    for name in (*names[1:], LABEL_TRIGGER):
        items.append(Item(f"{prefix}/bin/{name}", target=names[0]))
    changed = manifest.apply([*items, *rest], base, destdir)
    library.remove_old(base, destdir, copy.path)

    for path in changed:
        print(f"wrote {path}")
    if not changed:
        print("everything is in place")
    print(f"krun runs in {copy.python}, from {copy.path}")
    print(f"krun {temperature}")
    if not destdir:
        for remark in _other_programs(prefix, names):
            print(f"note: {remark}")
        for step in _next_steps(call, changed, runtimes):
            print(step)
    sys.stdout.flush()
    return 0
