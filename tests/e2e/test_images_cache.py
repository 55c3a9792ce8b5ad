"""krun images cache against real stores and a real registry: the life of caches, and accidents."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import images_parts as parts
import needs
import pytest

from krun.__main__ import main
from krun.images import settings as images_settings
from krun.images.stores.choose import open_store
from krun.images.stores.model import Store

pytestmark = needs.mark(*parts.STORES, "htpasswd", "openssl", root=parts.ROOT)

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = parts.layer("base", 100_000)


class Place:
    """One store with a state directory of its own, and krun called on both."""

    def __init__(self, name: str, table: dict[str, object], base: Path, capfd: Any) -> None:
        self.name = name
        self.base = base
        self.state = base / "state"
        self.table = table
        self.capfd = capfd
        self.config = base / "images.toml"
        self.store: Store = open_store(images_settings.parse({"store": name, name: table}, "test"))
        self.settings()

    def settings(self, **changes: object) -> None:
        """Write images.toml anew."""
        values = {
            "store": self.name,
            "node": "node1",
            "state_directory": str(self.state),
            "disk_reserve": "0",
            "retries": 0,
            "backoff": "50ms",
            **changes,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        lines.append(f"[{self.name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in self.table.items()]
        self.config.write_text("\n".join(lines) + "\n")

    def argv(self, *words: str) -> list[str]:
        return ["images", *words, f"--config={self.config}"]

    def run(self, *words: str, status: int = 0) -> str:
        """Run krun images in this process; return what it printed."""
        got = main(self.argv(*words))
        out, err = self.capfd.readouterr()
        assert got == status, f"{words}: {got}\n{out}\n{err}"
        assert "traceback" not in err.lower()
        self.errors = err
        return out

    def spawn(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "krun", *self.argv(*words)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def apply(self, *documents: dict[str, Any], status: int = 0) -> str:
        path = self.base / "apply.yaml"
        path.write_text("\n---\n".join(json.dumps(document) for document in documents))
        return self.run("cache", "apply", "-f", str(path), status=status)

    def object(self, name: str) -> dict[str, Any]:
        return json.loads(self.run("cache", "describe", name, "--format=json"))

    def names(self) -> set[str]:
        return {name for image in self.store.images() for name in image.names}


def cache(name: str, *images: str, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kubefledged.io/v1alpha2",
        "kind": "ImageCache",
        "metadata": {"name": name, "namespace": "kube-fledged"},
        "spec": {"cacheSpec": [{"images": list(images)}], **more},
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[parts.Registry]:
    with parts.registry(tmp_path_factory.mktemp("registry") / "r") as registry:
        for name in ("a", "b", "c", "d"):
            registry.push(f"app/{name}", "1", [BASE, parts.layer(name)])
        registry.push("app/a", "1.2", [BASE, parts.layer("a12")])
        yield registry


@pytest.fixture(scope="module", params=["podman", "docker", "containerd"])
def any_store(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, object]]]:
    if request.param == "podman":
        with parts.podman() as table:
            yield "podman", table
        return
    # dockerd would try a broken download for a minute.
    with (
        parts.dockerd("--max-download-attempts=1")
        if request.param == "docker"
        else (parts.containerd()) as table
    ):
        yield request.param, table


@pytest.fixture(scope="module")
def podman_table() -> Iterator[dict[str, object]]:
    with parts.podman() as table:
        yield table


def emptied(place: Place) -> None:
    for image in place.store.images():
        if image.pinned:
            place.store.unpin(image)
        for name in image.names or image.digests:
            place.store.remove(name)


@pytest.fixture
def anywhere(
    any_store: tuple[str, dict[str, object]], tmp_path: Path, capfd: Any
) -> Iterator[Place]:
    place = Place(*any_store, tmp_path, capfd)
    yield place
    emptied(place)


@pytest.fixture
def place(podman_table: dict[str, object], tmp_path: Path, capfd: Any) -> Iterator[Place]:
    place = Place("podman", podman_table, tmp_path, capfd)
    yield place
    emptied(place)


def test_the_life_of_a_cache(anywhere: Place, served: parts.Registry) -> None:
    place, host = anywhere, served.host
    one, two, three = (f"{host}/app/{name}:1" for name in "abc")
    place.apply(cache("life", one, two))
    assert place.names() == {one, two}
    status = place.object("life")["status"]
    assert (status["status"], status["reason"]) == ("Succeeded", "ImageCacheCreate")
    assert status["failures"] == {}
    assert status["startTime"] <= status["completionTime"]
    assert status["conditions"][0]["type"] == "Ready"
    assert status["conditions"][0]["status"] == "True"
    assert [item["image"] for item in status["images"]] == [one, two]
    assert all(item["digest"].startswith("sha256:") for item in status["images"])

    # An update pulls what is new and removes what nobody wants any more; app/b is wanted twice.
    place.apply(cache("other", two))
    place.apply(cache("life", three))
    assert place.names() == {two, three}
    assert place.object("life")["status"]["reason"] == "ImageCacheUpdate"

    # What went missing behind krun's back returns with the next pass of the watcher.
    held = next(image for image in place.store.images() if three in image.names)
    if held.pinned:
        place.store.unpin(held)
    place.store.remove(three)
    place.run("cache", "watch", "--once")
    assert place.names() == {two, three}
    assert place.object("life")["status"]["reason"] == "ImageCacheRefresh"

    # Purged images stay away from passes, and come back with a refresh on demand.
    place.run("cache", "purge", "life")
    assert place.names() == {two}
    assert place.object("life")["status"]["reason"] == "ImageCachePurge"
    assert place.object("life")["metadata"].get("annotations", {}) == {}
    place.run("cache", "watch", "--once")
    assert place.names() == {two}
    place.run("cache", "refresh", "life")
    assert place.names() == {two, three}

    place.run("cache", "delete", "life")
    assert place.names() == {two}
    place.run("cache", "delete", "--all")
    assert place.names() == set()
    assert json.loads(place.run("cache", "get", "--format=json"))["items"] == []


def test_what_a_container_uses_is_never_removed(anywhere: Place, served: parts.Registry) -> None:
    place = anywhere
    name = f"{served.host}/app/a:1"
    place.apply(cache("used", name))
    store: Any = place.store
    if place.name == "podman":
        client = store._argv
        make = [*client, "create", "--name=user", "--network=none", name]
        remove = [*client, "rm", "user"]
    elif place.name == "docker":
        client = ["docker", "-H", store._host]
        make = [*client, "create", "--name=user", "--network=none", name]
        remove = [*client, "rm", "user"]
    else:
        make = store._ctr("containers", "create", name, "user")
        remove = store._ctr("containers", "rm", "user")
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    try:
        for verb in ("purge", "delete"):
            if verb == "delete":
                # A pass meanwhile tries the purge again, and again removes nothing.
                place.run("cache", "watch", "--once", status=1)
            assert "ImageInUse" in place.run("cache", verb, "used", status=1)
            assert place.names() == {name}
            assert place.object("used")["status"]["status"] == "Failed"
        place.run("gc", "--quota=0")
        assert place.names() == {name}
        assert "over the quota" in place.errors
    finally:
        subprocess.run(remove, check=True, stdout=subprocess.DEVNULL)
    # The finalizer's work goes on when the container is gone.
    place.run("cache", "watch", "--once")
    assert place.names() == set()
    assert place.run("cache", "get").count("\n") == 1


def test_verbs_for_images(anywhere: Place, served: parts.Registry) -> None:
    place = anywhere
    one, two = f"{served.host}/app/a:1", f"{served.host}/app/b:1"
    cold = json.loads(place.run("status", one, two, "--format=json"))
    assert [item["state"] for item in cold] == ["cold", "cold"]
    assert cold[0]["missing"] == cold[0]["total"] > 100_000
    assert f"{one}: pulled" in place.run("warm", one)
    assert f"{one}: present" in place.run("warm", one)
    warm = json.loads(place.run("status", one, two, "--format=json"))
    assert [item["state"] for item in warm] == ["warm", "partial"]
    assert 90 < warm[1]["percent"] < 100
    place.run("pin", one)
    listed = {item["image"]: item for item in json.loads(place.run("ls", "--format=json"))}
    assert listed[one]["pinned"] == "user"
    place.run("warm", two)
    dry = json.loads(place.run("gc", "--quota=0", "--dry-run", "--format=json"))
    assert dry["dropped"] == [two]
    assert place.names() == {one, two}
    place.run("gc", "--quota=0")
    assert place.names() == {one}
    place.run("unpin", one)
    place.run("gc", "--quota=0")
    assert place.names() == set()


def test_a_moved_latest_is_pulled_again_and_nothing_else(
    anywhere: Place, served: parts.Registry
) -> None:
    place = anywhere
    name = f"{served.host}/app/moving"
    served.push("app/moving", "latest", [BASE])
    place.apply(cache("moving", name))
    before = place.object("moving")["status"]["images"][0]["digest"]
    assert "is up to date" not in place.errors
    place.run("cache", "refresh", "moving")
    assert "is up to date" in place.errors
    digest = served.push("app/moving", "latest", [BASE, parts.layer("newer")])
    assert json.loads(place.run("status", name, "--format=json"))[0]["state"] == "outdated"
    place.run("cache", "refresh", "moving")
    after = place.object("moving")["status"]["images"][0]["digest"]
    assert after == digest != before


def test_pulls_at_the_same_time_fetch_a_shared_layer_once(
    anywhere: Place, served: parts.Registry
) -> None:
    place = anywhere
    shared = parts.layer("shared", 1_000_000)
    for number in range(3):
        served.push(f"share/i{number}", "1", [shared, parts.layer(f"own{number}")])
    sizes: list[int] = []
    with parts.slowed(served.host, 2_000_000, sizes) as slow:
        names = {f"{slow}/share/i{number}:1" for number in range(3)}
        place.run("warm", *names)
        assert place.names() == names
    assert 1_000_000 < sum(sizes) < 1_500_000


def test_one_bad_image_does_not_keep_others_away(place: Place, served: parts.Registry) -> None:
    good, bad = f"{served.host}/app/a:1", f"{served.host}/app/none:1"
    out = place.apply(cache("mixed", bad, good), status=1)
    assert place.names() == {good}
    status = place.object("mixed")["status"]
    assert (status["status"], status["reason"]) == ("Failed", "ImageCacheCreate")
    [failure] = status["failures"][bad]
    assert failure["node"] == "node1"
    assert failure["reason"] == "ErrImagePull"
    assert failure["message"] in out
    assert status["conditions"][0]["status"] == "False"


def test_a_damaged_object_fails_alone(place: Place, served: parts.Registry) -> None:
    one, two, three = (f"{served.host}/app/{name}:1" for name in "abc")
    place.apply(cache("good", one), cache("broken", two))
    file = place.state / "objects" / "ImageCache_kube-fledged_broken.json"
    whole = file.read_text()
    watcher = place.spawn("cache", "watch", "--interval=1s")
    try:
        for damage in (whole[:40], whole.replace('"images"', '"picures"')):
            # At once: the watcher must not meet half of it.
            file.with_name(".damage").write_text(damage)
            file.with_name(".damage").rename(file)
            out = place.apply(cache("good", one, three))
            assert "Succeeded" in out and place.names() == {one, two, three}
            listed = json.loads(place.run("cache", "get", "--format=json"))["items"]
            status = {item["metadata"]["name"]: item["status"] for item in listed}
            assert status["good"]["status"] == "Succeeded"
            assert status["broken"]["status"] == "Failed"
            assert status["broken"]["reason"] == "CacheSpecValidationFailed"
            assert str(file) in status["broken"]["message"]
            assert str(file) in place.object("broken")["status"]["message"]
            assert "CacheSpecValidationFailed" in place.run("cache", "get")
            # The rest is refreshed, the damaged one reported and left as it is.
            out = place.run("cache", "refresh", "--all", status=1)
            assert f"{file}: " in out and "Succeeded" in out
            assert "CacheSpecValidationFailed" in place.run("cache", "delete", "broken", status=1)
            assert file.read_text() == damage
            for verb in ("ls", "status", "gc --quota=1TiB"):
                place.run(*verb.split())
                assert f"{file}: " in place.errors
            place.apply(cache("good", one))
            assert place.names() == {one, two}
        time.sleep(1.5)
    finally:
        watcher.terminate()
        out_, err = watcher.communicate(timeout=20)
    assert watcher.returncode == 0 and b"traceback" not in err.lower()
    # It is told once, not with every pass.
    assert 1 <= out_.count(b"CacheSpecValidationFailed") <= 2
    place.run("cache", "delete", "broken", "--keep-images")
    assert not file.exists()
    file.write_text("")
    place.apply(cache("broken", two))
    assert place.object("broken")["status"]["status"] == "Succeeded"


def test_a_damaged_secret_fails_its_object_alone(place: Place, served: parts.Registry) -> None:
    one, two = (f"{served.host}/app/{name}:1" for name in "ab")
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "key", "namespace": "kube-fledged"},
        "data": {".dockerconfigjson": base64.b64encode(b"{}").decode()},
    }
    place.apply(secret, cache("with", one, imagePullSecrets=[{"name": "key"}]), cache("free", two))
    file = place.state / "secrets" / "kube-fledged_key.json"
    for image in place.store.images():
        place.store.remove(image.names[0])
    file.write_text("{")
    out = place.run("cache", "refresh", "--all", status=1)
    assert f"{file}: is not JSON" in out and "FailedToRetrieveImagePullSecret" in out
    assert "apply the Secret again" in out
    assert place.names() == {two}


def test_pull_secrets(place: Place, tmp_path: Path) -> None:
    with parts.registry(tmp_path / "private", users={"ann": "s3cret"}, tls=True) as private:
        private.push("app/p", "1", [BASE])
        assert private.ca is not None
        certs = tmp_path / "certs.d" / private.host
        certs.mkdir(parents=True)
        (certs / "ca.crt").write_bytes(private.ca.read_bytes())
        place.settings(certs_directories=[str(tmp_path / "certs.d")])
        name = f"{private.host}/app/p:1"
        wanting = cache("private", name, imagePullSecrets=[{"name": "key"}])

        out = place.run("cache", "get")
        place.apply(wanting, status=1)
        assert "there is no Secret kube-fledged/key" in place.errors
        assert place.run("cache", "get") == out

        def secret(password: str) -> dict[str, Any]:
            auth = base64.b64encode(f"ann:{password}".encode()).decode()
            inner = json.dumps({"auths": {private.host: {"auth": auth}}})
            return {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/dockerconfigjson",
                "metadata": {"name": "key", "namespace": "kube-fledged"},
                "data": {".dockerconfigjson": base64.b64encode(inner.encode()).decode()},
            }

        out = place.apply(secret("wrong"), wanting, status=1)
        assert "access denied" in out and "check the registry credentials" in out
        assert "wrong" not in out + place.errors
        place.apply(secret("s3cret"))
        place.run("cache", "refresh", "private")
        assert place.names() == {name}
        kept = place.state / "secrets" / "kube-fledged_key.json"
        assert kept.stat().st_mode & 0o777 == 0o600


def test_a_registry_that_goes_away_and_returns(place: Place, served: parts.Registry) -> None:
    place.settings(retries=6, backoff="200ms")
    name = f"{served.host}/app/d:1"
    served.stop()
    path = place.base / "gone.json"
    path.write_text(json.dumps(cache("gone", name)))
    running = place.spawn("cache", "apply", "-f", str(path))
    assert running.stderr is not None
    try:
        for line in running.stderr:
            if b"again in" in line:
                break
    finally:
        served.start()
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, out + err
    assert place.names() == {name}


def test_a_registry_that_stops_in_the_middle_of_a_pull(
    anywhere: Place, served: parts.Registry
) -> None:
    place = anywhere
    served.push("app/big", "1", [parts.layer("big", 6_000_000)])
    path = place.base / "big.json"
    with parts.slowed(served.host, 1_000_000) as slow:
        name = f"{slow}/app/big:1"
        path.write_text(json.dumps(cache("big", name)))
        running = place.spawn("cache", "apply", "-f", str(path))
        assert running.stderr is not None
        assert b"pulling" in running.stderr.readline()
        time.sleep(2)
        served.process.kill()
        served.process.wait()
    try:
        _, err = running.communicate(timeout=60)
        assert running.returncode == 1 and b"traceback" not in err.lower()
        status = place.object("big")["status"]
        assert status["status"] == "Failed"
        [failure] = status["failures"][name]
        assert failure["reason"] in ("ErrImagePull", "RegistryUnavailable")
        assert place.names() == set()
    finally:
        served.start()
    place.apply(cache("big", f"{served.host}/app/big:1"))
    assert place.names() == {f"{served.host}/app/big:1"}


@pytest.mark.parametrize("name", ["podman", "docker", "containerd"])
def test_a_full_disk(name: str, tmp_path: Path, served: parts.Registry, capfd: Any) -> None:
    with parts.small_disk(32 << 20) as disk, ExitStack() as stack:
        if name == "podman":
            table = parts.podman_settings(disk)
            stack.callback(parts.remove_podman, disk)
        elif name == "docker":
            table = stack.enter_context(parts.dockerd(data=disk / "data"))
        else:
            table = stack.enter_context(parts.containerd(data=disk / "data"))
        place = Place(name, table, tmp_path, capfd)
        served.push("app/huge", "1", [parts.layer("huge", 40_000_000)])
        huge, small = f"{served.host}/app/huge:1", f"{served.host}/app/a:1"
        out = place.apply(cache("full", huge, small), status=1)
        assert "NoDiskSpace" in out and "free disk space" in out, place.errors
        assert place.names() == {small}
        # Without the check beforehand the store finds out, and nothing of the pull is left.
        place.settings(disk_check=False)
        before = os.statvfs(disk).f_bavail
        out = place.run("cache", "refresh", "full", status=1)
        assert "no space left on device" in out and "free disk space" in out
        assert place.names() == {small}
        place.settings()
        assert "NoDiskSpace" in place.run("cache", "refresh", "full", status=1)
        assert parts.wait_until(lambda: os.statvfs(disk).f_bavail > before - 1000)


def test_a_killed_reconciler_leaves_no_process_and_goes_on(
    anywhere: Place, served: parts.Registry
) -> None:
    place = anywhere
    chance = random.Random(6)
    root = str(place.table.get("root") or place.table.get("address") or place.table["host"])
    daemons = set(parts.processes_of(root))
    with parts.slowed(served.host, 500_000) as slow:
        names = [f"{slow}/app/{name}:1" for name in "abcd"]
        path = place.base / "killed.json"
        path.write_text(json.dumps(cache("killed", *names)))
        for _ in range(4):
            running = place.spawn("cache", "apply", "-f", str(path))
            time.sleep(chance.uniform(0.2, 1.5))
            running.kill()
            running.communicate()
            for stored in (place.state / "objects").glob("[!.]*.json"):
                json.loads(stored.read_text())
        assert parts.wait_until(lambda: set(parts.processes_of(root)) <= daemons), (
            parts.processes_of(root)
        )
        place.run("cache", "apply", "-f", str(path))
        place.run("cache", "watch", "--once")
        assert place.names() == set(names)
    assert place.object("killed")["status"]["status"] == "Succeeded"


def test_a_podman_that_hangs_does_not_outlive_krun(place: Place, served: parts.Registry) -> None:
    served.push("app/long", "1", [parts.layer("long", 4_000_000)])
    root = str(place.table["root"])
    with parts.slowed(served.host, 500_000) as slow:
        running = place.spawn("warm", f"{slow}/app/long:1")
        assert running.stderr is not None
        running.stderr.readline()
        assert parts.wait_until(lambda: bool(services(root)))
        for pid in services(root):
            os.kill(pid, signal.SIGSTOP)
        running.kill()
        running.communicate()
        assert parts.wait_until(lambda: not parts.processes_of(root)), parts.processes_of(root)


def services(root: str) -> list[int]:
    """Return the podman services of a root that a pull has reached."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"podman\0") and root.encode() in line and b"service" in line:
            found.append(int(entry))
    return found


def test_a_pull_under_way_does_not_outlive_krun(anywhere: Place, served: parts.Registry) -> None:
    place = anywhere
    root = str(place.table.get("root") or place.table.get("address") or place.table["host"])
    daemons = set(parts.processes_of(root))
    served.push("app/longer", "1", [parts.layer("longer", 6_000_000)])
    with parts.slowed(served.host, 300_000) as slow:
        running = place.spawn("warm", f"{slow}/app/longer:1")
        assert running.stderr is not None
        running.stderr.readline()
        time.sleep(1.5)
        running.kill()
        running.communicate()
        assert parts.wait_until(lambda: set(parts.processes_of(root)) <= daemons, 8)
        assert place.names() == set()


def test_interrupted_it_says_aborted_and_the_next_pass_goes_on(
    anywhere: Place, served: parts.Registry
) -> None:
    place = anywhere
    root = str(place.table.get("root") or place.table.get("address") or place.table["host"])
    daemons = set(parts.processes_of(root))
    served.push("app/slow", "1", [parts.layer("slow", 4_000_000)])
    path = place.base / "slow.json"
    with parts.slowed(served.host, 1_500_000) as slow:
        name = f"{slow}/app/slow:1"
        path.write_text(json.dumps(cache("slow", name)))
        running = place.spawn("cache", "apply", "-f", str(path))
        assert running.stderr is not None
        running.stderr.readline()
        time.sleep(1)
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
        assert b"traceback" not in err.lower()
        assert running.returncode == 130
        # It did not wait for the end of the pull.
        assert name not in place.names() and time.monotonic() - began < 10
        assert place.object("slow")["status"]["status"] == "Aborted"
        assert set(parts.processes_of(root)) <= daemons
        place.run("cache", "watch", "--once")
    assert place.names() == {name}
    assert place.object("slow")["status"]["reason"] == "ImageCacheCreate"


def test_two_reconcilers_at_once(place: Place, served: parts.Registry) -> None:
    names = [f"{served.host}/app/{name}:1" for name in "abcd"]
    path = place.base / "two.json"
    path.write_text(json.dumps(cache("two", *names)))
    running = [place.spawn("cache", "apply", "-f", str(path)) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    # One pulled, the other waited and found everything there.
    pulled = sum(err.count(b": pulled") for _, err in results)
    assert pulled == len(names)
    assert place.names() == set(names)


def test_a_watcher_acts_on_what_is_applied_and_stops_when_told(
    place: Place, served: parts.Registry
) -> None:
    name = f"{served.host}/app/a:1"
    watcher = place.spawn("cache", "watch", "--interval=60s")
    path = place.base / "watched.json"
    path.write_text(json.dumps(cache("watched", name)))
    try:
        place.run("cache", "apply", "-f", str(path), "--record-only")
        deadline = time.monotonic() + 20
        while place.names() != {name} and time.monotonic() < deadline:
            time.sleep(0.1)
        assert place.names() == {name}
    finally:
        watcher.terminate()
        _, err = watcher.communicate(timeout=20)
    assert watcher.returncode == 0, err


BAD = {
    "kontain.app/refresh-schedule: 'now and then'": {
        **cache("x", "a"),
        "metadata": {"name": "x", "annotations": {"kontain.app/refresh-schedule": "now and then"}},
    },
    "spec.cacheSpec[0].images[1]": cache("x", "good:1", "Bad:1"),
    "spec.cacheSpec[0].images[0]": cache("x", "a b"),
    "is the same image as images[0]": cache("x", "nginx", "docker.io/library/nginx:latest"),
    "spec.cacheSpec[0].images: must be a list that is not empty": cache("x"),
    "kind: 'Deployment' is not one of": {"kind": "Deployment"},
    "apiVersion: 'kubefledged.io/v9'": {**cache("x", "a"), "apiVersion": "kubefledged.io/v9"},
    "metadata.name": {**cache("x", "a"), "metadata": {"name": "../../etc"}},
    "there is no Secret": cache("x", "a", imagePullSecrets=[{"name": "none"}]),
    "nodeSelector.zone: must be a string": {
        **cache("x"),
        "spec": {"cacheSpec": [{"images": ["a"], "nodeSelector": {"zone": 1}}]},
    },
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_stores_nothing(place: Place, words: str) -> None:
    place.apply(cache("good", "127.0.0.1:1/a:1"), BAD[words], status=1)
    assert words in place.errors
    assert place.errors.count("\n") == 1
    assert "document 2" in place.errors
    assert json.loads(place.run("cache", "get", "--format=json"))["items"] == []


BAD_LINES = {
    "image reference 'Bad:1': a repository path is lower-case": ["warm", "Bad:1"],
    "'http://x/y': it begins with a scheme": ["warm", "http://x/y"],
    "/none: No such file or directory": ["warm", "--file=/none"],
    "latin1: is not UTF-8 at byte 3": ["warm", "--file=latin1"],
    "list:2: image reference 'B:2'": ["warm", "--file=list"],
    "--parallel: must be 1 or more": ["warm", "a:1", "--parallel=0"],
    "--timeout: 'x' is no duration": ["warm", "a:1", "--timeout=x"],
    "not on this node (krun images warm --pin docker.io/library/none:1": ["pin", "none:1"],
    "labels of this node: /none: No such file": ["ls", "--labels=/none"],
    "registry credentials: /none: No such file": ["status", "a:1", "--authfile=/none"],
    "--quota: 'x' is no size": ["gc", "--quota=x"],
    "no ImageCache or ImageWarm none (see krun images cache get)": ["cache", "purge", "none"],
    "no object named (give names, or --all)": ["cache", "refresh"],
    "no *.yaml, *.yml or *.json in it": ["cache", "apply", "--filename=."],
    "install the krun-image-record hook": ["cache", "suggest"],
}


@pytest.mark.parametrize("words", BAD_LINES)
def test_a_bad_line_is_one_line(
    place: Place, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1").write_bytes(b"a:1\xff\n")
    Path("list").write_text("a:1\nB:2\n")
    assert main(place.argv(*BAD_LINES[words])) in (1, 2)
    out, err = place.capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("krun: ")
    assert words in err


def test_a_store_that_is_not_running_stores_nothing(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(cache("x", "127.0.0.1:1/a:1")))
    place.name, place.table = "containerd", {"address": str(tmp_path / "none.sock")}
    place.settings()
    place.run("cache", "apply", "-f", str(path), status=1)
    assert place.errors.count("\n") == 1
    assert "containerd at" in place.errors and "start containerd" in place.errors
    assert json.loads(place.run("cache", "get", "--format=json"))["items"] == []


# Every field that the two projects' manifests have, in the forms that their users write.
IMAGE_CACHES = """\
# one node's web server, and what the inner nodes need
apiVersion: kubefledged.io/v1alpha2
kind: ImageCache
metadata:
  name: shop
  namespace: prefetch
  labels: {team: shop, stage: test}
  annotations:
    example.org/owner: "shop@example.org"
spec:
  cacheSpec:
    - images: [one.example.org/web/front:4.2]
    - images:
        - "two.example.org/inner/queue:v3"
        - two.example.org/inner/store:1.0-7
      nodeSelector: {ring: inner}
  imagePullSecrets: [{name: shop-key}]
---
apiVersion: kubefledged.io/v1alpha3
kind: ImageCache
metadata:
  name: models
  namespace: prefetch
spec:
  cacheSpec:
    - images:
        - name: one.example.org/web/model:1
          forceFullCache: true
      nodeSelector: ring=inner
---
---
"""
IMAGE_WARM = """\
{apiVersion: caching.knative.dev/v1alpha1, kind: ImageWarm, metadata: {name: greeter},
 spec: {image: three.example.org/demo/greeter, nodeName: first-node,
        imagePullSecrets: [{name: greeter-key}]}}
"""


def test_manifests_as_the_projects_users_write_them(
    place: Place, served: parts.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registries = tmp_path / "registries.conf"
    registries.write_text(
        "".join(
            f'[[registry]]\nprefix = "{host}.example.org"\nlocation = "{served.host}"\n'
            "insecure = true\n"
            for host in ("one", "two", "three")
        )
    )
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(registries))
    for name, tag in (
        ("web/front", "4.2"),
        ("web/model", "1"),
        ("inner/queue", "v3"),
        ("inner/store", "1.0-7"),
        ("demo/greeter", "latest"),
    ):
        served.push(name, tag, [BASE, parts.layer(name.replace("/", "-"))])
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "caches.yaml").write_text(IMAGE_CACHES)
    (manifests / "warm.yml").write_text(IMAGE_WARM)
    secrets = tmp_path / "secrets"
    (secrets / "default").mkdir(parents=True)
    empty = {"data": {".dockerconfigjson": base64.b64encode(b'{"auths":{}}').decode()}}
    for name in ("shop-key", "default/greeter-key"):
        (secrets / f"{name}.json").write_text(json.dumps(empty))
    place.settings(node="first-node", secrets_directory=str(secrets))
    place.run("cache", "apply", "-f", str(manifests))
    assert "ring=inner does not match this node" in place.errors
    assert place.names() == {
        "one.example.org/web/front:4.2",
        "three.example.org/demo/greeter:latest",
    }
    assert place.object("models")["status"]["status"] == "NoImagesPulledOrDeleted"
    labels = tmp_path / "labels"
    labels.write_text("ring=inner\n")
    place.run("cache", "refresh", "--all", f"--labels={labels}")
    assert place.names() == {
        "one.example.org/web/front:4.2",
        "one.example.org/web/model:1",
        "three.example.org/demo/greeter:latest",
        "two.example.org/inner/queue:v3",
        "two.example.org/inner/store:1.0-7",
    }
    warm = place.object("iw/default/greeter")["status"]
    assert warm["conditions"][0]["status"] == "True"
    assert place.object("shop")["metadata"]["labels"] == {"team": "shop", "stage": "test"}


def test_a_selector_that_matches_nothing(place: Place) -> None:
    document = cache("none")
    document["spec"]["cacheSpec"] = [{"images": ["a:1"], "nodeSelector": "zone=north-2"}]
    place.apply(document)
    assert "zone=north-2 does not match this node" in place.errors
    assert place.object("none")["status"]["status"] == "NoImagesPulledOrDeleted"
    assert place.names() == set()


def test_two_hundred_images(
    served: parts.Registry, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(200):
        # Each its own image; a layer of its own each would take dockerd a minute.
        served.push(f"many/i{number}", "1", [BASE], author=str(number))
    names = [f"{served.host}/many/i{number}:1" for number in range(200)]
    with parts.dockerd() as table:
        place = Place("docker", table, tmp_path, capfd)
        place.apply(cache("many", *names))
        assert place.names() == set(names)
        # A refresh with nothing to do pulls nothing.
        place.run("cache", "refresh", "many")
        assert place.errors == ""
        assert len(place.object("many")["status"]["images"]) == 200


def test_podman_s_indexes_say_what_podman_says(place: Place, served: parts.Registry) -> None:
    place.run("warm", *(f"{served.host}/app/{name}" for name in ("a:1", "a:1.2", "b:1")))
    argv = place.store._argv  # type: ignore[attr-defined]
    listed = json.loads(
        subprocess.run([*argv, "images", "--format=json"], check=True, capture_output=True).stdout
    )
    theirs = {
        "sha256:" + item["Id"]: (set(item["Names"]), set(item["RepoDigests"])) for item in listed
    }
    images = place.store.images()
    assert {image.id: (set(image.names), set(image.digests)) for image in images} == theirs
    for image in images:
        [detail] = json.loads(
            subprocess.run(
                [*argv, "image", "inspect", image.id], check=True, capture_output=True
            ).stdout
        )
        assert [layer.diff_id for layer in image.layers] == detail["RootFS"]["Layers"]
