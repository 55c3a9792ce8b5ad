"""One test for each class of public runtime escape; docs/security.md lists them with the defence.

Each plays the attacker with files, links and processes of a hostile container.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import installed
import needs
import pytest
from km import build
from native_parts import Native, configuration

from krun.linux.libc import syscall

# fcntl(2): F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE.
F_GET_SEALS = 1034
F_SEAL_ALL = 0xF
# rename(2); the number is x86-64's.
SYS_RENAMEAT2, AT_FDCWD, RENAME_EXCHANGE = 316, -100, 2
LOADER = "lib64/ld-linux-x86-64.so.2"
INTERPRETER = Path(os.path.realpath("/usr/bin/python3"))


def created(native: Native, document: dict[str, Any]) -> str:
    native.write(document)
    name = native.name()
    native("create", "--bundle", native.bundle, name, stdout=subprocess.DEVNULL)
    return name


def test_2016_9962_exec_is_not_seen_by_the_container(native: Native) -> None:
    """A container that may trace looks for krun's process while exec enters; there is none."""
    document = configuration(
        "sh",
        "-c",
        # Without a fork: it sees what lives for a tenth of a millisecond.
        "while [ ! -e /stop ]; do for p in /proc/[0-9]*; do read -r name < $p/comm || continue; "
        "case $name in sh | true) ;; *) echo $p $name ;; esac; done; done > /seen 2> /dev/null",
    )
    for sets in document["process"]["capabilities"].values():
        sets.append("CAP_SYS_PTRACE") if "CAP_SYS_PTRACE" not in sets else None
    name = created(native, document)
    native("start", name)
    # It does see what is there.
    assert native("exec", name, "sleep", "0.2").returncode == 0
    for _ in range(20):
        assert native("exec", name, "true").returncode == 0
    (native.rootfs / "stop").touch()
    seen = (native.rootfs / "seen").read_text(errors="replace")
    assert "sleep" in seen
    # Whichever way krun was started (krun.install.warm); hold's program is a memory file.
    names = {line.partition(" ")[2] for line in seen.splitlines()}
    assert names & {"krun", "python3", "python3.11", INTERPRETER.name} == set()


def test_2019_5736_proc_self_exe_is_not_the_hosts(native: Native) -> None:
    """A payload that is a link to /proc/self/exe gets hold, a sealed memory file, not python3.

    The image brings the loader that python3 would be started with; the warm start needs none.
    """
    warm = Path(installed.words("warm")[0])
    before = [hashlib.sha256(path.read_bytes()).digest() for path in (INTERPRETER, warm)]
    (native.rootfs / LOADER).parent.mkdir()
    build.loader(native.rootfs / LOADER)
    shutil.copy(INTERPRETER, native.rootfs / "known")
    assert native.run(configuration("/known")).stdout == "/known\n", "the loader would tell"
    if installed.starts_warm():
        shutil.copy(warm, native.rootfs / "known")
        assert "launcher" in native.run(configuration("/known"), 1).stderr, "it would tell"
    os.symlink("/proc/self/exe", native.rootfs / "self")
    (native.rootfs / "script").write_text("#!/proc/self/exe\n")
    (native.rootfs / "script").chmod(0o755)
    for program in ("/self", "/script"):
        done = native.run(configuration(program), None)
        assert done.stdout == "" and "launcher" not in done.stderr
        name = native.start("sleep", "100")
        done = native("exec", name, program, status=None)
        assert done.stdout == "" and "launcher" not in done.stderr
    name = created(native, configuration("sleep", "100"))
    exe = f"/proc/{native.state(name)['pid']}/exe"
    assert os.readlink(exe) == "/memfd:krun (deleted)"
    fd = os.open(exe, os.O_RDONLY)
    assert fcntl.fcntl(fd, F_GET_SEALS) == F_SEAL_ALL
    os.close(fd)
    native("start", name)
    with pytest.raises(OSError):
        # Sealed, whoever asks: this is the host's root, outside.
        name = created(native, configuration("sleep", "100"))
        os.open(f"/proc/{native.state(name)['pid']}/exe", os.O_WRONLY)
    assert [hashlib.sha256(path.read_bytes()).digest() for path in (INTERPRETER, warm)] == before


@pytest.mark.parametrize("destination", ["/proc", "/proc/self/attr", "/proc/sys"])
def test_2019_16884_nothing_is_mounted_over_proc(native: Native, destination: str) -> None:
    (native.directory / "fake").mkdir()
    document = configuration("cat", "/proc/self/attr/current")
    mount = {"destination": destination, "type": "bind", "source": str(native.directory / "fake")}
    document["mounts"].append(mount | {"options": ["bind"]})
    assert "/proc" in native.run(document, 1).stderr


def test_2019_19921_proc_reached_by_a_link_is_not_covered(native: Native) -> None:
    """The mount's destination does not say /proc, a link of the image leads there."""
    (native.directory / "fake").mkdir()
    os.symlink("/proc/sys", native.rootfs / "elsewhere")
    document = configuration("ls", "/elsewhere")
    mount = {"destination": "/elsewhere", "type": "bind", "source": str(native.directory / "fake")}
    document["mounts"].append(mount | {"options": ["bind"]})
    assert "is inside /proc" in native.run(document, 1).stderr


@pytest.mark.parametrize("fstype", ["tmpfs", "devpts", "mqueue", "cgroup"])
def test_2019_19921_a_file_system_does_not_go_there(native: Native, fstype: str) -> None:
    """A new file system has no source that could be procfs, so only the place tells."""
    os.symlink("/proc", native.rootfs / "elsewhere")
    document = configuration("ls", "/proc")
    document["mounts"].append({"destination": "/elsewhere", "type": fstype, "source": fstype})
    assert "is inside /proc" in native.run(document, 1).stderr


@pytest.mark.parametrize("name", ["proc", "sys"])
def test_2023_27561_proc_and_sys_are_not_links(native: Native, name: str) -> None:
    (native.rootfs / "real").mkdir()
    os.symlink("/real", native.rootfs / name)
    said = native.run(configuration("true"), 1).stderr
    assert f"on /{name}: must be mounted on ordinary directory" in said


def test_2021_30465_links_exchanged_while_mounting(native: Native) -> None:
    """While containers are made, a directory of the root keeps turning into a link to the host."""
    host = native.directory / "host"
    host.mkdir()
    volume = native.directory / "volume"
    volume.mkdir()
    link, place = native.rootfs / "link", native.rootfs / "place"
    place.mkdir()
    os.symlink(f"/..{'/..' * 8}{host}", link)
    stop = threading.Event()

    def exchange() -> None:
        one, other = os.fsencode(place), os.fsencode(link)
        while not stop.is_set():
            syscall(SYS_RENAMEAT2, AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE)

    document = configuration("true")
    mount = {"destination": "/place/deep/er", "type": "bind", "source": str(volume)}
    document["mounts"].append(mount | {"options": ["bind"]})
    native.write(document)
    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(15):
            native("run", "--bundle", native.bundle, native.name(), status=None)
    finally:
        stop.set()
        thread.join()
    assert list(host.iterdir()) == [], "a directory was made on the host"


def test_absolute_links_stay_inside(native: Native) -> None:
    outside = native.directory / "outside"
    outside.mkdir()
    os.symlink(str(outside), native.rootfs / "data")
    (native.directory / "volume").mkdir()
    document = configuration("true")
    source = str(native.directory / "volume")
    document["mounts"].append(
        {"destination": "/data/sub", "type": "bind", "source": source, "options": ["bind"]}
    )
    native.run(document)
    assert list(outside.iterdir()) == []
    assert (native.rootfs / str(outside).lstrip("/") / "sub").is_dir()


def test_2022_29162_inheritable_capabilities_are_what_was_asked(native: Native) -> None:
    text = native.shell("grep Cap /proc/self/status")
    assert "CapInh:\t0000000000000000" in text
    assert "CapAmb:\t0000000000000000" in text
    name = native.start("sleep", "100")
    text = native("exec", "--cap", "CAP_CHOWN", name, "grep", "Cap", "/proc/self/status").stdout
    assert "CapInh:\t0000000000000000" in text


def test_2023_25809_cgroup_of_the_host_is_not_writable(native: Native) -> None:
    script = "for d in /sys/fs/cgroup/*; do mkdir $d/evil; done; ls -d /sys/fs/cgroup/*/evil"
    document = configuration("sh", "-c", script)
    os.symlink("busybox", native.rootfs / "bin/mkdir")
    mount = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}
    document["mounts"].append(mount | {"options": ["nosuid", "noexec", "nodev", "ro"]})
    document["linux"]["namespaces"] = [
        one for one in document["linux"]["namespaces"] if one["type"] != "cgroup"
    ]
    done = native.run(document, None)
    assert done.stdout == ""
    assert done.stderr.count("Read-only") > 1


def test_2023_28642_labels_are_written_to_the_hosts_proc(native: Native) -> None:
    """A fake /proc of the image cannot swallow the label: asking for one must fail here."""
    enabled = Path("/sys/module/apparmor/parameters/enabled")
    if enabled.exists() and enabled.read_text() == "Y\n":
        pytest.skip("AppArmor is active: the failure this test looks for does not happen")
    attr = native.rootfs / "proc/self/attr/apparmor"
    attr.mkdir(parents=True)
    (attr / "exec").touch()
    document = configuration("true")
    document["process"]["apparmorProfile"] = "docker-default"
    document["mounts"] = [one for one in document["mounts"] if one["destination"] != "/proc"]
    document["linux"]["maskedPaths"] = document["linux"]["readonlyPaths"] = []
    assert "docker-default" in native.run(document, 1).stderr
    assert (attr / "exec").read_text() == ""


@pytest.fixture
def careless(native: Native) -> Iterator[tuple[int, ...]]:
    """Descriptors of the host's root that a careless caller leaves open for krun."""
    fds = [os.open("/", os.O_RDONLY | os.O_DIRECTORY)]
    while len(fds) < 12:
        fds.append(os.dup(fds[0]))
    yield tuple(fds)
    for fd in fds:
        os.close(fd)


def test_2024_21626_no_directory_of_the_host_is_left(
    native: Native, careless: tuple[int, ...]
) -> None:
    secret = native.directory / "secret"
    secret.write_text("of the host")
    script = f"cat .{secret} ../../../../..{secret}"
    numbers = sorted({*range(3, 24), *careless})
    for number in numbers:
        document = configuration("sh", "-c", script)
        document["process"]["cwd"] = f"/proc/self/fd/{number}"
        done = native.run(document, None, pass_fds=careless)
        assert (done.returncode != 0, done.stdout) == (True, "")
    name = native.start("sleep", "100")
    for number in numbers:
        words = ("--cwd", f"/proc/self/fd/{number}", name, "sh", "-c", script)
        assert native("exec", *words, status=None, pass_fds=careless).stdout == ""


def test_2024_21626_descriptors_of_the_payload(native: Native, careless: tuple[int, ...]) -> None:
    document = configuration("ls", "/proc/self/fd")
    listed = native.run(document, pass_fds=careless).stdout.split()
    assert listed == ["0", "1", "2", "3"], "3 is ls's own"
    name = native.start("sleep", "100")
    pid = native.state(name)["pid"]
    assert sorted(os.listdir(f"/proc/{pid}/fd"), key=int) == ["0", "1", "2"]
    done = native("exec", name, "ls", "/proc/self/fd", pass_fds=careless)
    assert done.stdout.split() == ["0", "1", "2", "3"]


def test_2024_45310_no_directories_are_made_outside(native: Native) -> None:
    """Missing directories of a destination are made through descriptors below the root."""
    outside = native.directory / "outside"
    outside.mkdir()
    os.symlink(f"../../../../../../../../../..{outside}", native.rootfs / "up")
    document = configuration("true")
    document["mounts"].append({"destination": "/up/new/deep", "type": "tmpfs", "source": "tmpfs"})
    native.run(document)
    assert list(outside.iterdir()) == []


def test_2025_31133_masks_do_not_use_the_containers_null(native: Native) -> None:
    """The container's /dev/null is a link to what must stay as it is."""
    document = configuration("sh", "-c", "ls -l /proc/keys; cat /proc/keys")
    (native.directory / "dev").mkdir()
    os.symlink("/proc/sysrq-trigger", native.directory / "dev/null")
    mount = {"destination": "/dev", "type": "bind", "source": str(native.directory / "dev")}
    document["mounts"] = [one for one in document["mounts"] if one["destination"][:4] != "/dev"]
    document["mounts"].append(mount | {"options": ["bind"]})
    listed = native.run(document).stdout
    assert listed.startswith("crw"), listed
    assert "1,   3" in listed
    assert len(listed.splitlines()) == 1, "the mask shows content"


def test_2025_31133_the_hosts_null_is_looked_at(native: Native) -> None:
    """Something has put a file of its own at the host's /dev/null."""
    native.write(configuration("cat", "/proc/keys"))
    (native.directory / "null").write_text("not null")
    script = f'mount --bind {native.directory}/null /dev/null && exec "$@"'
    words = [*native.words, "run", "--bundle", str(native.bundle), native.name()]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *words],
        capture_output=True,
        text=True,
        input="",
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "/dev/null is not the null device" in done.stderr


def test_2025_52565_console_is_mounted_by_descriptor(native: Native, tmp_path: Path) -> None:
    """/dev/console of the image is a link; the terminal goes inside the root all the same."""
    outside = native.directory / "outside"
    outside.write_text("host file")
    document = configuration("sh", "-c", "tty; [ -c /dev/console ] && echo it is the console")
    os.symlink("busybox", native.rootfs / "bin/tty")
    (native.directory / "dev").mkdir()
    os.symlink(str(outside), native.directory / "dev/console")
    mount = {"destination": "/dev", "type": "bind", "source": str(native.directory / "dev")}
    document["mounts"] = [
        one for one in document["mounts"] if one["destination"] not in ("/dev", "/dev/pts")
    ] + [mount | {"options": ["bind"]}]
    (native.directory / "dev/pts").mkdir()
    document["mounts"].append(
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["newinstance"],
        }
    )
    document["process"]["terminal"] = True
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console"))
    listener.listen(1)
    native.write(document)
    name = native.name()
    words = ("create", "--bundle", native.bundle, "--console-socket", tmp_path / "console", name)
    native(*words, stdout=subprocess.DEVNULL)
    connection, _ = listener.accept()
    _, fds, _, _ = socket.recv_fds(connection, 64, 1)
    native("start", name)
    text = b""
    end = time.monotonic() + 10
    while b"the console" not in text and time.monotonic() < end:
        try:
            text += os.read(fds[0], 4096)
        except OSError:
            break
    assert text == b"/dev/pts/0\r\nit is the console\r\n"
    assert outside.read_text() == "host file"
    os.close(fds[0])
    connection.close()
    listener.close()


def test_2025_52565_a_false_devpts_is_refused(native: Native, tmp_path: Path) -> None:
    """What is called ptmx in a directory of the image is not even asked for a terminal."""
    document = configuration("true")
    document["process"]["terminal"] = True
    (native.directory / "dev/pts").mkdir(parents=True)
    os.mkfifo(native.directory / "dev/pts/ptmx")
    document["mounts"] = [one for one in document["mounts"] if one["destination"][:4] != "/dev"]
    mount = {"destination": "/dev", "type": "bind", "source": str(native.directory / "dev")}
    document["mounts"].append(mount | {"options": ["bind"]})
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console"))
    listener.listen(1)
    native.write(document)
    words = ("create", "--bundle", native.bundle, "--console-socket", tmp_path / "console")
    assert "/dev/pts is not a devpts mount" in native(*words, native.name(), status=1).stderr
    listener.close()


def test_2025_52881_sysctls_are_not_redirected(native: Native) -> None:
    """A sysctl is set in the kernel although the image has a /proc/sys and no procfs."""
    fake = native.rootfs / "proc/sys/net/ipv4"
    fake.mkdir(parents=True)
    (fake / "ip_forward").write_text("fake")
    document = configuration("sleep", "100")
    document["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}
    document["linux"]["maskedPaths"] = document["linux"]["readonlyPaths"] = []
    document["mounts"] = [one for one in document["mounts"] if one["destination"] != "/proc"]
    pid = native.state(created(native, document))["pid"]
    inside = ["nsenter", "-t", str(pid), "-n", "cat", "/proc/sys/net/ipv4/ip_forward"]
    assert subprocess.run(inside, capture_output=True, text=True).stdout == "1\n"
    assert (fake / "ip_forward").read_text() == "fake"


@pytest.mark.parametrize("name", ["kernel.core_uses_pid", "net.ipv4.../../kernel/core_uses_pid"])
def test_sysctls_of_the_host_are_refused(native: Native, name: str) -> None:
    # What it is already: no harm is done where it is not refused.
    value = Path("/proc/sys/kernel/core_uses_pid").read_text().strip()
    document = configuration("true")
    document["linux"]["sysctl"] = {name: value}
    assert "sysctl" in native.run(document, 1).stderr


def test_passwd_that_blocks_does_not(native: Native) -> None:
    (native.rootfs / "etc").mkdir()
    os.mkfifo(native.rootfs / "etc/passwd")
    assert native.shell("echo $HOME") == "/\n"


@pytest.mark.parametrize("options", [(), ("--no-pivot",)], ids=["pivot", "no-pivot"])
def test_a_user_namespace_inside_gets_no_bare_proc(
    native: Native, options: tuple[str, ...]
) -> None:
    """The kernel gives a new procfs to whoever sees a whole one already: nothing may be left."""
    (native.directory / "elsewhere with space").mkdir()
    script = "unshare -mrpf sh -c 'mount -t proc none /proc && echo bare'"
    document = configuration("sh", "-c", script)
    for name in ("unshare", "mount"):
        os.symlink("busybox", native.rootfs / "bin" / name)
    sets = document["process"]["capabilities"]
    for which in ("bounding", "effective", "permitted"):
        sets[which] = [*sets[which], "CAP_SETFCAP"]
    native.write(document)
    # The host has procfs in more than one place.
    place = native.directory / "elsewhere with space"
    inside = 'mount -t proc proc "$1" && shift && exec "$@"'
    words = [*native.words, "run", *options, "--bundle", str(native.bundle), native.name()]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "sh", str(place), *words],
        capture_output=True,
        text=True,
        input="",
    )
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert "mount: permission denied" in done.stderr


@needs.mark("strace")
@pytest.mark.parametrize("start", ["warm", "cold"])
def test_2019_5736_krun_knows_the_file_that_runs_it(
    native: Native, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Where Python makes the execve it refuses that file: asked for by this very process.

    The warm start has loaded its modules as another program.
    """
    monkeypatch.setenv("KRUN_TEST_START", start)
    name = native.start("sleep", "100")
    native.write(configuration("true"))
    trace = native.directory / "trace"
    strace = ["strace", "-qq", "-o", str(trace), "-e", "trace=newfstatat,clone,clone3,fork,vfork"]
    run = ["run", "--bundle", str(native.bundle), native.name()]
    for words in (run, ["exec", name, "true"]):
        done = subprocess.run([*strace, *native.words, *words], stdin=subprocess.DEVNULL)
        assert done.returncode == 0
        before_birth = trace.read_text().partition("clone")[0]
        assert '"/proc/self/exe"' in before_birth
