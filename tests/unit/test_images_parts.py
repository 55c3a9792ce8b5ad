"""The small pure parts: kinds, credentials, settings, quantities, schedules, collection, ledger."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import needs
import pytest
from documents import with_names
from hypothesis import given
from hypothesis import strategies as st
from images_parts import small_tmpfs
from jsonschema import Draft202012Validator

from krun.errors import BadSpec, KrunError
from krun.images import (
    collection,
    credentials,
    documents,
    index,
    kinds,
    ledger,
    node,
    placement,
    quantities,
    reconcile,
    registry,
    schedule,
    settings,
    suggestion,
)
from krun.images.files import write_atomically
from krun.images.objects import Objects
from krun.images.references import parse
from krun.images.stores.model import Image, Layer, pull_failed

TOP = Path(__file__).parents[2]
EXAMPLES = TOP / "spec-schema"
SCHEMAS = {"ImageCache": "image-cache", "ImageWarm": "image-warm"}


def examples(folder: str, *names: str) -> list[Path]:
    return sorted(p for name in names for p in (EXAMPLES / folder).glob(f"{name}.*json"))


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((EXAMPLES / f"{name}.schema.json").read_text()))


def name_of(path: Path) -> str:
    return path.name.split(".")[0]


@pytest.mark.parametrize(
    "path", examples("good", "image-cache", "image-warm"), ids=lambda path: path.name
)
def test_good_objects(path: Path) -> None:
    document = json.loads(path.read_text())
    validator(name_of(path)).validate(document)
    assert kinds.read(document, "f").entries


@pytest.mark.parametrize(
    "path", examples("bad", "image-cache", "image-warm"), ids=lambda path: path.name
)
def test_bad_objects(path: Path) -> None:
    document = json.loads(path.read_text())
    assert list(validator(name_of(path)).iter_errors(document)), "the schema takes it"
    with pytest.raises(BadSpec) as caught:
        kinds.read(document, "f")
    assert str(caught.value).startswith("f: ")
    assert "\n" not in str(caught.value)


def test_there_are_examples_of_each_kind() -> None:
    for name in ("image-cache", "image-warm", "image-ledger", "images-policy"):
        assert examples("good", name), name
        assert examples("bad", name), name


@pytest.mark.parametrize("name", ["image-ledger", "images-policy"])
def test_ledger_and_policy_examples(name: str) -> None:
    for path in examples("good", name):
        validator(name).validate(json.loads(path.read_text()))
    for path in examples("bad", name):
        assert list(validator(name).iter_errors(json.loads(path.read_text()))), path.name


def test_selector_forms() -> None:
    document = {
        "apiVersion": "kubefledged.io/v1alpha3",
        "kind": "ImageCache",
        "metadata": {"name": "x"},
        "spec": {
            "cacheSpec": [
                {"images": [{"name": "a:1", "forceFullCache": True}], "nodeSelector": "z=1,t=2"},
                {"images": ["b:1"], "nodeSelector": {"z": "9"}},
            ]
        },
    }
    cache = kinds.read(document, "f")
    assert cache.key == "ImageCache/default/x"
    assert kinds.wanted_here(cache, "n", {"z": "1", "t": "2"}) == (parse("a:1"),)
    assert kinds.wanted_here(cache, "n", {"z": "9"}) == (parse("b:1"),)
    assert kinds.wanted_here(cache, "n", {}) == ()


@given(with_names("kind", "apiVersion", "metadata", "spec", "name", "cacheSpec", "images"))
def test_any_document_is_read_or_refused(document: Any) -> None:
    base = {"apiVersion": "kubefledged.io/v1alpha2", "kind": "ImageCache"}
    for tried in (document, {**base, "metadata": {"name": "x"}, "spec": document}):
        try:
            kinds.read(tried, "f")
        except BadSpec as error:
            assert "\n" not in str(error)


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: List\nitems:\n- {kind: A}\n- {kind: B}\n---\nkind: C\n")
    [(path, found)] = documents.load([str(tmp_path)])
    assert [item[1]["kind"] for item in kinds.flatten(found, path)] == ["A", "B", "C"]
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(KrunError, match=r"bad.yaml: is not YAML at line"):
        documents.load([str(tmp_path / "bad.yaml")])
    (tmp_path / "empty.yaml").write_text("---\n")
    with pytest.raises(KrunError, match="there is no object"):
        documents.load([str(tmp_path / "empty.yaml")])


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_the_most_specific_credential_wins() -> None:
    file = credentials.parse(
        {
            "auths": {
                "gcr.io": auth("host", "1"),
                "gcr.io/team": auth("team", "2"),
                "gcr.io/team/app": auth("app", "3"),
                "https://index.docker.io/v1/": auth("hub", "4"),
            }
        },
        "f",
    )
    for name, user in {
        "gcr.io/other/x": "host",
        "gcr.io/team/x": "team",
        "gcr.io/team/app:1": "app",
        "gcr.io/teams/x": "host",
        "nginx": "hub",
    }.items():
        found = credentials.find(parse(name), [file])
        assert found is not None and found.username == user, name
    assert credentials.find(parse("quay.io/x"), [file]) is None
    assert "4" not in repr(credentials.find(parse("nginx"), [file]))


def test_credential_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        "#!/bin/sh\nread server\n"
        'case $server in known*) echo "{\\"Username\\":\\"u\\",\\"Secret\\":\\"p-$server\\"}";;\n'
        "*) echo credentials not found in native keychain; exit 1;; esac\n"
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = credentials.parse(
        {"credHelpers": {"known.io": "test", "other.io": "test", "gone.io": "none"}}, "f"
    )
    found = credentials.find(parse("known.io/x"), [file])
    assert found == credentials.Credential("u", "p-known.io")
    assert credentials.find(parse("other.io/x"), [file]) is None
    with pytest.raises(credentials.BadCredentials, match="docker-credential-none: not found"):
        credentials.find(parse("gone.io/x"), [file])


@pytest.mark.parametrize(
    "document",
    [[], {"auths": []}, {"auths": {"a": 1}}, {"auths": {"a": {"auth": "%"}}}, {"credHelpers": 1}],
)
def test_bad_auth_files_name_the_file(document: Any) -> None:
    with pytest.raises(credentials.BadCredentials, match=r"^auth\.json: "):
        credentials.parse(document, "auth.json")


def test_settings(tmp_path: Path) -> None:
    table = {"store": "docker", "timeout": "2m", "disk_reserve": "2GiB", "docker": {"host": "x"}}
    read = settings.parse(table, "f")
    assert (read.timeout, read.disk_reserve, read.docker.host) == (120.0, 2 << 30, "x")
    for bad, words in {
        "stor": "f: stor: is no setting",
        "store": "f: store: 1: ",
        "parallel_pulls": "f: parallel_pulls: ",
        "refresh": "f: refresh: ",
        "timeout": "f: timeout: ",
        "podman": "f: podman: must be a table",
    }.items():
        with pytest.raises(KrunError) as caught:
            settings.parse({bad: "1" if bad != "parallel_pulls" else 0}, "f")
        assert str(caught.value).startswith(words.split(": 1")[0])
    path = tmp_path / "images.toml"
    path.write_text("store = \n")
    with pytest.raises(KrunError, match="is not TOML"):
        settings.load(str(path))
    with pytest.raises(KrunError, match="there is no such file"):
        settings.load(str(tmp_path / "none"))


def test_quantities() -> None:
    assert quantities.parse_size("20GiB", "q") == 20 << 30
    assert quantities.parse_size("1.5 kB", "q") == 1500
    assert quantities.parse_duration("1h30m", "d") == 5400
    assert quantities.parse_duration("250ms", "d") == 0.25
    assert quantities.parse_duration("0", "d") == 0
    for bad in ("", "x", "5 parsecs", "-1s", "1.2.3s"):
        with pytest.raises(KrunError, match=r"^d: "):
            quantities.parse_duration(bad, "d")
    for bad in ("", "GiB", "1XB", "1e9", "inf"):
        with pytest.raises(KrunError, match=r"^q: "):
            quantities.parse_size(bad, "q")


def test_schedules() -> None:
    assert schedule.next_after(schedule.parse("off", "s"), 100.0) is None
    assert schedule.next_after(schedule.parse("0s", "s"), 100.0) is None
    assert schedule.next_after(schedule.parse("15m", "s"), 100.0) == 1000.0
    last = datetime(2026, 3, 1, 12, 1).timestamp()
    following = schedule.next_after(schedule.parse("*/5 * * * *", "s"), last)
    assert following == datetime(2026, 3, 1, 12, 5).timestamp()
    for bad in ("* * *", "61 * * * *", "soon"):
        with pytest.raises(KrunError, match=r"^s: "):
            schedule.parse(bad, "s")


def image(name: str, created: float, *layers: tuple[str, int], pinned: str = "") -> Image:
    found = tuple(Layer("", diff_id, size) for diff_id, size in layers)
    size = sum(layer.size for layer in found)
    return Image(f"sha256:{name}", (f"h/{name}:1",), (), found, size, created, pinned)


def test_collection_drops_the_least_recently_used_and_counts_shared_layers_once() -> None:
    images = [
        image("old", 1, ("base", 50), ("o", 10)),
        image("older-but-used", 0, ("base", 50), ("u", 20)),
        image("young", 9, ("base", 50), ("y", 5)),
        image("pinned", 0, ("p", 40), pinned="user"),
    ]
    free: dict[str, Any] = {"used": {}, "wanted": set(), "last_used": {"h/older-but-used:1": 5.0}}
    plan = collection.plan(images, 120, **free)
    assert plan.before == 125
    assert [one.id for one in plan.drops] == ["sha256:old"]
    assert plan.after == 115
    plan = collection.plan(images, 0, **free)
    assert [one.id for one in plan.drops] == ["sha256:old", "sha256:older-but-used", "sha256:young"]
    assert plan.after == 40
    held = {"used": {"sha256:old": ["c"]}, "wanted": {"h/young:1"}, "last_used": {}}
    plan = collection.plan(images, 0, **held)  # type: ignore[arg-type]
    assert [one.id for one in plan.drops] == ["sha256:older-but-used"]
    assert collection.plan(images, 1000, **free).drops == ()


def test_the_ledger_keeps_lines_apart_and_rotates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = str(tmp_path / "state")

    def start(number: int) -> None:
        for step in range(50):
            ledger.append(state, {"event": "start", "image": f"i{number}", "time": step})

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(ledger.read(state))) == 200
    assert ledger.last_used(state) == {f"i{number}": 49 for number in range(4)}
    with open(f"{state}/{ledger.NAME}", "a") as file:
        file.write('{"event": "sta')
    assert len(list(ledger.read(state))) == 200
    monkeypatch.setattr(ledger, "LIMIT", 100)
    ledger.append(state, {"event": "start", "image": "last", "time": 99})
    assert os.path.exists(f"{state}/{ledger.OLDER}")
    ledger.append(state, {"event": "start", "image": "after", "time": 100})
    assert ledger.last_used(state)["after"] == 100


def test_suggestions() -> None:
    entries = [
        {"event": "start", "time": 10, "image": "a:1", "digest": "sha256:" + "0" * 64},
        {"event": "start", "time": 20, "image": "docker.io/library/a:1", "namespace": "web"},
        {"event": "start", "time": 30, "image": "b:1", "cache": True},
        {"event": "stop", "time": 30, "image": "c:1"},
        {"event": "start", "time": 30, "image": "not an image"},
    ]

    def images(**more: Any) -> list[str]:
        found = suggestion.suggest(entries, name="n", namespace="s", **more)
        if found is None:
            return []
        kinds.read(found, "suggested")
        return list(found["spec"]["cacheSpec"][0]["images"])

    one, two = "docker.io/library/a:1", "docker.io/library/b:1"
    assert images() == [one, two]
    assert images(of_namespace="web") == [one]
    assert images(annotated=True) == [two]
    assert images(since=25.0) == [two]
    assert images(least=2) == [one]
    assert images(least=3) == []
    assert "docker.io/library/a@sha256:" + "0" * 64 in images(by_digest=True)


def test_the_index_is_found_by_the_whole_name(tmp_path: Path) -> None:
    known = [index.Known(f"h/foo:{tag}", f"id{tag}", "d", "") for tag in ("1.2", "1", "11")]
    (tmp_path / index.NAME).write_text(index.text_of(known))
    assert index.find(str(tmp_path), "h/foo:1") == known[1]
    assert index.find(str(tmp_path), "h/foo:1.2") == known[0]
    assert index.find(str(tmp_path), "h/foo") is None
    assert index.find(str(tmp_path), "foo:1") is None
    with pytest.raises(FileNotFoundError):
        index.find(str(tmp_path / "none"), "x")


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text("# rack\nzone=a\ntier=backend\n")
    assert node.from_file(str(path)) == {"zone": "a", "tier": "backend"}
    path.write_text("kind: Node\nmetadata:\n  labels:\n    zone: b\n")
    assert node.from_file(str(path)) == {"zone": "b"}
    path.write_text("zone: 1\n")
    with pytest.raises(KrunError, match="zone: must be a string"):
        node.from_file(str(path))


def test_objects_are_written_whole_and_merged(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    document: dict[str, Any] = {
        "apiVersion": "kubefledged.io/v1alpha2",
        "kind": "ImageCache",
        "metadata": {"name": "x", "namespace": "n"},
        "spec": {"cacheSpec": [{"images": ["a"]}]},
    }
    assert objects.apply([document], [], 0.0) == [("ImageCache/n/x", "created")]
    assert objects.apply([document], [], 0.0) == [("ImageCache/n/x", "unchanged")]
    changed = {**document, "spec": {"cacheSpec": [{"images": ["b"]}]}}
    assert objects.apply([changed], [], 0.0) == [("ImageCache/n/x", "configured")]
    stored = objects.load("ImageCache/n/x")
    assert stored is not None and stored["metadata"]["generation"] == 2
    assert objects.find(["x"], "") == objects.find(["ic/n/x"], "") == ["ImageCache/n/x"]
    for word, words in {"y": "no ImageCache", "pod/x": "is no kind"}.items():
        with pytest.raises(KrunError, match=words):
            objects.find([word], "")
    target = tmp_path / "f"
    write_atomically(str(target), b"1")
    write_atomically(str(target), b"2")
    assert target.read_bytes() == b"2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "objects", "objects.lock", "secrets"]


CACHE: dict[str, Any] = {
    "apiVersion": "kubefledged.io/v1alpha2",
    "kind": "ImageCache",
    "metadata": {"name": "x", "namespace": "n"},
    "spec": {"cacheSpec": [{"images": ["a"]}]},
}


@needs.mark(root="a file system that can be filled")
@pytest.mark.parametrize("room", range(4))
def test_what_cannot_be_written_whole_is_not_written_at_all(tmp_path: Path, room: int) -> None:
    """Four files are to be written, and the disk has room for fewer."""
    with small_tmpfs(tmp_path, 256 << 10) as disk:
        objects = Objects(str(disk))
        (disk / "secrets" / ".n_left.json.1.tmp").write_text("of a krun that was killed")
        named = [{**CACHE, "metadata": {"name": name, "namespace": "n"}} for name in "abc"]
        objects.apply([named[0]], [], 0.0)
        assert list((disk / "secrets").iterdir()) == []
        before = (disk / "objects" / "ImageCache_n_a.json").read_bytes()
        changed = {**named[0], "spec": {"cacheSpec": [{"images": ["b"]}]}}
        secret = {"kind": "Secret", "metadata": {"name": "s"}}
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes((free.f_bavail - room) * free.f_frsize))
        with pytest.raises(OSError, match="No space left"):
            objects.apply([changed, *named[1:]], [secret], 0.0)
        assert [path.read_bytes() for path in (disk / "objects").iterdir()] == [before]
        assert list((disk / "secrets").iterdir()) == []
        (disk / "filler").unlink()
        objects.apply([changed, *named[1:]], [secret], 0.0)
        assert len(list((disk / "objects").iterdir())) == 3
        assert len(list((disk / "secrets").iterdir())) == 1


def test_nothing_is_stored_beside_an_object_that_is_being_deleted(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.apply([CACHE], [], 0.0)
    objects.change("ImageCache/n/x", lambda item: item["metadata"].update(deletionTimestamp="t"))
    first = {**CACHE, "metadata": {"name": "a", "namespace": "n"}}
    with pytest.raises(KrunError, match="ImageCache/n/x: is being deleted"):
        objects.apply([first, CACHE], [], 0.0)
    assert objects.keys() == ["ImageCache/n/x"]


STORED = {
    **CACHE,
    "metadata": {
        **CACHE["metadata"], "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
        "annotations": {"kontain.app/refresh-schedule": "1h"},
    },
    "status": {
        "status": "Succeeded", "reason": "ImageCacheCreate", "message": "", "failures": {},
        "lastRefreshTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
        "images": [{"image": "docker.io/library/a:latest", "digest": ""}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "x"}],
    },
}  # fmt: skip


@given(data=st.data())
def test_any_damage_to_an_object_is_named_and_fails_alone(data: st.DataObject) -> None:
    """Replace or remove any one member: the object still reads well, or is told damaged."""
    document = json.loads(json.dumps(STORED))
    where: Any = document
    path: list[Any] = []
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        path.append(data.draw(st.sampled_from(keys)))
        inner = where[path[-1]]
        if not inner or not isinstance(inner, dict | list) or data.draw(st.booleans()):
            break
        where = inner
    junk = st.sampled_from(["", "?", None, 7, [], {}, [3], {"x": None}, True])
    if isinstance(where, dict) and data.draw(st.booleans()):
        del where[path[-1]]
    else:
        where[path[-1]] = data.draw(junk)
    with tempfile.TemporaryDirectory() as folder:
        objects = Objects(folder)
        objects.apply([{**CACHE, "metadata": {"name": "good", "namespace": "n"}}], [], 0.0)
        file = Path(folder) / "objects" / "ImageCache_n_x.json"
        file.write_text(json.dumps(document))
        stored = objects.read_all()
        assert "ImageCache/n/good" in stored.caches
        here = node.Node("node", {})
        for key, cache in stored.caches.items():
            wish = reconcile.wish_of(stored.documents[key], cache, here, refresh="1h", now=9e9)
            assert wish.key == key
        for damaged in stored.damaged:
            assert damaged.key == "ImageCache/n/x"
            assert damaged.message.startswith(str(file)) and "\n" not in damaged.message
            with pytest.raises(KrunError) as caught:
                objects.read(damaged.key)
            assert caught.value.hint
        # Applied again, it is whole again.
        objects.apply([CACHE], [], 0.0)
        assert objects.read_all().damaged == []


def test_store_errors_become_the_kubelet_s_words() -> None:
    for text, reason, permanent in (
        ("Error: x: no space left on device", "ErrImagePull", True),
        ("dial tcp 127.0.0.1:1: connect: connection refused", "RegistryUnavailable", False),
        ("reading manifest: unauthorized: authentication required", "ErrImagePull", True),
        ("manifest unknown", "ErrImagePull", True),
        ("something odd", "ErrImagePull", False),
    ):
        failed = pull_failed("i", text)
        assert (failed.reason, failed.permanent) == (reason, permanent), text


def test_hosts_toml_quotes_what_it_is_given(tmp_path: Path) -> None:
    import tomllib

    (tmp_path / "ca.crt").touch()
    access = registry.Access("https", True, str(tmp_path))
    read = tomllib.loads(registry.hosts_toml("h:1", access, 'Basic "x"\n'))
    host = read["host"]["https://h:1"]
    assert host["header"]["authorization"] == ['Basic "x"\n']
    assert host["ca"] == str(tmp_path / "ca.crt")
    assert host["skip_verify"] is True


# What oci-hooks(5) of version 1.0.0 allows; CRI-O and podman refuse a file with anything else.
_HOOK = {
    "type": "object",
    "additionalProperties": False,
    "required": ["version", "hook", "when", "stages"],
    "properties": {
        "version": {"const": "1.0.0"},
        "hook": {
            "type": "object",
            "additionalProperties": False,
            "required": ["path"],
            "properties": {
                "path": {"type": "string", "pattern": "^/"},
                "args": {"type": "array", "items": {"type": "string"}},
                "env": {"type": "array", "items": {"type": "string"}},
                "timeout": {"type": "integer", "minimum": 1},
            },
        },
        "when": {
            "type": "object",
            "additionalProperties": False,
            "minProperties": 1,
            "properties": {
                "always": {"type": "boolean"},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
                "commands": {"type": "array", "items": {"type": "string"}},
                "hasBindMounts": {"type": "boolean"},
            },
        },
        "stages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "enum": ["prestart", "createRuntime", "createContainer", "startContainer",
                         "poststart", "poststop"]
            },
        },
    },
}  # fmt: skip


def test_hooks_d_files_are_as_podman_and_crio_read_them(tmp_path: Path) -> None:
    options = ["--state=/s", "--mode=warn"]
    written = placement.install(str(tmp_path / "usr"), str(tmp_path / "hooks.d"), options)
    assert len(written) == 3
    for path in [*map(Path, written), *(TOP / "hooks" / "hooks.d").iterdir()]:
        document = json.loads(path.read_text())
        Draft202012Validator(_HOOK).validate(document)
        # The first argument is the program's name, as execve(2) wants it.
        assert document["hook"]["args"][0] == Path(document["hook"]["path"]).name
        for pattern, value in document["when"].get("annotations", {}).items():
            # POSIX extended regular expressions, as grep -E reads them.
            for expression, text in ((pattern, "kontain.app/images-prefetch"), (value, "a b")):
                matched = subprocess.run(["grep", "-qE", "--", expression], input=text, text=True)
                assert matched.returncode == 0
    for path in written:
        assert os.access(json.loads(Path(path).read_text())["hook"]["path"], os.X_OK)
        assert json.loads(Path(path).read_text())["hook"]["args"][1:] == options


@needs.mark("systemd-analyze")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in (TOP / "packaging" / "systemd").glob("krun-images*"):
        text = unit.read_text().replace("/usr/local/bin/krun", "/bin/true")
        lines = [line for line in text.splitlines() if not line.startswith("Documentation=")]
        (tmp_path / unit.name).write_text("\n".join(lines) + "\n")
    units = sorted(map(str, tmp_path.iterdir()))
    assert len(units) == 3
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("refresh", "schedule_line", "hours", "due"),
    [
        ("1h", "", 2, True),
        ("1h", "", 0.5, False),
        ("off", "", 1000, False),
        ("1h", "off", 1000, False),
        ("off", "0 * * * *", 2, True),
    ],
)
def test_when_a_refresh_is_due(refresh: str, schedule_line: str, hours: float, due: bool) -> None:
    document: dict[str, Any] = {
        "apiVersion": "caching.knative.dev/v1alpha1",
        "kind": "ImageWarm",
        "metadata": {
            "name": "x",
            "generation": 1,
            "annotations": {kinds.SCHEDULE_ANNOTATION: schedule_line},
        },
        "spec": {"image": "a:1", "nodeName": "n"},
        "status": {
            "status": "Succeeded",
            "observedGeneration": 1,
            "lastRefreshTime": "2026-03-01T10:10:00Z",
        },
    }
    now = datetime.fromisoformat("2026-03-01T10:10:00Z").timestamp() + hours * 3600
    cache = kinds.read(document, "f")
    wish = reconcile.wish_of(document, cache, node.Node("n", {}), refresh=refresh, now=now)
    assert (wish.due, wish.changed, wish.wanted) == (due, False, (parse("a:1"),))
    other = reconcile.wish_of(document, cache, node.Node("m", {}), refresh=refresh, now=now)
    assert other.wanted == ()


def test_a_missing_package_is_one_line() -> None:
    program = f"import sys; sys.path.insert(0, {str(TOP)!r}); from krun.__main__ import main\n"
    program += "sys.exit(main(['images', 'ls']))"
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("krun: krun images ls needs the Python package ")
    assert done.stderr.endswith("(pip install '.[images]' in krun's checkout, or of its wheel)\n")
    assert done.stderr.count("\n") == 1
