"""make mutate: take each defence out of a copy of the tree, and see the test that claims it fail.

A mutation is an edit that puts the vulnerable way of doing things in the place of the defence.
The tests named by it must pass in the copy before the edit, and fail after it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TESTS = "tests/security/test_escapes.py"

# Resolves a path of the container as the host would: links lead where they like.
_DIRECTORIES_AS_THE_HOST = """def make_directories(root: int, path: str, mode: int = 0o755) -> int:
    host = os.path.join(os.readlink(f"/proc/self/fd/{root}"), path.lstrip("/"))
    os.makedirs(host, mode, exist_ok=True)
    return os.open(host, os.O_PATH | os.O_DIRECTORY)


def _make_directories"""

# Edits that more than one mutation makes.
_AS_THE_HOST = ("krun/linux/path.py", "def make_directories", _DIRECTORIES_AS_THE_HOST)
_EXEC_WITHOUT_HOLD = ("krun/join.py", "hold = ending.program != -1 and", "hold = False and")
_ANY_PROGRAM = ("krun/execution.py", "if (other.st_dev, other.st_ino) == mine:", "if False:")


class Mutation(NamedTuple):
    """A defence by name, the tests (for -k) that must notice, and (file, text, replacement)."""

    name: str
    tests: str
    edits: tuple[tuple[str, str, str], ...]
    file: str = TESTS


ESCAPES = (
    Mutation(
        "exec runs the payload from Python, born in the container",
        "2016_9962",
        (_EXEC_WITHOUT_HOLD,),
    ),
    Mutation(
        "no hold: the payload's execve is made by Python",
        "2019_5736",
        (
            ("krun/stage.py", "early = ending.program != -1 and", "early = False and"),
            _ANY_PROGRAM,
        ),
    ),
    Mutation(
        "exec: the payload's execve is made by Python",
        "2019_5736",
        (
            _EXEC_WITHOUT_HOLD,
            _ANY_PROGRAM,
        ),
    ),
    Mutation(
        "hold's file is not sealed",
        "2019_5736",
        (("krun/linux/hold.py", "fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_ALL)", "fcntl.fcntl(fd, 1)"),),
    ),
    Mutation(
        "volumes go over procfs",
        "2019_16884",
        (("krun/apply/mounts.py", "    refuse_over_proc(one, target, tree)\n", ""),),
    ),
    Mutation(
        "procfs is known by the mount's name, not by what is there",
        "2019_19921",
        (
            (
                "krun/apply/procfs.py",
                "    if filesystem_type(target) == k.PROC_SUPER_MAGIC:\n",
                '    if one.destination.startswith("/proc/"):\n',
            ),
        ),
    ),
    Mutation(
        "new file systems go over procfs",
        "2019_19921_a_file_system",
        (("krun/apply/procfs.py", '    if one.fstype != "proc" and', "    if False and"),),
    ),
    Mutation(
        "directories are made by path",
        "2021_30465",
        (_AS_THE_HOST,),
    ),
    Mutation(
        "absolute links are the host's",
        "absolute_links",
        (_AS_THE_HOST,),
    ),
    Mutation(
        "relative links leave the root",
        "2024_45310",
        (_AS_THE_HOST,),
    ),
    Mutation(
        "capabilities are inheritable",
        "2022_29162",
        (
            (
                "krun/plan/process.py",
                "capability_mask(sets.get(name) or ()) for name in _SETS",
                'capability_mask(sets.get(name) or sets.get("permitted") or ()) for name in _SETS',
            ),
        ),
    ),
    Mutation(
        "exec --cap makes capabilities inheritable",
        "2022_29162",
        (
            (
                "krun/commands/exec.py",
                'for which in ("bounding", "effective", "permitted", *inherits):',
                'for which in ("bounding", "effective", "permitted", "inheritable"):',
            ),
        ),
    ),
    Mutation(
        "each cgroup mount is writable below a read-only /sys/fs/cgroup",
        "2023_25809",
        (
            (
                "krun/apply/cgroups.py",
                "            mount_setattr(tree, one.set_ & ~k.MOUNT_ATTR__ATIME)\n",
                "",
            ),
        ),
    ),
    Mutation(
        "proc and sysfs follow links of the image",
        "2023_27561",
        (
            (
                "krun/apply/mounts.py",
                "k.RESOLVE_IN_ROOT | k.RESOLVE_NO_SYMLINKS",
                "k.RESOLVE_IN_ROOT",
            ),
        ),
    ),
    Mutation(
        "labels are written in the container's /proc",
        "2023_28642",
        (
            (
                "krun/stage.py",
                "    set_labels(plan.process)\n    roots.change_root(root, setting.no_pivot)\n",
                "    roots.change_root(root, setting.no_pivot)\n    set_labels(plan.process)\n",
            ),
            (
                "krun/rights.py",
                'f"/proc/thread-self/attr/{name}", "/proc/thread-self/attr/exec"',
                'f"/proc/self/attr/{name}", "/proc/self/attr/exec"',
            ),
        ),
    ),
    Mutation(
        "the working directory may be outside",
        "2024_21626_no_directory",
        (("krun/rights.py", "    if not inside:\n", "    if False:\n"),),
    ),
    Mutation(
        "descriptors of the caller reach the payload",
        "2024_21626_descriptors",
        (("krun/rights.py", "    privileges.close_on_exec_from(3 + rights.keep_fds)\n", ""),),
    ),
    Mutation(
        "masks are the container's /dev/null",
        "2025_31133_masks",
        (
            (
                "krun/apply/kernel.py",
                "                null = _null()\n",
                '                null = open_in_root(root, "/dev/null")\n',
            ),
        ),
    ),
    Mutation(
        "the host's /dev/null is taken for what it says",
        "2025_31133_the_hosts",
        (
            (
                "krun/apply/kernel.py",
                "    if not S_ISCHR(found.st_mode) or found.st_rdev != os.makedev(1, 3):\n",
                "    if False:\n",
            ),
        ),
    ),
    Mutation(
        "the console is mounted by path",
        "2025_52565_console",
        (
            (
                "krun/console.py",
                '    target = make_file(root, "/dev/console")\n',
                '    host = os.readlink(f"/proc/self/fd/{root}") + "/dev/console"\n'
                "    target = os.open(host, os.O_PATH)\n",
            ),
        ),
    ),
    Mutation(
        "any /dev/pts will do",
        "2025_52565_a_false",
        (
            (
                "krun/console.py",
                "    if filesystem_type(pts) != k.DEVPTS",
                "    if 0 != 0 * k.DEVPTS",
            ),
        ),
    ),
    Mutation(
        "sysctls are written in the container's /proc",
        "2025_52881",
        (
            ("krun/stage.py", "kernel.write_sysctls(plan.sysctl)", "kernel.write_sysctls(plan)"),
            (
                "krun/apply/kernel.py",
                "def write_sysctls(sysctls: tuple[tuple[str, str], ...]) -> None:\n",
                "def write_sysctls(plan) -> None:\n    sysctls = plan.sysctl\n",
            ),
            ("krun/apply/kernel.py", 'os.open("/proc/sys"', 'os.open(f"{plan.rootfs}/proc/sys"'),
            (
                "krun/apply/kernel.py",
                "        if filesystem_type(base) !=",
                "        if 0 and 0 !=",
            ),
        ),
    ),
    Mutation(
        "any sysctl is set",
        "sysctls_of_the_host",
        (
            (
                "krun/plan/checks.py",
                "CHECKS = (root, namespaces, hostname, sysctl)",
                "CHECKS = (root,)",
            ),
        ),
    ),
    Mutation(
        "only /proc and /sys go before the root is moved",
        "bare_proc",
        (("krun/apply/root.py", "reversed(_full_views(root))", '("/proc", "/sys")'),),
    ),
    Mutation(
        "a fifo at /etc/passwd is waited for",
        "passwd_that_blocks",
        (
            (
                "krun/execution.py",
                "os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC",
                "os.O_RDONLY | os.O_CLOEXEC",
            ),
        ),
    ),
    Mutation(
        "krun's own file is looked at when its modules are loaded",
        "2019_5736_krun_knows",
        (
            (
                "krun/execution.py",
                "\n_own_file = (0, 0)\n",
                '\n_own_file = (lambda one: (one.st_dev, one.st_ino))(os.stat("/proc/self/exe"))\n',
            ),
        ),
    ),
)

_SURVEY, _TRANSLATE = "tests/unit/test_survey.py", "tests/unit/test_translate.py"

# docs/policy.md: what an image and a bundle cannot do.
POLICY = (
    Mutation(
        "an init is known by its mount alone, wherever the file lies",
        "where_an_init_comes_from or an_init_of_the_image",
        (("krun/survey.py", "if not _is_hosts(source, rootfs, policy):", "if False:"),),
        _SURVEY,
    ),
    Mutation(
        "an init may be anybody's to write",
        "an_init_of_the_image",
        (("krun/survey.py", "and not status.st_mode & 0o022", ""),),
        _SURVEY,
    ),
    Mutation(
        "an init may be mounted writable",
        "an_init_of_the_image",
        (("krun/survey.py", 'if "rw" in (mount.get("options") or []) or', "if"),),
        _SURVEY,
    ),
    Mutation(
        "what covers an init does not count",
        "an_init_of_the_image",
        (("krun/survey.py", 'if destination.startswith(path + "/"):', "if False:"),),
        _SURVEY,
    ),
    Mutation(
        "a program before -- is an option of the init",
        "what_a_clients_init_would_run",
        (("krun/survey.py", 'if not word.startswith("-"):', "if False:"),),
        _SURVEY,
    ),
    Mutation(
        "km as an entrypoint has its options from the image",
        "entrypoints_that_are_km",
        (
            (
                "krun/survey.py",
                '            extension.permit_km(members, "process.args: km option", policy)\n',
                "",
            ),
        ),
        _SURVEY,
    ),
    Mutation(
        "a script may be a listed program, with what it reads",
        "a_script_whose_interpreter_is_listed",
        (("krun/survey.py", "if found.script or km_words else", "if km_words else"),),
        _SURVEY,
    ),
    Mutation(
        "a listed program may be linked dynamically",
        "scripts_and_dynamic_programs",
        (("krun/direct.py", "program.dynamic and not entry.trust_image_libraries", "False"),),
        _SURVEY,
    ),
    Mutation(
        "a listed program is not hashed",
        "a_changed_file or a_mount_over_the_file or a_link_to_another",
        (
            (
                "krun/direct.py",
                "if _read(source, fd) != sha256:",
                "_read(source, fd)\n        if 0:",
            ),
        ),
        _SURVEY,
    ),
    Mutation(
        "a copy that is there already stands for whatever the container has",
        "a_file_that_changed_since",
        (("krun/direct.py", "good = _read(source, None) == entry.sha256", "good = True"),),
        _SURVEY,
    ),
    Mutation(
        "mounts do not count when a program is looked up",
        "a_mount_over_the_file",
        (("krun/view.py", "over = self._over.get(path)", "over = None"),),
        _SURVEY,
    ),
    Mutation(
        "the host's files are programs of a container through its /proc",
        "what_cannot_run",
        (("krun/payload.py", "if unseen.fstype in _NO_PROGRAMS:", "if False:"),),
        _SURVEY,
    ),
    Mutation(
        "a bundle's own list adds programs to another's",
        "direct_list_of_a_bundle",
        (
            (
                "krun/extension.py",
                "listed if digests is None else listed & set(digests)",
                "listed if digests is None else listed | set(digests)",
            ),
        ),
        _TRANSLATE,
    ),
    Mutation(
        "the environment steers the monitor",
        "cannot_steer_km",
        (("krun/translate.py", "if name.startswith(km.RESERVED_ENV):", "if False:"),),
        _TRANSLATE,
    ),
    Mutation(
        "krun's own annotation may come from outside",
        "label_mode",
        (
            (
                "krun/translate.py",
                "    spec = _without(spec, (extension.STATE,))\n    process",
                "    process",
            ),
        ),
        _TRANSLATE,
    ),
    Mutation(
        "the monitor lies below a /dev that the image can move",
        "place_outside_a_dev",
        (("krun/translate.py", "facts.dev_is_directory", "True"),),
        _TRANSLATE,
    ),
    *(
        Mutation(
            f"a bundle may choose {name}",
            tests,
            (("krun/extension.py", text, "if False:"),),
            _TRANSLATE,
        )
        for name, tests, text in (
            (
                "its km",
                "cannot_loosen",
                'if "monitorPath" in chosen and chosen["monitorPath"] not in '
                'allow.get("monitorPaths", []):',
            ),
            (
                "its init",
                "cannot_loosen",
                'if chosen.get("init", "auto") not in ("auto", "none", policy.init_path):',
            ),
            (
                "mode label",
                "cannot_loosen",
                'if chosen.get("mode") == "label" and policy.mode == "all":',
            ),
            (
                "sandbox native",
                "sandbox_setting",
                'if chosen.get("sandbox") == "native" and policy.sandbox == "vm":',
            ),
            (
                "exec outside of the VM",
                "cannot_loosen",
                'if chosen.get("execOutsideVM") is True and not policy.exec_outside_vm:',
            ),
            ("km's debugger", "cannot_loosen", "if not allow.get(name, False):"),
            ("annotations that are not listed", "cannot_loosen", "if not listed:"),
        )
    ),
    Mutation(
        "monitor none needs no list",
        "monitor_none",
        (("krun/translate.py", 'if monitor == "none" and not direct:', "if False:"),),
        _TRANSLATE,
    ),
    Mutation(
        "crun's annotations of an image reach the host",
        "which_annotations_of_crun",
        (
            (
                "krun/extension.py",
                "not any(mark in annotations for mark in _CLIENT_MARKS) or _CONTAINED",
                "True",
            ),
        ),
        "tests/kernel/test_native_crun.py",
    ),
    Mutation(
        "a checkpoint is restored outside of a VM",
        "what_would_run_in_a_vm",
        (("krun/commands/restore.py", "    _check_allowed(call)\n", ""),),
        "tests/unit/test_restore.py",
    ),
    Mutation(
        "a policy that others can write is obeyed",
        "others_can_write",
        (("krun/policy.py", "status.st_mode & 0o022 or", ""),),
        "tests/unit/test_policy.py",
    ),
)

_RUN = "tests/kernel/test_builtin_run.py"

# docs/security-builtin.md.
BUILTIN = (
    Mutation(
        "the payload's files of /proc are the monitor's",
        "cpython",
        (("krun/monitor/builtin/procfs.py", "name in HIDDEN:", "False:"),),
        _RUN,
    ),
    Mutation(
        "the payload can open the KVM device",
        "cpython",
        (
            (
                "krun/monitor/builtin/procfs.py",
                "if status.st_rdev in (KVM_DEVICE, process.device_number):",
                "if False:",
            ),
        ),
        _RUN,
    ),
    Mutation(
        "the command line and the environment of krun's caller stay",
        "command_line_only",
        (("krun/monitor/builtin/procfs.py", "    if end > start:\n", "    if False:\n"),),
        _RUN,
    ),
    Mutation(
        "socket options may hold addresses",
        "no_address_comes",
        (
            (
                "krun/monitor/builtin/sockets.py",
                "    6: frozenset((*range(35), *range(36, 64))),",
                "    6: frozenset(range(64)),",
            ),
        ),
        "tests/kernel/test_builtin_waits.py",
    ),
    Mutation(
        "the filter allows a call that the table lacks",
        "filter_allows_exactly",
        (
            (
                "krun/monitor/builtin/confine.py",
                "borders.append((last, RET_ENOSYS))",
                "borders.append((last + 1, RET_ENOSYS))",
            ),
        ),
        "tests/unit/test_builtin_table.py",
    ),
)

MUTATIONS = (*ESCAPES, *POLICY, *BUILTIN)


def run(tree: Path, file: str, tests: str) -> int:
    """Run tests in a copy of the tree; returns pytest's exit status."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        file,
        "-k",
        tests,
    ]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{file}, {tests}: pytest ended with {done.returncode}\n{done.stdout}")
    return done.returncode


def mutate(tree: Path, mutation: Mutation) -> None:
    """Make the edits, each of a text that is there once."""
    for file, text, replacement in mutation.edits:
        path = tree / file
        source = path.read_text()
        if source.count(text) != 1:
            raise RuntimeError(f"{mutation.name}: {file} has {source.count(text)} times: {text!r}")
        path.write_text(source.replace(text, replacement))
    compile_all = [sys.executable, "-m", "compileall", "-q", *(edit[0] for edit in mutation.edits)]
    subprocess.run(compile_all, cwd=tree, check=True)


def main() -> int:
    """Run every mutation whose name or tests contain the words of the command line."""
    words = sys.argv[1:]
    chosen = [one for one in MUTATIONS if all(word in one.name + one.tests for word in words)]
    missed = []
    begun = time.monotonic()
    for mutation in chosen:
        with tempfile.TemporaryDirectory(prefix="krun-mutate-") as name:
            tree = Path(name) / "krun"
            listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
            files = subprocess.run(
                listed, cwd=REPOSITORY, capture_output=True, text=True, check=True
            )
            for file in filter(None, files.stdout.split("\0")):
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / file, tree / file, follow_symlinks=False)
            before = run(tree, mutation.file, mutation.tests)
            mutate(tree, mutation)
            after = run(tree, mutation.file, mutation.tests)
        noticed = before == 0 and after == 1
        if not noticed:
            missed.append(mutation)
        state = "noticed" if noticed else "fails without it" if before else "NOT NOTICED"
        print(f"{state:16} {mutation.tests:28} {mutation.name}", flush=True)
    seconds = time.monotonic() - begun
    print(f"{len(chosen) - len(missed)} of {len(chosen)} noticed in {seconds:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
