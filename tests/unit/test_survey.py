"""What survey finds in a hostile image, and who gets past the allow list: nobody."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from krun import extension, policy, survey
from krun.errors import BadSpec, CannotExecute, KrunError, PolicyDenied
from krun.grammar import Settings
from krun.translate import Facts, Note

STATIC = Path("/bin/busybox")
DYNAMIC = Path("/bin/ls")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    rootfs = tmp_path / "rootfs"
    (rootfs / "bin").mkdir(parents=True)
    (rootfs / "dev").mkdir()
    shutil.copy(STATIC, rootfs / "bin" / "busybox")
    (rootfs / "bin" / "sh").symlink_to("busybox")
    (rootfs / "bin" / "script").write_text("#! /bin/sh -e\nexit 0\n")
    (rootfs / "bin" / "script").chmod(0o755)
    return tmp_path


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "store"
    monkeypatch.setattr("krun.direct.store", lambda: str(path))
    return path


def spec(*args: str, **changes: Any) -> dict[str, Any]:
    return {
        "ociVersion": "1.2.0",
        "process": {"args": list(args), "env": ["PATH=/bin"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        **changes,
    }


def look(
    bundle: Path, document: dict[str, Any], rules: policy.Policy | None = None
) -> tuple[Facts, list[Note]]:
    rules = rules or policy.Policy()
    notes: list[Note] = []
    choice = extension.choose(document, rules, Settings())
    return survey.survey(document, str(bundle), choice, rules, notes), notes


def listed(path: Path, name: str = "/bin/busybox", **changes: Any) -> policy.Policy:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return policy.Policy(direct=(policy.Direct(name, "", "", digest)._replace(**changes),))


def test_finds_the_program_as_execvp_would(bundle: Path) -> None:
    for name in ("sh", "/bin/sh", "bin/sh", "./bin/../bin/sh"):
        payload = look(bundle, spec(name, "-c"))[0].payload
        assert payload is not None
        assert (payload.argv, payload.real) == (["/bin/sh", "-c"], "/bin/busybox")


def test_scripts_are_expanded_as_linux_does(bundle: Path) -> None:
    payload = look(bundle, spec("script", "x"))[0].payload
    assert payload is not None
    assert payload.argv == ["/bin/sh", "-e", "/bin/script", "x"]
    assert payload.named == "/bin/script"


@pytest.mark.parametrize(
    "name, status, text",
    [
        ("nope", 127, "executable file not found in $PATH"),
        ("/nope", 127, "no such file or directory"),
        ("", 127, "names no program"),
        ("/bin", 126, "is a directory"),
        ("/bin/plain", 126, "permission denied"),
        ("plain", 126, "permission denied"),
        ("/bin/empty", 126, "it is empty"),
        ("/bin/text", 126, "neither an ELF file nor a #! script"),
        ("/bin/arm", 126, "for another processor"),
        ("/bin/short", 126, "its ELF header is cut short"),
        ("/bin/loop", 126, "too many levels"),
        ("/bin/lost", 127, "stat /no/interpreter: no such file or directory"),
        ("/proc/self/exe", 126, "proc holds no programs"),
        ("/bin/self", 126, "proc holds no programs"),
    ],
)
def test_what_cannot_run(bundle: Path, name: str, status: int, text: str) -> None:
    base = bundle / "rootfs" / "bin"
    (base / "plain").write_text("x")
    elf = bytearray(STATIC.read_bytes()[:4096])
    elf[18:20] = (183).to_bytes(2, "little")
    files = {
        "empty": b"",
        "text": b"hello",
        "arm": bytes(elf),
        "short": bytes(elf[:30]),
        "loop": b"#!/bin/loop\n",
        "lost": b"#!/no/interpreter\n",
    }
    for file, data in files.items():
        (base / file).write_bytes(data)
        (base / file).chmod(0o755)
    (base / "self").symlink_to("/proc/self/exe")
    with pytest.raises(CannotExecute) as caught:
        look(bundle, spec(name))
    assert caught.value.exit_code == status
    assert text in str(caught.value)


def test_no_rootfs(tmp_path: Path) -> None:
    with pytest.raises(KrunError, match=r"rootfs .*: No such file or directory"):
        look(tmp_path, spec("sh"))


def test_a_program_in_a_volume(bundle: Path) -> None:
    volume = bundle / "volume"
    volume.mkdir()
    shutil.copy(STATIC, volume / "tool")
    mount = {"destination": "/v", "type": "bind", "source": str(volume), "options": ["rbind"]}
    payload = look(bundle, spec("/v/tool", mounts=[mount]))[0].payload
    assert payload is not None and payload.kind == "elf"
    tmpfs = {"destination": "/v", "type": "tmpfs", "source": "tmpfs"}
    payload = look(bundle, spec("/v/tool", mounts=[tmpfs]))[0].payload
    assert payload is not None and payload.kind == "unseen"


def test_entrypoints_that_are_km_already(bundle: Path) -> None:
    facts, _ = look(bundle, spec("/opt/kontain/bin/km", "-V", "--membus-width=36", "/bin/sh", "-c"))
    assert facts.km_words == ["-V", "--membus-width=36"]
    assert facts.payload is not None and facts.payload.argv == ["/bin/sh", "-c"]
    for words in (["--virt=/dev/null"], ["-SF/dev/null"], ["-F", "/dev/x"], ["-Sg2159"], ["--gdb"]):
        with pytest.raises(BadSpec, match="not the image's to give"):
            look(bundle, spec("/opt/kontain/bin/km", *words, "/bin/sh"))
    for words in (["--gdb-listen"], ["-g2159"], ["--gdb-server-port=1"]):
        entry = spec("/opt/kontain/bin/km", *words, "/bin/sh")
        with pytest.raises(PolicyDenied, match=r"allow\.gdb"):
            look(bundle, entry)
        assert look(bundle, entry, policy.Policy(allow={"gdb": True}))[0].km_words == words
    words = ["-k", "none", "--putenv", "A=b", "--snapshot", "/s", "-P36"]
    assert look(bundle, spec("/opt/kontain/bin/km", *words, "/bin/sh"))[0].km_words == words
    with pytest.raises(CannotExecute, match="no payload given"):
        look(bundle, spec("/opt/kontain/bin/km"))
    document = spec("km", "/bin/sh")
    document["process"]["env"] = ["PATH=/opt/kontain/bin:/bin"]
    assert look(bundle, document)[0].payload is not None


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host keeps its programs beside the root filesystem."""
    monkeypatch.setattr("krun.survey.PROGRAM_DIRECTORIES", (f"{tmp_path}/",))


def host_init(bundle: Path, **changes: Any) -> dict[str, Any]:
    source = bundle / "catatonit"
    if not source.exists():
        shutil.copy(STATIC, source)
        source.chmod(0o755)
    mount = {
        "destination": "/run/podman-init",
        "type": "bind",
        "source": str(source),
        "options": ["bind", "ro"],
    }
    return {**mount, **changes}


@pytest.mark.usefixtures("programs")
def test_the_clients_init_is_known_by_its_mount(bundle: Path) -> None:
    args = ("/run/podman-init", "--", "sh")
    facts, _ = look(bundle, spec(*args, mounts=[host_init(bundle)]))
    assert facts.init_words == ["/run/podman-init", "--"]
    assert facts.payload is not None and facts.payload.argv == ["/bin/sh"]
    alone, _ = look(bundle, spec("/run/podman-init", "-P", mounts=[host_init(bundle)]))
    assert alone.payload is None


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    "words", [["sh"], ["sh", "--", "/bin/script"], ["-g", "sh", "-x"], ["-g", "--", "sh"]]
)
def test_what_a_clients_init_would_run_is_the_payload(bundle: Path, words: list[str]) -> None:
    """With or without `--`: none of the image's programs is taken for a part of the init."""
    facts, _ = look(bundle, spec("/run/podman-init", *words, mounts=[host_init(bundle)]))
    assert facts.payload is not None
    assert facts.payload.argv == ["/bin/sh", *words[words.index("sh") + 1 :]]
    options = [word for word in words[: words.index("sh")] if word != "--"]
    assert facts.init_words == ["/run/podman-init", *options, "--"]


def test_where_an_init_comes_from(bundle: Path) -> None:
    """A file of root's named like an init is the host's only where the host keeps programs."""
    document = spec("/run/podman-init", "-P", mounts=[host_init(bundle)])
    (bundle / "rootfs" / "run").mkdir()
    shutil.copy(STATIC, bundle / "rootfs" / "run" / "podman-init")
    facts, _ = look(bundle, document)
    assert facts.payload is not None and facts.init_words == []
    configured = policy.Policy(init_path=str(bundle / "catatonit"))
    assert look(bundle, document, configured)[0].payload is None
    inside = host_init(bundle, source=str(bundle / "rootfs" / "run" / "tini"))
    shutil.copy(STATIC, inside["source"])
    facts, _ = look(bundle, spec("/run/podman-init", "-P", mounts=[inside]))
    assert facts.payload is not None


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    "trick", ["image", "other", "writable", "not-root", "covered", "tmpfs", "rootfs"]
)
def test_an_init_of_the_image_is_a_payload(bundle: Path, trick: str) -> None:
    (bundle / "rootfs" / "run").mkdir()
    shutil.copy(STATIC, bundle / "rootfs" / "run" / "podman-init")
    mounts = {
        "image": [],
        "other": [host_init(bundle, destination="/elsewhere")],
        "writable": [host_init(bundle, options=["bind", "rw"])],
        "not-root": [host_init(bundle)],
        "covered": [
            host_init(bundle),
            {"destination": "/run", "type": "bind", "source": str(bundle / "rootfs" / "run")},
        ],
        "tmpfs": [host_init(bundle, type="tmpfs", options=["ro"])],
        "rootfs": [host_init(bundle, source=f"{bundle}/rootfs/bin/tini")],
    }[trick]
    if trick == "not-root":
        (bundle / "catatonit").chmod(0o777)
    if trick == "rootfs":
        shutil.copy(STATIC, bundle / "rootfs" / "bin" / "tini")
    if trick == "tmpfs":
        (bundle / "rootfs" / "elsewhere").mkdir()
    facts, _ = look(bundle, spec("/run/podman-init", "--", "sh", mounts=mounts))
    assert facts.init_words == []
    assert facts.payload is not None
    assert facts.payload.argv[0] == "/run/podman-init"


def test_dev_behind_a_link_is_noticed(bundle: Path) -> None:
    assert look(bundle, spec("sh"))[0].dev_is_directory
    (bundle / "rootfs" / "dev").rmdir()
    assert look(bundle, spec("sh"))[0].dev_is_directory
    (bundle / "rootfs" / "dev").symlink_to("bin")
    assert not look(bundle, spec("sh"))[0].dev_is_directory


def test_a_listed_program_is_pinned(bundle: Path, store: Path) -> None:
    rules = listed(STATIC)
    facts, notes = look(bundle, spec("sh", "-c"), rules)
    assert (facts.chosen_pin, notes) == (0, [])
    copy = Path(facts.pinned[0].directory) / "busybox"
    assert copy.read_bytes() == STATIC.read_bytes()
    assert os.access(copy, os.X_OK) and copy.stat().st_mode & 0o222 == 0
    assert os.readlink(copy.parent / "sh") == "busybox", "argv[0] keeps the name asked for"
    assert sorted(os.listdir(copy.parent)) == ["busybox", "sh"], "no temporary file is left"
    assert look(bundle, spec("sh"), rules)[0].chosen_pin == 0
    # What the container does to its file later does not reach the copy.
    (bundle / "rootfs" / "bin" / "busybox").write_bytes(b"evil")
    assert copy.read_bytes() == STATIC.read_bytes()


def not_chosen(bundle: Path, document: dict[str, Any], rules: policy.Policy) -> str:
    facts, notes = look(bundle, document, rules)
    assert facts.chosen_pin is None
    return " ".join(note.text for note in notes)


def test_a_changed_file_goes_into_a_vm(bundle: Path, store: Path) -> None:
    rules = listed(STATIC)
    with open(bundle / "rootfs" / "bin" / "busybox", "ab") as file:
        file.write(b"x")
    assert "its SHA-256 is not the listed one" in not_chosen(bundle, spec("sh"), rules)
    assert not list(store.rglob("busybox"))


def test_a_file_that_changed_since_goes_into_a_vm(bundle: Path) -> None:
    """The copy is there already, of a container that had the listed file."""
    rules = listed(STATIC)
    assert look(bundle, spec("sh"), rules)[0].chosen_pin == 0
    with open(bundle / "rootfs" / "bin" / "busybox", "ab") as file:
        file.write(b"x")
    assert "its SHA-256 is not the listed one" in not_chosen(bundle, spec("sh"), rules)


def test_a_mount_over_the_file_is_what_counts(bundle: Path) -> None:
    evil = bundle / "evil"
    evil.write_bytes(STATIC.read_bytes() + b"x")
    evil.chmod(0o755)
    mount = {
        "destination": "/bin/busybox",
        "type": "bind",
        "source": str(evil),
        "options": ["bind"],
    }
    document = spec("busybox", mounts=[mount])
    assert "not the listed one" in not_chosen(bundle, document, listed(STATIC))


def test_a_link_to_another_program_does_not_carry_the_name(bundle: Path) -> None:
    base = bundle / "rootfs" / "bin"
    (base / "evil").write_bytes(STATIC.read_bytes() + b"x")
    (base / "evil").chmod(0o755)
    (base / "ping").symlink_to("evil")
    rules = listed(STATIC, "/bin/ping")
    assert "not the listed one" in not_chosen(bundle, spec("ping"), rules)
    assert "not the listed one" in not_chosen(bundle, spec("/bin/../bin/ping"), rules)


def test_path_and_argv0_do_not_choose(bundle: Path) -> None:
    other = bundle / "rootfs" / "other"
    other.mkdir()
    (other / "busybox").write_bytes(STATIC.read_bytes() + b"x")
    (other / "busybox").chmod(0o755)
    document = spec("busybox")
    document["process"]["env"] = ["PATH=/other:/bin"]
    assert not_chosen(bundle, document, listed(STATIC)) == ""
    document = spec("./busybox")
    document["process"]["cwd"] = "/other"
    assert not_chosen(bundle, document, listed(STATIC)) == ""


def test_scripts_and_dynamic_programs_bring_the_images_code_along(bundle: Path) -> None:
    script = bundle / "rootfs" / "bin" / "script"
    assert "only an ELF program" in not_chosen(
        bundle, spec("script"), listed(script, "/bin/script")
    )
    shutil.copy(DYNAMIC, bundle / "rootfs" / "bin" / "ls")
    rules = listed(DYNAMIC, "/bin/ls")
    assert "dynamically linked" in not_chosen(bundle, spec("ls"), rules)
    trusting = listed(DYNAMIC, "/bin/ls", trust_image_libraries=True)
    assert look(bundle, spec("ls"), trusting)[0].chosen_pin == 0


def test_a_script_whose_interpreter_is_listed_is_not(bundle: Path) -> None:
    """The interpreter is listed; what it would read is the image's."""
    assert not_chosen(bundle, spec("script"), listed(STATIC)) == ""


def test_a_bundle_can_drop_entries(bundle: Path) -> None:
    document = spec("sh", kontain={"directInvocation": []})
    facts, _ = look(bundle, document, listed(STATIC))
    assert (facts.chosen_pin, facts.pinned) == (None, ())


def test_pattern_and_target(bundle: Path) -> None:
    rules = listed(STATIC, "", pattern="/bin/(ping|sh)", target="/bin/busybox")
    assert look(bundle, spec("sh"), rules)[0].chosen_pin == 0
    assert look(bundle, spec("busybox"), rules)[0].chosen_pin is None
