"""What translate adds, and what it refuses: decided from records alone."""

from __future__ import annotations

from typing import Any

import hosts
import pytest

from krun import extension, jsontext
from krun.errors import BadSpec, CannotExecute, KrunError, PolicyDenied
from krun.extension import Choice
from krun.grammar import Settings
from krun.host import Host, VirtDevice
from krun.payload import Payload
from krun.policy import Policy
from krun.translate import Facts, Pinned, clean_environment, translate

KVM = VirtDevice("kvm", "/dev/kvm", 10, 232, 0o600, 0, 0)
KKM = VirtDevice("kkm", "/dev/kkm", 10, 99, 0o666, 0, 0)
HOST = hosts.HOST._replace(devices=(KVM,), init="/usr/bin/catatonit", nofile_hard=4096)


def spec(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "ociVersion": "1.2.0",
        "process": {"args": ["echo", "hi"], "env": ["PATH=/bin"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }
    return {**base, **changes}


def facts(**changes: Any) -> Facts:
    payload = Payload(["/bin/echo", "hi"], "/bin/echo", "/bin/busybox", "elf")
    return Facts(payload, [], [], True, False)._replace(**changes)


def choose(document: dict[str, Any], policy: Policy | None = None, **settings: Any) -> Choice:
    return extension.choose(document, policy or Policy(), Settings(**settings))


def run(
    document: dict[str, Any],
    host: Host = HOST,
    seen: Facts | None = None,
    policy: Policy | None = None,
    **settings: Any,
) -> Any:
    return translate(document, choose(document, policy, **settings), host, seen or facts())


def test_wraps_the_payload_and_nothing_else() -> None:
    document = spec(hostname="box", annotations={"a": "b"})
    before = jsontext.dumps(document)
    result = run(document)
    assert jsontext.dumps(document) == before, "the input is left alone"
    new = result.spec
    assert (result.engine, result.monitor) == ("crun", "km")
    assert new["process"]["args"] == [
        "/dev/krun-init",
        "--",
        "/dev/km",
        "--km-log-to=stderr",
        "--",
        "/bin/echo",
        "hi",
    ]
    assert new["mounts"][:2] == document["mounts"]
    assert [(m["destination"], m["source"]) for m in new["mounts"][2:]] == [
        ("/dev/km", "/opt/kontain/bin/km"),
        ("/dev/krun-init", "/usr/bin/catatonit"),
    ]
    for mount in new["mounts"][2:]:
        assert {"bind", "ro", "nosuid", "nodev"} <= set(mount["options"])
        assert "noexec" not in mount["options"]
    assert new["linux"]["devices"] == [
        {
            "path": "/dev/kvm",
            "type": "c",
            "major": 10,
            "minor": 232,
            "fileMode": 0o666,
            "uid": 0,
            "gid": 0,
        }
    ]
    assert new["linux"]["resources"]["devices"][-1] == {
        "allow": True,
        "type": "c",
        "major": 10,
        "minor": 232,
        "access": "rw",
    }
    assert new["hostname"] == "box"
    assert new["annotations"]["a"] == "b"


def test_no_rule_where_no_device_rules_are() -> None:
    document = spec()
    document["linux"]["resources"] = {"memory": {"limit": 1 << 20}}
    assert run(document).spec["linux"]["resources"] == {"memory": {"limit": 1 << 20}}


@pytest.mark.parametrize("case", ["user", "mapped", "namespace"])
def test_device_is_bound_where_no_node_can_be_made(case: str) -> None:
    document, host = spec(), HOST
    if case == "user":
        host = HOST._replace(euid=1000)
    elif case == "mapped":
        host = HOST._replace(user_namespace=True)
    else:
        document["linux"]["namespaces"].append({"type": "user"})
    result = run(document, host)
    assert "devices" not in result.spec["linux"]
    assert "/dev/kvm" in [m["destination"] for m in result.spec["mounts"]]
    assert any("mode 600" in note.text for note in result.notes)


def test_root_makes_a_node_for_its_user_namespaces() -> None:
    document = spec()
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    result = run(document)
    assert result.node is not None
    assert (result.node.path, result.node.uid) == ("/dev/.krun/100000/kvm", 100000)
    bound = {m["destination"]: m["source"] for m in result.spec["mounts"] if "source" in m}
    assert bound["/dev/kvm"] == result.node.path
    assert result.spec["linux"]["resources"]["devices"][-1]["allow"] is True
    open_to_all = HOST._replace(devices=(KVM._replace(mode=0o666),))
    assert run(document, open_to_all).node is None


def test_place_outside_a_dev_that_can_be_moved() -> None:
    for document, seen in (
        (spec(), facts(dev_is_directory=False)),
        (spec(mounts=[{"destination": "/proc", "type": "proc"}]), facts()),
    ):
        result = run(document, seen=seen)
        assert "/.krun-km" in result.spec["process"]["args"]


def test_clients_init_stays_in_front() -> None:
    result = run(spec(), seen=facts(init_words=["/run/podman-init", "--"]))
    assert result.spec["process"]["args"][:3] == ["/run/podman-init", "--", "/dev/km"]
    assert len(result.spec["mounts"]) == 3


def test_init_can_be_left_out() -> None:
    document = spec(annotations={"app.kontain.init": "none"})
    assert run(document).spec["process"]["args"][0] == "/dev/km"
    shared = spec()
    shared["linux"]["namespaces"][0]["path"] = "/proc/1/ns/pid"
    assert run(shared).spec["process"]["args"][0] == "/dev/km"
    assert run(spec(), HOST._replace(init="")).spec["process"]["args"][0] == "/dev/km"


def test_an_init_that_the_policy_names_must_be_there() -> None:
    gone = HOST._replace(init="", init_configured="/opt/init")
    with pytest.raises(KrunError, match="no executable file at /opt/init"):
        run(spec(), gone)
    document = spec(annotations={"app.kontain.init": "none"})
    assert run(document, gone).spec["process"]["args"][0] == "/dev/km"


def test_km_options_of_the_extension() -> None:
    document = spec(
        kontain={"km": {"membusWidth": 36, "overcommitMemory": True, "device": "kkm"}},
        annotations={"app.kontain.km.hcall-stats": "true", "app.kontain.km.verbose": "mem"},
    )
    args = run(document, HOST._replace(devices=(KVM, KKM))).spec["process"]["args"]
    assert args[args.index("/dev/km") : args.index("/bin/echo")] == [
        "/dev/km",
        "--km-log-to=stderr",
        "--virt-device=/dev/kkm",
        "--verbose=mem",
        "--membus-width=36",
        "--overcommit-memory",
        "--hcall-stats",
        "--",
    ]


def test_limits_km_needs() -> None:
    document = spec()
    document["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 256, "hard": 900}]
    document["linux"]["resources"]["pids"] = {"limit": 2}
    result = run(document)
    assert result.spec["process"]["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 900, "hard": 900}
    ]
    assert result.spec["linux"]["resources"]["pids"] == {"limit": 4}
    document["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 256, "hard": 256}]
    with pytest.raises(KrunError, match="hard limit 256 is too low, km needs 737"):
        run(document)
    document["process"]["rlimits"] = []
    inherited = run(document, HOST._replace(nofile_soft=200, nofile_hard=-1)).spec
    assert inherited["process"]["rlimits"][0]["soft"] == 1024
    unlimited = spec()
    unlimited["linux"]["resources"]["pids"] = {"limit": -1}
    assert run(unlimited).spec["linux"]["resources"]["pids"] == {"limit": -1}


def test_an_image_cannot_steer_km_by_its_environment() -> None:
    document = spec()
    document["process"]["env"] += ["KM_VERBOSE=.", "KM_EXEC_VERS=3", "SNAP_LISTEN_TIMEOUT=1", "A=b"]
    result = run(document)
    assert result.spec["process"]["env"] == ["PATH=/bin", "A=b"]
    assert sum("would steer the monitor" in note.text for note in result.notes) == 3
    assert clean_environment(["KMX=1"], []) == ["KMX=1"]


def test_strings_km_would_cut() -> None:
    document = spec()
    document["process"]["env"].append("BIG=" + "x" * 4093)
    with pytest.raises(CannotExecute, match="environment variable BIG has 4097 bytes") as caught:
        run(document)
    assert caught.value.exit_code == 126
    document["process"]["env"] = [f"V{i}=" + "x" * 4000 for i in range(40)]
    with pytest.raises(CannotExecute, match="argument list too long: 16"):
        run(document)
    seen = facts(payload=Payload(["/bin/echo", "é" * 2049], "/bin/echo", "/bin/echo", "elf"))
    with pytest.raises(CannotExecute, match="has 4098 bytes"):
        run(spec(), seen=seen)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(BadSpec, match="mounts: lacks /proc"):
        run(spec(mounts=[]))
    proc = {"destination": "/proc", "type": "proc", "source": "proc"}
    over = {"destination": "/proc/", "type": "tmpfs", "source": "tmpfs"}
    with pytest.raises(BadSpec, match="mounts: lacks /proc"):
        run(spec(mounts=[proc, over]))
    bound = {"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]}
    assert run(spec(mounts=[over, bound])).monitor == "km"
    with pytest.raises(KrunError, match="/dev/kvm: no such device"):
        run(spec(), HOST._replace(devices=()))
    closed = HOST._replace(devices=(KVM._replace(usable=False),))
    with pytest.raises(CannotExecute, match="/dev/kvm: permission denied") as caught:
        run(spec(), closed)
    assert caught.value.exit_code == 126
    with pytest.raises(KrunError, match="km: no executable file at"):
        run(spec(), HOST._replace(km=""), monitor="km")
    with pytest.raises(KrunError, match="crun is not installed"):
        run(spec(), HOST._replace(crun=""), engine="crun")
    with pytest.raises(KrunError, match="needs the native engine"):
        run(spec(), monitor="builtin", engine="crun")
    with pytest.raises(BadSpec, match="process: is required"):
        run({"ociVersion": "1.0.0"})


def test_engine_and_monitor_follow_what_is_there() -> None:
    def chosen(**changes: Any) -> tuple[str, str]:
        result = run(spec(), HOST._replace(**changes))
        return result.engine, result.monitor

    assert chosen() == ("crun", "km")
    assert chosen(crun="") == ("native", "km")
    assert chosen(km="") == ("native", "builtin")
    assert chosen(hybrid_cgroups=True) == ("native", "km"), "crun refuses that layout"


def test_the_built_in_monitor_needs_nothing_in_the_container() -> None:
    result = run(spec(), monitor="builtin")
    assert result.spec["process"]["args"] == ["/bin/echo", "hi"]
    assert result.spec["mounts"] == spec()["mounts"]


def test_label_mode() -> None:
    plain = spec(annotations={extension.STATE: '{"monitor":"none"}'})
    result = run(plain, mode="label")
    assert result.monitor == "none"
    assert result.spec["process"] == plain["process"]
    assert extension.STATE not in result.spec["annotations"]
    assert run(spec(annotations={"app.kontain.version": "2"}), mode="label").monitor == "none"
    for document, seen in (
        (spec(annotations={"app.kontain.version": "1"}), facts()),
        (spec(), facts(marked=True)),
        (spec(mounts=[*spec()["mounts"], {"destination": "/.kontain"}]), facts()),
        (spec(annotations={"app.kontain.mode": "all"}), facts()),
    ):
        assert run(document, seen=seen, policy=Policy(mode="label")).monitor == "km"


@pytest.mark.parametrize(
    "mark",
    [
        {"io.kubernetes.cri.container-type": "sandbox"},
        {"io.kubernetes.cri-o.ContainerType": "sandbox"},
        {"io.podman.annotations.infra": "TRUE"},
    ],
)
def test_sandbox_setting(mark: dict[str, str]) -> None:
    document = spec(annotations=mark)
    assert run(document).monitor == "km"
    assert run(document, policy=Policy(sandbox="native")).monitor == "none"
    tightened = spec(annotations={**mark, "app.kontain.sandbox": "vm"})
    assert run(tightened, policy=Policy(sandbox="native")).monitor == "km"
    with pytest.raises(PolicyDenied, match="native: the built-in policy"):
        run(spec(annotations={**mark, "app.kontain.sandbox": "native"}))


def test_state_annotation_is_kruns_alone() -> None:
    document = spec(annotations={extension.STATE: '{"direct":[{"path":"/bin/sh"}]}'})
    state = jsontext.loads(run(document).spec["annotations"][extension.STATE])
    assert state["direct"] == []
    assert state["program"] == "/dev/km"
    assert state["args"] == ["echo", "hi"]


def test_direct_program_runs_from_its_pinned_copy() -> None:
    pin = Pinned("/bin/echo", "", "/var/lib/krun/direct/ab", "busybox")
    result = run(spec(), seen=facts(pinned=(pin,), chosen_pin=0))
    assert result.spec["process"]["args"][-2:] == ["/dev/.direct-0/echo", "hi"]
    assert "/dev/km" not in result.spec["process"]["args"]
    bound = {m["destination"]: m for m in result.spec["mounts"]}
    assert bound["/dev/.direct-0"]["source"] == "/var/lib/krun/direct/ab"
    assert "ro" in bound["/dev/.direct-0"]["options"]
    assert "/dev/km" in bound, "what is exec'd beside it still runs in a VM"
    without_km = run(spec(), HOST._replace(km=""), facts(pinned=(pin,), chosen_pin=0))
    assert without_km.spec["process"]["args"] == ["/dev/.direct-0/echo", "hi"]


def test_image_hooks() -> None:
    host = HOST._replace(image_hooks="/lib/hooks")
    assert "hooks" not in run(spec(), host).spec
    rules = Policy(images={"check": "warn"})
    document = spec(
        hooks={"poststart": [{"path": "/mine"}]},
        kontain={"images": {"check": "record", "prefetch": ["a:1"]}},
    )
    hooks = run(document, host, policy=rules).spec["hooks"]
    assert hooks["createRuntime"] == [
        {"path": "/lib/hooks/krun-image-check", "args": ["krun-image-check", "--mode=warn"]}
    ], "a bundle cannot loosen the host's check"
    names = [hook["path"].rpartition("/")[2] for hook in hooks["poststart"]]
    assert names == ["mine", "krun-image-record", "krun-image-prefetch"]
    by_podman = spec(annotations={"io.container.manager": "libpod"})
    assert "hooks" not in run(by_podman, host, policy=rules).spec
    sandbox = spec(annotations={"io.kubernetes.cri.container-type": "sandbox"})
    assert "hooks" not in run(sandbox, host, policy=rules).spec
    missing = run(spec(), policy=rules)
    assert "hooks" not in missing.spec
    assert any("not installed" in note.text for note in missing.notes)
    with pytest.raises(KrunError, match="krun images hooks installs them"):
        run(spec(), policy=Policy(images={"check": "refuse"}))


def test_monitor_none_is_for_listed_programs() -> None:
    with pytest.raises(PolicyDenied, match="allow-listed programs only"):
        run(spec(), monitor="none")


def test_snapshot_takes_no_arguments() -> None:
    snapshot = Payload(["/snap", "x"], "/snap", "/snap", "snapshot")
    with pytest.raises(BadSpec, match="a km snapshot takes no arguments"):
        run(spec(), seen=facts(payload=snapshot))


def test_a_bundle_cannot_loosen() -> None:
    denied = [
        {"monitorPath": "/tmp/evil"},
        {"init": "/tmp/evil"},
        {"mode": "label"},
        {"km": {"gdb": 2159}},
        {"km": {"extraArgs": ["--gdb-listen"]}},
    ]
    for table in denied:
        with pytest.raises(PolicyDenied):
            choose(spec(kontain=table))
    closed = Policy(allow={"monitor": ["km"], "km": ["verbose"], "annotations": False})
    with pytest.raises(PolicyDenied, match="monitor builtin"):
        choose(spec(kontain={"monitor": "builtin"}), closed)
    with pytest.raises(PolicyDenied, match="hcallStats"):
        choose(spec(kontain={"km": {"hcallStats": True}}), closed)
    with pytest.raises(PolicyDenied, match="annotations"):
        choose(spec(annotations={"app.kontain.monitor": "km"}), closed)
    with pytest.raises(PolicyDenied, match="execOutsideVM"):
        choose(spec(kontain={"execOutsideVM": True}), Policy(exec_outside_vm=False))
    tight = spec(
        kontain={"execOutsideVM": False}, annotations={"app.kontain.exec-outside-vm": "true"}
    )
    assert choose(tight).exec_outside_vm is False


@pytest.mark.parametrize(
    "annotation, value, message",
    [
        ("app.kontain.monitor", "qemu", "must be one of"),
        ("app.kontain.km.membus-width", "31", "must be 32 to 39"),
        ("app.kontain.km.hcall-stats", "maybe", "must be true or false"),
        ("app.kontain.km.mgtpipe", "relative", "must be absolute"),
        ("app.kontain.memory", "12Q", "must be a number of bytes"),
        ("app.kontain.images", "{", "is not JSON"),
    ],
)
def test_wrong_annotations_are_named(annotation: str, value: str, message: str) -> None:
    with pytest.raises(BadSpec) as caught:
        choose(spec(annotations={annotation: value}))
    assert caught.value.path == f'annotations["{annotation}"]'
    assert message in str(caught.value)


def test_direct_list_of_a_bundle_only_narrows() -> None:
    one, other = "ab" * 32, "cd" * 32
    table = {"directInvocation": [{"path": "/bin/a", "sha256": one.upper()}]}
    assert choose(spec()).direct_sha256 is None
    assert choose(spec(kontain={"directInvocation": []})).direct_sha256 == ()
    assert choose(spec(kontain=table)).direct_sha256 == (one,)
    for digest, kept in ((other, ()), (one, (one,))):
        listed = jsontext.dumps([{"path": "/bin/b", "sha256": digest}])
        both = spec(kontain=table, annotations={"app.kontain.direct-invocation": listed})
        assert choose(both).direct_sha256 == kept
