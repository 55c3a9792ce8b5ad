"""krun install: into a prefix of its own, read by the real podman, dockerd and containerd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDS_ROOT = needs.mark(root="mounts, daemons")

# As people write them: indented with tabs, commented, with keys that krun knows nothing of.
DAEMON_JSON = (
    '{\n\t"log-level": "warn",\n\t"runtimes": {"other": {"path": "/bin/true"}},\n\t"x": 1\n}'
)
CONFIG_TOML = """\
version = 2 # ours
[debug]
  level = "info"

[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
"""


def krun(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "krun", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **more)


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def snapshot(directory: Path) -> dict[str, object]:
    """Return every path below with its kind, mode, content; and when it was last changed."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = (path.read_bytes(), status.st_mtime_ns)
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_uid, content)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with krun in it."""
    prefix = tmp_path_factory.mktemp("install") / "usr"
    good(krun("install", "--prefix", prefix))
    return prefix


def test_launcher_runs_every_kind_of_verb(installed: Path, tmp_path: Path) -> None:
    def run(*words: object, name: str = "krun") -> subprocess.CompletedProcess[str]:
        # Another's directory, and nothing of the checkout or the virtual environment.
        command = ["env", "-i", str(installed / "bin" / name), *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert "krun version" in good(run("--version"))
    assert "kontain" in good(run("install", "--help"))
    assert good(run("completion", "bash"))
    for name in ("krun", "kontain"):
        done = run("--root", tmp_path, "state", "nothing", name=name)
        assert done.returncode == 1 and "does not exist" in done.stderr
    (tmp_path / "config.json").write_text('{"ociVersion": "1.0"}')
    done = run("validate", "--bundle", tmp_path)
    assert done.returncode == 1 and "traceback" not in done.stderr.lower()
    assert json.loads(run("check", "--format", "json").stdout)["checks"]
    assert good(run("--root", tmp_path, "list", name="krun-label-trigger")).startswith("ID")


def test_library_is_a_copy_that_nothing_is_written_to(installed: Path, tmp_path: Path) -> None:
    """Neither the checkout nor the virtual environment is needed to run it."""
    text = (installed / "bin" / "krun").read_text()
    assert str(ROOT) not in text and sys.prefix not in text
    before = snapshot(installed)
    trace = tmp_path / "trace"
    words = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", trace, installed / "bin/krun"]
    for verb in ("--help", "list"):
        subprocess.run([*words, verb], stdout=subprocess.DEVNULL, check=True, cwd="/", env={})
        opened = trace.read_text()
        assert str(installed) in opened
        assert str(ROOT) not in opened and f"{sys.prefix}/" not in opened
    assert snapshot(installed) == before


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A staging directory with configuration of its owner's in it."""
    stage = tmp_path / "stage"
    files = {
        "etc/docker/daemon.json": DAEMON_JSON,
        "etc/containerd/config.toml": CONFIG_TOML,
        "etc/containers/containers.conf": '[engine]\nruntime_supports_json = ["crun", "mine"]\n',
        "usr/local/share/zsh/site-functions/_krun": "# someone's own\n",
    }
    for name, text in files.items():
        path = stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o640)
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return stage


EVERY = ("--podman", "--docker", "--containerd", "--crio")


def test_install_twice_then_uninstall_restores(stage: Path) -> None:
    before = snapshot(stage)
    good(krun("install", "--destdir", stage, *EVERY))
    daemon = json.loads((stage / "etc/docker/daemon.json").read_text())
    assert daemon == {
        "log-level": "warn",
        "runtimes": {
            "other": {"path": "/bin/true"},
            "krun": {"path": "/usr/local/bin/krun"},
            "kontain": {"path": "/usr/local/bin/kontain"},
        },
        "x": 1,
    }
    drop_in = (stage / "etc/containers/containers.conf.d/50-krun.conf").read_text()
    assert 'runtime_supports_json = ["crun", "mine", "krun", "kontain"]' in drop_in
    assert "version = 2 # ours" in (stage / "etc/containerd/config.toml").read_text()
    assert (stage / "etc/crio/crio.conf.d/50-krun.conf").exists()
    assert (stage / "etc/docker/daemon.json").stat().st_mode & 0o777 == 0o640
    assert str(stage) not in (stage / "usr/local/bin/krun").read_text()

    once = snapshot(stage)
    assert "everything is in place" in good(krun("install", "--destdir", stage, *EVERY))
    again = snapshot(stage)
    manifest = "usr/local/lib/krun/manifest.json"
    assert once.pop(manifest)[2][0] == again.pop(manifest)[2][0]  # type: ignore[index]
    assert again == once

    said = good(krun("uninstall", "--destdir", stage)).splitlines()
    assert "restored /etc/docker/daemon.json" in said
    assert "removed /usr/local/bin/krun" in said
    assert snapshot(stage) == before
    done = krun("uninstall", "--destdir", stage)
    assert done.returncode == 1 and "nothing is installed" in done.stderr


def test_uninstall_keeps_what_others_changed_since(stage: Path) -> None:
    good(krun("install", "--destdir", stage, "--docker", "--containerd"))
    path = stage / "etc/docker/daemon.json"
    document = json.loads(path.read_text())
    document["debug"] = True
    path.write_text(json.dumps(document))
    toml = stage / "etc/containerd/config.toml"
    toml.write_text(toml.read_text().replace("# ours", "# still ours"))
    completion = stage / "usr/local/share/bash-completion/completions/krun"
    completion.write_text("# changed")
    # A second install finds a changed file, and keeps the change for the day it is undone.
    good(krun("install", "--destdir", stage, "--docker"))
    done = krun("uninstall", "--destdir", stage)
    good(done)
    document["runtimes"] = {"other": {"path": "/bin/true"}}
    assert json.loads(path.read_text()) == document
    assert toml.read_text() == CONFIG_TOML.replace("# ours", "# still ours")
    assert not (stage / "usr/local/lib/krun").exists()


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("etc/docker/daemon.json", '{"runtimes": {', "--docker"),
        ("etc/docker/daemon.json", '{"a": 1, "a": 2}', "--docker"),
        ("etc/docker/daemon.json", "[]", "--docker"),
        ("etc/docker/daemon.json", '{"runtimes": {"krun": {"path": "/o/krun"}}}', "--docker"),
        ("etc/containerd/config.toml", "version = ", "--containerd"),
        ("etc/containerd/config.toml", "version = 9", "--containerd"),
        ("etc/containerd/config.toml", "version = [2]", "--containerd"),
        ("etc/containerd/config.toml", "plugins = 5", "--containerd"),
        ("etc/containerd/config.toml", "plugins = {cri = {}}", "--containerd"),
        ("etc/containerd/config.toml", "[plugins]\ncri = [1]\n", "--containerd"),
        ("etc/containers/containers.conf", "[engine", "--podman"),
        ("usr/local/bin/krun", "#!/bin/sh\n# libkrun\n", "--podman"),
    ],
)
def test_what_it_cannot_read_stays_and_nothing_is_written(
    stage: Path, file: str, text: str, words: str
) -> None:
    path = stage / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    before = snapshot(stage)
    done = krun("install", "--destdir", stage, words)
    assert done.returncode == 1
    assert file in done.stderr and len(done.stderr.splitlines()) == 1
    assert "traceback" not in done.stderr.lower()
    assert snapshot(stage) == before


def test_lists_that_say_nothing_are_none(stage: Path) -> None:
    """dockerd takes null for no runtimes."""
    path = stage / "etc/docker/daemon.json"
    path.write_text('{"runtimes": null}')
    good(krun("install", "--cold", "--destdir", stage, "--docker"))
    assert set(json.loads(path.read_text())["runtimes"]) == {"krun", "kontain"}
    good(krun("uninstall", "--destdir", stage))
    assert path.read_text() == '{"runtimes": null}'


def test_other_name_leaves_another_krun_alone(stage: Path) -> None:
    other = stage / "usr/local/bin/krun"
    other.parent.mkdir(parents=True)
    other.symlink_to("/usr/bin/crun")
    before = snapshot(stage)
    good(krun("install", "--destdir", stage, "--docker", "--name", "kontain"))
    assert os.readlink(other) == "/usr/bin/crun"
    assert (stage / "usr/local/bin/kontain").read_text().startswith("#!/bin/sh\n# krun's launcher")
    runtimes = json.loads((stage / "etc/docker/daemon.json").read_text())["runtimes"]
    assert sorted(runtimes) == ["kontain", "other"]
    good(krun("uninstall", "--destdir", stage))
    assert snapshot(stage) == before


def test_names_of_other_runtimes_are_refused(stage: Path) -> None:
    """A launcher called crun would be the crun that it looks for."""
    before = snapshot(stage)
    for name in ("crun", "runc"):
        done = krun("install", "--destdir", stage, "--name", name)
        assert (done.returncode, done.stderr) == (
            2,
            f"krun: --name {name}: is another runtime's name\n",
        )
    assert snapshot(stage) == before


@NEEDS_ROOT
@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"format": 1, "entries": []}', '{"format": 1, "entries": {"/x": {}}}'),
        '{"format": 1, "entries": {"/x": 5}, "directories": []}',
    ],
)
def test_damaged_manifest_is_named(stage: Path, text: str) -> None:
    manifest = stage / "usr/local/lib/krun/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(text)
    for verb in (["install", "--cold"], ["uninstall"]):
        done = krun(*verb, "--destdir", stage)
        assert done.returncode == 1
        assert str(manifest) in done.stderr and "defect" not in done.stderr
        assert done.stderr.count("\n") == 1


def test_empty_prefix_is_a_mistake() -> None:
    for verb in ("install", "uninstall"):
        done = krun(verb, "--prefix", "")
        assert done.returncode == 2 and "--prefix" in done.stderr


def test_read_only_prefix(tmp_path: Path) -> None:
    mounts = f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mounts, "sh", sys.executable, "-m", "krun", "install"]
    done = subprocess.run(
        [*command, "--prefix", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"krun: {tmp_path}: read-only file system (")
    assert len(done.stderr.splitlines()) == 1


def test_killed_install_can_be_undone(stage: Path) -> None:
    """The manifest is there before the first file is: nothing is left by undoing half of it."""
    before = snapshot(stage)
    program = (
        "import os, sys\n"
        "from krun.install import manifest\n"
        "written = manifest.write_file\n"
        "def write_file(path, *rest):\n"
        "    if path.endswith('config.toml'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    written(path, *rest)\n"
        "manifest.write_file = write_file\n"
        "from krun.__main__ import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["install", "--destdir", str(stage), *EVERY]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True)
    assert done.returncode == -9
    assert (stage / "usr/local/bin/krun").exists()
    good(krun("uninstall", "--destdir", stage))
    assert snapshot(stage) == before


@pytest.fixture
def home() -> Iterator[Path]:
    """A home directory of user 34567; pytest's own directories are root's alone."""
    path = Path(tempfile.mkdtemp(prefix="krun-install-"))
    os.chown(path, 34567, 34567)
    yield path
    shutil.rmtree(path)


@NEEDS_ROOT
@pytest.mark.usefixtures("open_checkout")
def test_ordinary_user_installs_at_home(home: Path) -> None:
    user = 34567
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(home)}
    dropped = {"user": user, "group": user, "extra_groups": [], "env": env}
    refused = krun("install", "--prefix", "/usr/local", **dropped)
    assert refused.returncode == 1 and "--prefix ~/.local" in refused.stderr
    good(krun("install", "--prefix", home / ".local", "--podman", "--docker", **dropped))
    assert (home / ".config/containers/containers.conf.d/50-krun.conf").exists()
    assert "kontain" in (home / ".config/docker/daemon.json").read_text()
    done = subprocess.run(
        [home / ".local/bin/krun", "--version"], capture_output=True, text=True, **dropped
    )
    assert "krun version" in done.stdout
    good(krun("uninstall", "--prefix", home / ".local", **dropped))
    assert not list(home.iterdir())


def bound(source: Path, target: str, *words: object) -> list[str]:
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    start = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]
    return [*start, str(source), target, *map(str, words)]


@pytest.fixture(scope="module")
def staged(installed: Path) -> Path:
    """A staging directory with the clients' configuration for the prefix."""
    stage = installed.parent / "stage"
    path = stage / "etc/docker/daemon.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"log-level": "warn", "default-ulimits": {}}')
    good(krun("install", "--destdir", stage, "--prefix", installed, "--docker", "--podman"))
    return stage


@NEEDS_ROOT
def test_podman_reads_the_drop_in(installed: Path, staged: Path, tmp_path: Path) -> None:
    """podman finds the runtime by its name alone, and has it print its version."""
    conf = tmp_path / "containers"
    shutil.copytree("/etc/containers", conf)
    shutil.copytree(staged / "etc/containers", conf, dirs_exist_ok=True)
    # podman takes no long path for its run directory.
    run = Path(f"/run/krun-install-test-{os.getpid()}")
    for name in ("krun", "kontain"):
        command = ["podman", "--root", tmp_path / "root", "--runroot", run, "--runtime", name]
        command += ["--cgroup-manager", "cgroupfs", "info", "--format", "json"]
        done = subprocess.run(
            bound(conf, "/etc/containers", *command), capture_output=True, text=True, timeout=60
        )
        shutil.rmtree(run, ignore_errors=True)
        assert done.returncode == 0, done.stderr
        runtime = json.loads(done.stdout)["host"]["ociRuntime"]
        assert runtime["name"] == name
        assert runtime["path"] == str(installed / "bin" / name)
        assert "krun version" in runtime["version"]


@pytest.fixture
def dockerd(staged: Path, tmp_path: Path) -> Iterator[str]:
    """A dockerd with a daemon.json that krun added itself to; its socket."""
    path = staged / "etc/docker/daemon.json"
    # The paths of UNIX sockets are short (unix(7)).
    run = Path(tempfile.mkdtemp(prefix="krd-", dir="/run"))
    socket = f"unix://{run}/s"
    words = ["dockerd", "--config-file", path, "--data-root", tmp_path / "data", "-H", socket]
    words += ["--exec-root", run / "exec", "-p", run / "pid", "--bridge=none"]
    words += ["--iptables=false", "--ip6tables=false"]
    log = (tmp_path / "log").open("w")
    daemon = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)
    try:
        yield socket
    finally:
        daemon.terminate()
        daemon.wait(30)
        log.close()
        for place in (run, tmp_path / "data"):
            subprocess.run(["umount", "-R", place], capture_output=True)
        shutil.rmtree(run)


@NEEDS_ROOT
def test_dockerd_knows_the_runtimes(dockerd: str, installed: Path, tmp_path: Path) -> None:
    words = ["docker", "-H", dockerd, "info", "--format", "{{json .Runtimes}}"]
    until = time.monotonic() + 40
    while True:
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() not in ("", "null"):
            break
        assert time.monotonic() < until, (tmp_path / "log").read_text()
        # dockerd tells nobody that its socket answers.
        time.sleep(0.1)
    runtimes = json.loads(done.stdout)
    assert runtimes["krun"]["path"] == str(installed / "bin/krun")
    assert runtimes["kontain"]["path"] == str(installed / "bin/kontain")
    assert "runc" in runtimes


# crun refuses the hybrid layout; km is where krun looks for it, for this process alone.
PREPARE = """
set -e
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir -p /opt/kontain/bin
cp "$1" /opt/kontain/bin/km
shift
exec "$@"
"""


class Containers:
    """The installed krun, in a mount namespace for each call; says which calls start Python."""

    def __init__(self, launcher: Path, km: Path, directory: Path) -> None:
        self.launcher = launcher
        self.km = km
        self.trace = directory / "trace"
        self.state = directory / "state"

    def call(self, *words: object, status: int = 0) -> tuple[str, bool]:
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", PREPARE, "sh", self.km]
        command += ["strace", "-qq", "-e", "trace=execve", "-o", self.trace]
        command += [self.launcher, "--root", self.state, *words]
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, (words, done.stdout, done.stderr)
        return done.stdout, "python" in self.trace.read_text()


@pytest.fixture
def containers(installed: Path, km: Path, tmp_path: Path) -> Iterator[Containers]:
    made = Containers(installed / "bin/krun", km, tmp_path)
    yield made
    for name in os.listdir(made.state) if made.state.exists() else []:
        made.call("delete", "--force", name)


def _bundle(installed: Path, payload: Path, directory: Path, *args: str) -> Path:
    (directory / "rootfs").mkdir(parents=True)
    shutil.copy(payload, directory / "rootfs" / "payload")
    good(
        subprocess.run(
            [installed / "bin/krun", "spec", "--bundle", directory], capture_output=True, text=True
        )
    )
    document = json.loads((directory / "config.json").read_text())
    document["process"] |= {"args": ["/payload", *args], "terminal": False}
    (directory / "config.json").write_text(json.dumps(document))
    return directory


@NEEDS_ROOT
def test_life_of_a_crun_container_starts_python_once(
    containers: Containers, installed: Path, payload: Path, tmp_path: Path
) -> None:
    bundle = _bundle(installed, payload, tmp_path / "bundle", "nap")
    # The container's init keeps its standard output: it is not a pipe that this test reads.
    log = ("--log", tmp_path / "log", "--log-format", "json")
    create = f'"$0" --root {containers.state} create --bundle {bundle} a >/dev/null 2>&1 </dev/null'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", PREPARE, "sh"]
    subprocess.run([*command, containers.km, "sh", "-c", create, containers.launcher], check=True)
    assert json.loads(containers.call("state", "a")[0])["status"] == "created"
    assert not containers.call(*log, "start", "a")[1]
    text, python = containers.call(*log, "state", "a")
    assert (json.loads(text)["status"], python) == ("running", False)
    for words in (("pause", "a"), ("resume", "a"), ("kill", "a", "TERM")):
        assert not containers.call(*log, *words)[1], words
    until = time.monotonic() + 20
    while json.loads(containers.call("state", "a")[0])["status"] != "stopped":
        assert time.monotonic() < until
    assert not containers.call("delete", "a")[1]
    assert not list(containers.state.iterdir())
    # There is none of that name any more: Python says so.
    assert containers.call("state", "a", status=1)[1]
    assert containers.call("delete", "--force", "a")[1]


@NEEDS_ROOT
@pytest.mark.parametrize(
    "options",
    [
        ("--monitor=km",),
        ("--engine=native", "--monitor=km"),
        ("--engine=native", "--monitor=builtin"),
    ],
    ids=" ".join,
)
def test_engines_and_monitors_run_from_the_archive(
    containers: Containers,
    installed: Path,
    payload: Path,
    km_is_real: bool,
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    """Nothing that the archive leaves out of the modules is missed."""
    bundle = _bundle(installed, payload, tmp_path / "bundle", "uname")
    text, _ = containers.call(*options, "run", "--bundle", bundle, "b")
    assert os.uname().release in text
    assert (".kontain.KVM" in text) == ("--monitor=builtin" in options or km_is_real)
    assert not list(containers.state.iterdir())


@pytest.mark.parametrize("text", ["", CONFIG_TOML, 'disabled_plugins = ["x"]\n'])
@needs.mark("containerd")
def test_containerd_reads_the_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    from krun.install import clients

    path.write_text(clients.containerd(text, {"krun": "/usr/local/bin/krun"}, "config.toml"))
    done = subprocess.run(
        ["containerd", "--config", path, "config", "dump"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    import tomllib

    plugins = tomllib.loads(done.stdout)["plugins"]
    cri = plugins["io.containerd.grpc.v1.cri"]["containerd"]
    assert cri["runtimes"]["krun"]["options"]["BinaryName"] == "/usr/local/bin/krun"
    assert cri["runtimes"]["krun"]["pod_annotations"] == ["app.kontain.*"]
    assert "runc" in cri["runtimes"]


def test_wheel_installs_without_the_checkout(tmp_path: Path) -> None:
    """A wheel made from an sdist, alone in a new environment, has all that install needs."""
    copy = tmp_path / "source"
    copy.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(None, good(listed).split("\0")):
        if not name.startswith("tests/data/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)

    def build(what: str, tree: Path) -> Path:
        program = "import sys; from setuptools import build_meta as b; "
        program += f"print(b.build_{what}(sys.argv[1]))"
        words = [sys.executable, "-c", program, tmp_path]
        done = subprocess.run(words, cwd=tree, capture_output=True, text=True)
        return tmp_path / good(done).splitlines()[-1]

    sdist = build("sdist", copy)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    assert not (unpacked / "tests").exists()
    wheel = build("wheel", unpacked)
    data = [
        *(f"krun/schemas/{path.name}" for path in (copy / "spec-schema").glob("*.json")),
        *(f"krun/packaging/{path.name}" for path in (copy / "packaging").glob("*.in")),
        *(f"krun/packaging/systemd/{path.name}" for path in copy.glob("packaging/systemd/*")),
        *(f"krun/images/programs/{path.name}" for path in copy.glob("hooks/krun-*")),
        *(f"krun/images/programs/hooks.d/{path.name}" for path in copy.glob("hooks/hooks.d/*")),
    ]
    modules = [str(path.relative_to(copy)) for path in (copy / "krun").rglob("*.py")]
    assert len(data) > 20
    assert len(modules) > 200
    made = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("krun/")}
    assert made == {*data, *modules}
    shutil.rmtree(copy)
    shutil.rmtree(unpacked)
    fresh = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    python = fresh / "bin/python"
    pip = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *pip, wheel], check=True)
    # The third-party packages are those that the tests run with; no network is needed.
    site = next(fresh.glob("lib/python*/site-packages"))
    (site / "tests.pth").write_text(sysconfig.get_paths()["purelib"])
    prefix = tmp_path / "usr"
    words = ["install", "--prefix", prefix, "--destdir", tmp_path / "stage", *EVERY]
    done = subprocess.run([fresh / "bin/krun", *words], capture_output=True, text=True)
    good(done)
    done = subprocess.run(
        [fresh / "bin/krun", "install", "--prefix", prefix], capture_output=True, text=True
    )
    good(done)
    shutil.rmtree(fresh)
    done = subprocess.run([prefix / "bin/krun", "--version"], capture_output=True, text=True)
    assert "krun version" in good(done)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text("{}")
    done = subprocess.run(
        [prefix / "bin/krun", "validate", "--bundle", bundle], capture_output=True, text=True
    )
    assert done.returncode == 1 and "ociVersion" in done.stdout + done.stderr
