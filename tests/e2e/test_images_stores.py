"""podman, dockerd and containerd behind one interface, against a real registry."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import images_parts as parts
import needs
import pytest

from krun.images import settings as images_settings
from krun.images.act import Worker
from krun.images.credentials import Credential
from krun.images.decide import Kept, Removal
from krun.images.progress import Silent
from krun.images.references import parse
from krun.images.registry import Registry, RegistryFailed
from krun.images.settings import Settings
from krun.images.stores.choose import open_store
from krun.images.stores.model import (
    Image,
    Progress,
    PullFailed,
    PullRequest,
    Store,
    StoreUnavailable,
    covers,
)

pytestmark = needs.mark(*parts.STORES, "htpasswd", "openssl", root=parts.ROOT)

BASE = parts.layer("base", 300_000)
ONE = parts.layer("one", 200_000)
TWO = parts.layer("two", 100_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[parts.Registry]:
    with parts.registry(tmp_path_factory.mktemp("registry") / "r") as registry:
        registry.push("app/a", "1", [BASE, ONE])
        registry.push("app/a", "1.2", [BASE, TWO])
        registry.push("app/b", "1", [BASE, TWO])
        yield registry


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[parts.Registry]:
    base = tmp_path_factory.mktemp("private") / "r"
    with parts.registry(base, users={"ann": "s3cret"}, tls=True) as registry:
        registry.push("app/p", "1", [BASE])
        yield registry


@pytest.fixture(scope="module", params=["podman", "docker", "containerd"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "podman":
        with parts.podman() as table:
            yield opened("podman", table)
        return
    daemon = parts.dockerd if request.param == "docker" else parts.containerd
    with daemon() as table:
        yield opened(request.param, table)


@pytest.fixture
def podman() -> Iterator[Store]:
    with parts.podman() as table:
        store = opened("podman", table)
        yield store
        store.close()


def opened(name: str, table: dict[str, object]) -> Store:
    return open_store(images_settings.parse({"store": name, name: table}, "test"))


def pull(store: Store, name: str, seen: list[Progress] | None = None, **changes: object) -> None:
    request = PullRequest(parse(name), None, 60.0, "http", False, "", 0)
    store.pull(request._replace(**changes), (seen if seen is not None else []).append)


def found(store: Store, name: str) -> Image | None:
    return next((image for image in store.images() if covers(image, parse(name))), None)


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "store" not in request.fixturenames:
        return
    store: Store = request.getfixturevalue("store")
    store.close()
    for image in store.images():
        if image.pinned:
            store.unpin(image)
        for name in image.names:
            store.remove(name)
    assert [image for image in store.images() if image.names] == []


def test_pull_list_remove(store: Store, served: parts.Registry) -> None:
    name = f"{served.host}/app/a:1"
    seen: list[Progress] = []
    pull(store, name, seen)
    image = found(store, name)
    assert image is not None
    manifest = Registry([], []).resolve(parse(name), None, diff_ids=True)
    assert image.id == manifest.config
    assert image.digests == (f"{served.host}/app/a@{manifest.digest}",)
    assert image.size > 300_000
    assert seen[0].stage == "resolving"
    # The tag 1.2 begins with the tag 1 and is another image, not there.
    assert found(store, f"{served.host}/app/a:1.2") is None
    store.remove(name)
    assert found(store, name) is None
    store.remove(name)


def test_pull_by_digest(store: Store, served: parts.Registry) -> None:
    digest = Registry([], []).resolve(parse(f"{served.host}/app/b:1"), None).digest
    by_digest = f"{served.host}/app/b@{digest}"
    pull(store, by_digest)
    image = found(store, by_digest)
    assert image is not None
    pull(store, f"{served.host}/app/b:1@{digest}")
    assert found(store, f"{served.host}/app/b:1") is not None
    store.remove(f"{served.host}/app/b:1")
    store.remove(by_digest)
    assert found(store, by_digest) is None


def test_missing_layers_follow_the_store_s_reuse(store: Store, served: parts.Registry) -> None:
    manifest = Registry([], []).resolve(parse(f"{served.host}/app/b:1"), None, diff_ids=True)
    assert [layer.size for layer in store.missing(manifest)] == [len(BASE), len(TWO)]
    pull(store, f"{served.host}/app/a:1")
    # All three reuse the shared lowest layer.
    assert [layer.size for layer in store.missing(manifest)] == [len(TWO)]
    pull(store, f"{served.host}/app/b:1")
    assert store.missing(manifest) == []


def test_layers_at_once_and_a_tag_with_a_digest(store: Store, served: parts.Registry) -> None:
    digest = Registry([], []).resolve(parse(f"{served.host}/app/a:1"), None).digest
    name = f"{served.host}/app/a:1@{digest}"
    pull(store, name, layers_at_once=1)
    image = found(store, name)
    assert image is not None and image.names == (f"{served.host}/app/a:1",)
    assert f"{served.host}/app/a@{digest}" in image.digests


def test_a_pinned_image_survives_the_store_s_prune(store: Store, served: parts.Registry) -> None:
    name = f"{served.host}/app/a:1"
    pull(store, name)
    image = found(store, name)
    assert image is not None and image.pinned == ""
    store.pin(image, "user")
    pinned = found(store, name)
    assert pinned is not None and pinned.pinned == "user"
    assert store.in_use() == {}
    prune(store)
    assert found(store, name) is not None
    store.unpin(pinned)
    assert found(store, name).pinned == ""  # type: ignore[union-attr]
    if store.name != "containerd":
        prune(store)
        assert found(store, name) is None


def prune(store: Store) -> None:
    """Collect the store's garbage as its own client does."""
    if store.name == "podman":
        subprocess.run([*store._argv, "image", "prune", "-af"], check=True)  # type: ignore[attr-defined]
    elif store.name == "docker":
        store._client().prune_images({"dangling": False})  # type: ignore[attr-defined]


def test_containers_use_images(store: Store, served: parts.Registry) -> None:
    name = f"{served.host}/app/a:1"
    pull(store, name)
    image = found(store, name)
    assert image is not None
    if store.name == "podman":
        argv = [*store._argv, "create", "--name=user", "--network=none", name]  # type: ignore[attr-defined]
        remove = [*store._argv, "rm", "user"]  # type: ignore[attr-defined]
    elif store.name == "docker":
        docker = ["docker", "-H", store._host]  # type: ignore[attr-defined]
        argv = [*docker, "create", "--name=user", "--network=none", name]
        remove = [*docker, "rm", "user"]
    else:
        argv = store._ctr("containers", "create", name, "user")  # type: ignore[attr-defined]
        remove = store._ctr("containers", "rm", "user")  # type: ignore[attr-defined]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    try:
        assert store.in_use() == {image.id: ["user"]}
        # A container that came after the decision to remove its image keeps it all the same.
        worker = Worker(Settings(), store, Silent(), lambda keys: [])
        assert worker.remove_all([Removal(name, ("k",))]) == ({}, [Kept(name, ("k",), ("user",))])
    finally:
        subprocess.run(remove, check=True, stdout=subprocess.DEVNULL)
    assert store.in_use() == {}


def test_an_unknown_image_is_a_permanent_failure(store: Store, served: parts.Registry) -> None:
    with pytest.raises(PullFailed) as caught:
        pull(store, f"{served.host}/app/none:1")
    assert caught.value.permanent
    assert caught.value.reason == "ErrImagePull"
    assert "\n" not in str(caught.value)


def test_a_silent_registry_is_a_temporary_failure(store: Store) -> None:
    with pytest.raises(PullFailed) as caught:
        pull(store, f"127.0.0.1:{parts.free_port()}/app/a:1")
    assert not caught.value.permanent
    assert caught.value.reason == "RegistryUnavailable"


def test_tls_and_credentials(store: Store, private: parts.Registry, tmp_path: Path) -> None:
    if store.name == "docker":
        certs = Path("/etc/docker/certs.d") / private.host
    else:
        certs = tmp_path / private.host
    certs.mkdir(parents=True)
    assert private.ca is not None
    (certs / "ca.crt").write_bytes(private.ca.read_bytes())
    name = f"{private.host}/app/p:1"
    secure = {"scheme": "https", "certificates": str(certs)}
    try:
        for wrong in (None, Credential("ann", "wrong")):
            with pytest.raises(PullFailed) as caught:
                pull(store, name, credential=wrong, **secure)
            # dockerd tries plain HTTP on loopback after any error and reports that one.
            assert store.name == "docker" or "credentials" in caught.value.hint
            assert store.name == "docker" or caught.value.permanent
            assert "wrong" not in str(caught.value)
        pull(store, name, credential=Credential("ann", "s3cret"), **secure)
        assert found(store, name) is not None
    finally:
        (certs / "ca.crt").unlink()
        certs.rmdir()


@pytest.fixture
def trusted(private: parts.Registry) -> Iterator[str]:
    """A directory of certificates that podman reads by itself."""
    certs = Path("/etc/containers/certs.d") / private.host
    certs.mkdir(parents=True)
    assert private.ca is not None
    (certs / "ca.crt").write_bytes(private.ca.read_bytes())
    yield str(certs)
    (certs / "ca.crt").unlink()
    certs.rmdir()


def test_podman_pulls_by_its_api_with_credentials_and_bytes(
    podman: Store, private: parts.Registry, trusted: str
) -> None:
    private.push("app/large", "1", [BASE, parts.layer("large", 6_000_000)])
    name = f"{private.host}/app/large:1"
    secure = {"scheme": "https", "certificates": trusted}
    for wrong in (None, Credential("ann", "wrong")):
        with pytest.raises(PullFailed) as caught:
            pull(podman, name, credential=wrong, **secure)
        assert caught.value.permanent and "credentials" in caught.value.hint
        assert "wrong" not in str(caught.value)
    with parts.slowed(private.host, 2_000_000) as slow:
        slow_certs = Path(trusted).parent / slow
        slow_certs.symlink_to(trusted)
        try:
            seen: list[Progress] = []
            name = f"{slow}/app/large:1"
            secure["certificates"] = str(slow_certs)
            pull(podman, name, seen, credential=Credential("ann", "s3cret"), **secure)
        finally:
            slow_certs.unlink()
    assert found(podman, name) is not None
    done = [progress.done for progress in seen if progress.total > 6_000_000]
    assert done == sorted(done) and len(set(done)) > 2
    assert 0 < done[0] < done[-1] == seen[-1].total


def test_podman_s_layers_are_counted_where_it_tells_no_bytes(
    podman: Store, served: parts.Registry
) -> None:
    layers = [BASE, parts.layer("counted", 1_000_000), parts.layer("slow", 3_000_000)]
    served.push("app/counted", "1", layers)
    seen: list[Progress] = []
    with parts.slowed(served.host, 1_000_000) as slow:
        name = f"{slow}/app/counted:1"
        missing = podman.missing(Registry([], []).resolve(parse(name), None))
        assert [layer.size for layer in missing] == [len(data) for data in layers]
        pull(podman, name, seen, missing=tuple(missing))
    done = [progress.done for progress in seen if progress.total]
    assert {progress.total for progress in seen} == {0, sum(map(len, layers))}
    assert done == sorted(done) and len(set(done)) > 2
    assert done[-1] == seen[-1].total


@pytest.fixture(autouse=True)
def temporary() -> Iterator[None]:
    """Let tempfile look at TMPDIR anew after a test that changes it."""
    yield
    tempfile.tempdir = None


def stop_service(store: Store) -> None:
    """Let podman notice nothing any more."""
    [busy] = store._busy  # type: ignore[attr-defined]
    os.kill(busy._process.pid, signal.SIGSTOP)


@pytest.mark.parametrize("how", ["late", "cancelled", "stuck", "by program"])
def test_a_podman_pull_ended_in_the_middle_leaves_nothing(
    how: str, served: parts.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {}
    # Where podman keeps what it fetches; so long that no socket's path fits.
    kept = tmp_path / ("long" * 20)
    kept.mkdir()
    with parts.podman() as table, parts.slowed(served.host, 1_000_000) as slow:
        monkeypatch.setenv("TMPDIR", str(kept))
        tempfile.tempdir = None
        store = opened("podman", table)
        name = f"{slow}/app/long:1"
        served.push("app/long", "1", [parts.layer("long", 8_000_000)])
        if how == "by program":
            (tmp_path / "ca.crt").write_text("")
            more = {"certificates": str(tmp_path)}
        if how == "stuck":
            threading.Timer(1.0, stop_service, [store]).start()
        if how != "late":
            threading.Timer(1.5, store.cancel).start()
        with pytest.raises(PullFailed) as caught:
            pull(store, name, timeout=1.5 if how == "late" else 60.0, **more)
        if how == "late":
            assert "not done in 2 s" in str(caught.value) and not caught.value.permanent
            # Another pull goes on with a service of its own.
            pull(store, f"{served.host}/app/a:1")
        else:
            assert caught.value.reason == "ImagePullAborted"
        store.close()
        root = str(table["root"])
        assert parts.wait_until(lambda: not parts.processes_of(root)), parts.processes_of(root)
        assert [image.names for image in store.images()] == (
            [(f"{served.host}/app/a:1",)] if how == "late" else []
        )
    # A podman that must be killed cannot clean up.
    assert os.listdir(kept) == [] or how == "stuck"


def test_a_podman_service_that_dies_is_a_failure_of_its_pull_alone(
    podman: Store, served: parts.Registry
) -> None:
    name = f"{served.host}/app/a:1"
    pull(podman, name)
    podman.remove(name)
    # One that is gone between two pulls is replaced without a word.
    [service] = podman._idle  # type: ignore[attr-defined]
    os.killpg(service._process.pid, signal.SIGKILL)
    pull(podman, name)
    assert found(podman, name) is not None
    with parts.slowed(served.host, 5_000) as slow:
        seen: list[Progress] = []

        def kill() -> None:
            while not podman._busy:  # type: ignore[attr-defined]
                time.sleep(0.01)
            [busy] = podman._busy  # type: ignore[attr-defined]
            time.sleep(0.3)
            os.killpg(busy._process.pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(PullFailed) as caught:
            pull(podman, f"{slow}/app/b:1", seen)
        assert "podman system service ended" in str(caught.value)
        assert not caught.value.permanent
    pull(podman, f"{served.host}/app/b:1")


def test_a_podman_that_cannot_serve_says_why(tmp_path: Path) -> None:
    program = tmp_path / "podman"
    program.write_text("#!/bin/sh\necho 'Error: no space for the moon' >&2\nexit 125\n")
    program.chmod(0o755)
    with pytest.raises(PullFailed) as caught:
        pull(opened("podman", {"program": str(program), "root": str(tmp_path)}), "a:1")
    assert str(caught.value).endswith("podman system service ended: no space for the moon")


def test_a_store_that_is_not_running_says_so(tmp_path: Path) -> None:
    gone = tmp_path / "no.sock"
    for name, table in (
        ("docker", {"host": f"unix://{gone}"}),
        ("containerd", {"address": str(gone)}),
        ("podman", {"program": "no-such-podman"}),
    ):
        with pytest.raises(StoreUnavailable) as caught:
            opened(name, table).images()
        assert caught.value.hint
        assert "\n" not in str(caught.value)


def test_the_registry_client_checks_names_and_credentials(
    served: parts.Registry, private: parts.Registry, tmp_path: Path
) -> None:
    assert private.ca is not None
    (tmp_path / private.host).mkdir()
    (tmp_path / private.host / "ca.crt").write_bytes(private.ca.read_bytes())
    client = Registry([], [str(tmp_path)])
    assert client.access(served.host).scheme == "http"
    assert client.access(private.host).scheme == "https"
    reference = parse(f"{private.host}/app/p:1")
    with pytest.raises(RegistryFailed) as caught:
        client.resolve(reference, Credential("ann", "wrong"))
    assert caught.value.status == 401
    resolved = client.resolve(reference, Credential("ann", "s3cret"))
    assert [layer.size for layer in resolved.layers] == [len(BASE)]
    with pytest.raises(RegistryFailed) as caught:
        client.resolve(parse(f"{served.host}/app/none:1"), None)
    assert caught.value.status == 404
