"""The library's copy: modules, third-party packages, the archive, and the interpreter for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import krun
from krun.errors import KrunError
from krun.install.launcher import FLAGS
from krun.record import Record

SOURCE = Path(krun.__file__).resolve().parent
ARCHIVE = "archive"
# Import names of the third-party packages; those of optional parts may be missing.
NEEDED = ("click", "jsonschema", "rich")
OPTIONAL = (
    "cronsim",
    "docker",
    "google.protobuf",
    "grpc",
    "jeepney",
    "prctl",
    "psutil",
    "pyroute2",
    "requests",
    "ruamel.yaml",
    "tomlkit",
)
# Verbs whose modules go into the archive: those that clients call for each container.
HOT = ("create", "start", "state", "kill", "delete", "run", "exec", "pause", "resume")
LEAST_VERSION = (3, 11)
# A faster interpreter must be this much faster to be preferred to the distribution's.
MARGIN = 0.9
RUNS = 15


class Library(Record):
    """One copy of krun: `path` is put on sys.path first, `packages` last."""

    path: str
    packages: tuple[str, ...]
    python: str


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


def _run(words: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, input=text, capture_output=True, text=True, env=_environment())


_TRY = """
import sys, time
source, packages, needed = sys.argv[1], sys.argv[2].split(":"), sys.argv[3].split(":")
sys.path.insert(0, source)
sys.path += packages
import _ctypes, _json
import krun.__main__
for name in needed:
    __import__(name)
print(*sys.version_info[:2])
"""


def is_suitable(python: str, packages: tuple[str, ...], needed: tuple[str, ...]) -> bool:
    """Return whether an interpreter runs krun with these packages."""
    words = [python, *FLAGS, "-c", _TRY, str(SOURCE.parent), ":".join(packages), ":".join(needed)]
    try:
        done = _run(words)
    except OSError:
        return False
    if done.returncode:
        return False
    return tuple(int(part) for part in done.stdout.split()) >= LEAST_VERSION


def start_time(python: str) -> float:
    """Return the least of several measured start times of an interpreter, in seconds."""
    import time

    least = 60.0
    words = [python, *FLAGS, "-c", "import os; os._exit(0)"]
    for _ in range(RUNS):
        begin = time.perf_counter()
        pid = os.posix_spawn(python, words, _environment())
        os.waitpid(pid, 0)
        least = min(least, time.perf_counter() - begin)
    return least


def _for_everyone(path: str) -> bool:
    """Return whether every user can get at a file: rootless podman runs the launcher too."""
    place = Path(path).resolve()
    return all(part.stat().st_mode & 0o001 for part in (place, *place.parents))


def candidates() -> list[str]:
    """Return the machine's interpreters, the distribution's first."""
    places = ["/usr/bin", "/usr/local/bin", "/bin"]
    found = [f"{place}/python3.{minor}" for place in places for minor in range(11, 20)]
    found += ["/usr/bin/python3", str(Path(sys.executable).resolve())]
    result: dict[str, None] = {}
    for path in found:
        if os.access(path, os.X_OK) and (os.geteuid() != 0 or _for_everyone(path)):
            # One interpreter has many names, and a link may be pointed elsewhere later.
            result.setdefault(str(Path(path).resolve()))
    return list(result)


def choose_python(packages: tuple[str, ...], needed: tuple[str, ...]) -> str:
    """Return the fastest suitable interpreter; raises KrunError where there is none."""
    found = [path for path in candidates() if is_suitable(path, packages, needed)]
    if not found:
        # Root's interpreter in a home directory is better than none.
        own = str(Path(sys.executable).resolve())
        if not is_suitable(own, packages, needed):
            raise KrunError(
                "no interpreter of this machine runs krun with its packages",
                f"Python 3.11 or newer with {', '.join(needed)}",
            )
        return own
    best = found[0]
    if len(found) > 1:
        times = {path: start_time(path) for path in found}
        for path in found[1:]:
            if times[path] < times[best] * MARGIN:
                best = path
    return best


def _location(name: str) -> str:
    """Return the directory on sys.path that a package is imported from, or an empty string."""
    try:
        spec = util.find_spec(name)
    except ModuleNotFoundError:
        return ""
    if spec is None:
        return ""
    place = spec.origin if spec.origin and spec.origin != "namespace" else None
    if place is None:
        places = list(spec.submodule_search_locations or ())
        return str(Path(places[0]).parents[name.count(".")]) if places else ""
    path = Path(place)
    up = name.count(".") + (1 if path.name.startswith("__init__.") else 0)
    return str(path.parents[up])


def _is_lasting(directory: str) -> bool:
    """Return whether packages can be used where they are.

    Those of a virtual environment go when it goes; and root must not run code that others write.
    """
    if sys.prefix != sys.base_prefix and directory.startswith(f"{sys.prefix}/"):
        return False
    place = Path(directory).resolve()
    for part in (place, *place.parents):
        status = part.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            return False
    return os.geteuid() != 0 or _for_everyone(directory)


def _closure(names: list[str]) -> list[metadata.Distribution]:
    """Return the distributions of import names, and those that they require."""
    import re

    owners = metadata.packages_distributions()
    waiting = [owner for name in names for owner in owners.get(name.partition(".")[0], [])]
    found: dict[str, metadata.Distribution] = {}
    while waiting:
        wanted = waiting.pop()
        try:
            distribution = metadata.distribution(wanted)
        except metadata.PackageNotFoundError:
            # Required on other machines only, by its marker.
            continue
        key = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if key in found:
            continue
        found[key] = distribution
        for requirement in distribution.requires or []:
            text, _, marker = requirement.partition(";")
            if "extra" in marker:
                continue
            match = re.match(r"[A-Za-z0-9._-]+", text.strip())
            if match:
                waiting.append(match.group())
    return [found[key] for key in sorted(found)]


def _copy_distributions(distributions: list[metadata.Distribution], target: Path) -> None:
    for distribution in distributions:
        for file in distribution.files or ():
            # Scripts lie outside (../../bin); they are not needed.
            if file.parts[0] == "..":
                continue
            source = Path(str(distribution.locate_file(file)))
            if source.is_file():
                place = target.joinpath(*file.parts)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, place)


def _copy_source(target: Path) -> None:
    # Links are followed: schemas and packaging are links in a checkout, directories in a wheel.
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.new")
    shutil.copytree(SOURCE, target, ignore=ignore)


def _digest(facts: object) -> str:
    """Return a short digest of krun's files and of what else makes two copies different."""
    total = hashlib.sha256(json.dumps(facts).encode())
    for directory, names, files in os.walk(SOURCE, followlinks=True):
        names[:] = sorted(name for name in names if name != "__pycache__")
        for name in sorted(files):
            path = Path(directory, name)
            total.update(f"{path.relative_to(SOURCE)}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


# The modules of hot verbs that not every one of them needs, by the file they are in; a name stands
# for what is in it, too, and the first group that has a module takes it.  A file is read whole.
GROUPS = {
    "archive.builtin": ("krun.monitor.builtin",),
    "archive.network": ("krun.network",),
    "archive.prepare": (
        "krun.bundle",
        "krun.commands.create",
        "krun.commands.exec",
        "krun.direct",
        "krun.executable",
        "krun.extension",
        "krun.monitor",
        "krun.payload",
        "krun.policy",
        "krun.prepare",
        "krun.spec",
        "krun.survey",
        "krun.translate",
        "krun.view",
    ),
    "archive.verbs": (
        "krun.handshake",
        "krun.linux.cgroupfs",
        "krun.linux.proc",
        "krun.native",
        "krun.removal",
        "krun.signals",
        "krun.store",
    ),
    "archive.seldom": (
        "krun.console",
        "krun.hooks",
        "krun.leftover",
        "krun.linux.bpf",
        "krun.linux.copy",
        "krun.linux.resctrl",
        "krun.notify",
        "krun.plan.units",
        "krun.systemd",
        "krun.watch",
    ),
    "archive.native": (
        "krun.apply",
        "krun.birth",
        "krun.execution",
        "krun.idmaps",
        "krun.join",
        "krun.launch",
        "krun.linux",
        "krun.plan",
        "krun.rights",
        "krun.stage",
        "krun.trees",
        "krun.wait",
    ),
}
# Read by every verb, though a group has their packages.
ALWAYS = ("krun.linux", "krun.monitor", "krun.network", "krun.network.state")

# Shared objects (where they are not built into the interpreter) that hot verbs import.
EXTENSIONS = ("_ctypes", "_json")

# Runs in the chosen interpreter, whose bytecode it must be.
_BUILD = """
import __future__, ast, json, marshal, os, sys
call = json.loads(sys.stdin.read())
source, library, output, seen, packages, hot, groups, always, extensions = call
sys.path.insert(0, source)
sys.path += seen
from krun import grammar
import krun.__main__
for name in [*always, *(grammar.command_of(verb).implementation for verb in hot)]:
    __import__(name)

class Reduce(ast.NodeTransformer):
    # What no running krun looks at, and every start would have to read.
    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return self.undocument(node)

    def visit_ClassDef(self, node):
        return self.undocument(self.generic_visit(node))

    def visit_Module(self, node):
        return self.undocument(self.generic_visit(node))

    def visit_ImportFrom(self, node):
        # The compiler is told instead.
        return None if node.module == "__future__" else node

    def visit_If(self, node):
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or None
        return node

    def undocument(self, node):
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        node.body = node.body or [ast.Pass()]
        return ast.fix_missing_locations(node)

def code(path):
    where = path.replace(source, library)
    with open(path, "rb") as file:
        tree = Reduce().visit(ast.parse(file.read(), where))
    flags = __future__.annotations.compiler_flag
    return compile(tree, where, "exec", flags, dont_inherit=True)

def entry(path):
    package = path.endswith("/__init__.py")
    return marshal.dumps(code(path)), package, path.replace(source, library)

def group(name):
    for part, names in groups.items():
        if name not in always and any(name == one or name.startswith(one + ".") for one in names):
            return part

modules = {
    name: entry(module.__file__)
    for name, module in sys.modules.items()
    if name.partition(".")[0] == "krun" and getattr(module, "__file__", None) and not group(name)
}
parts = {file: {} for file in groups}
for directory, _, files in os.walk(source + "/krun"):
    for file in files:
        path = directory + "/" + file
        name = path[len(source) + 1 : -3].replace("/", ".").removesuffix(".__init__")
        part = file.endswith(".py") and group(name)
        if part:
            parts[part][name] = entry(path)
names = {}
for file, part in parts.items():
    with open(output + "/" + file, "wb") as archive:
        marshal.dump(part, archive)
    names |= dict.fromkeys(part, library + "/" + file)
for name in extensions:
    file = getattr(__import__(name), "__file__", None)
    if file and file.endswith(".so"):
        names[name] = file
with open(output + "/archive", "wb") as archive:
    boot = code(source + "/krun/install/boot.py")
    marshal.dump((boot, library, packages, modules, names), archive)
"""


def _build_archive(library: Library, source: Path, seen: tuple[str, ...], output: Path) -> None:
    call: list[object] = [
        str(source),
        library.path,
        str(output),
        list(seen),
        list(library.packages),
        list(HOT),
    ]
    call += [GROUPS, list(ALWAYS), list(EXTENSIONS)]
    # Line tables without columns: a third less to read.
    words = [library.python, *FLAGS, "-X", "no_debug_ranges", "-c", _BUILD]
    done = _run(words, json.dumps(call))
    if done.returncode:
        raise KrunError(f"{library.python} cannot prepare krun's modules: {done.stderr.strip()}")


def _compile(python: str, directory: Path) -> None:
    # Unchecked: the copy never changes, so its sources need not be looked at.
    mode = ("--invalidation-mode", "unchecked-hash")
    done = _run([python, *FLAGS, "-m", "compileall", "-q", *mode, str(directory)])
    if done.returncode:
        raise KrunError(f"{python} cannot compile krun's modules: {done.stdout.strip()}")


def build(base: str, destdir: str) -> Library:
    """Copy krun to a directory of its own in `base` and return it; the same copy is kept.

    The directory's name ends in a digest of its content, so that an upgrade changes nothing under
    a krun that runs.  Raises KrunError, OSError.
    """
    names = [name for name in (*NEEDED, *OPTIONAL) if _location(name)]
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise KrunError(
            f"Python packages are missing: {', '.join(missing)}",
            "pip install . in krun's checkout, or of its wheel",
        )
    places = list(dict.fromkeys(_location(name) for name in names))
    lasting = not destdir and all(_is_lasting(place) for place in places)
    python = choose_python(tuple(places), tuple(names))
    copied = [] if lasting else _closure(names)
    versions = [(one.metadata["Name"], one.version) for one in copied]
    digest = _digest([python, os.stat(python).st_mtime_ns, places if lasting else versions])
    path = f"{base}/{krun.__version__}-{digest}"
    packages = tuple(places) if lasting else (f"{path}/packages",)
    library = Library(path, packages, python)
    target = Path(f"{destdir}{path}")
    if (target / ARCHIVE).exists():
        return library
    staging = target.parent / f".new.{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        _copy_source(staging / "krun")
        _copy_distributions(copied, staging / "packages")
        _compile(python, staging / "krun")
        seen = packages if lasting else (str(staging / "packages"),)
        _build_archive(library, staging, seen, staging)
        with (staging / ARCHIVE).open("rb") as file:
            os.fsync(file.fileno())
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return library


def in_use(path: str) -> bool:
    """Return whether a process runs from a copy of the library: it may still import from it."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"{entry.path}/cmdline", "rb") as file:
                if f"{path}/".encode() in file.read():
                    return True
        except OSError:
            continue
    return False


def remove_old(base: str, destdir: str, current: str) -> None:
    """Remove the other copies in `base`, except those that a process runs from."""
    for entry in list(os.scandir(f"{destdir}{base}")):
        path = f"{base}/{entry.name}"
        is_copy = entry.is_dir(follow_symlinks=False) and os.path.isdir(f"{entry.path}/krun")
        if is_copy and path != current and (destdir or not in_use(path)):
            shutil.rmtree(entry.path)
