"""judge(Facts) -> Findings: whether a machine can run containers in VMs, and what is missing.

Pure; krun.inspection gathers the facts.
"""

from __future__ import annotations

from krun.record import Record

OK, WARNING, FAILURE = "ok", "warning", "failure"
# openat2 came with 5.6, pidfd_open with 5.3; 5.10 is the oldest long-term kernel with all of them.
LEAST_KERNEL = (5, 10)
NATIVE_KERNEL = (5, 12)
# The first crun that reads its configuration through --config and writes config.json to its state.
LEAST_CRUN = (1, 0)
KVM_API_VERSION = 12


class Program(Record):
    """A program of the host: no path when it is not there; version, or why it has none."""

    path: str = ""
    version: str = ""
    error: str = ""


class Device(Record):
    """A virtualization device: what opening and asking it gave; `error` is empty when it works."""

    path: str
    present: bool = False
    mode: int = 0
    error: str = ""


# What root needs to make containers, and what for (capabilities(7)).
CAPABILITIES = {
    "SYS_ADMIN": "namespaces, mounts",
    "SYS_CHROOT": "change of root",
    "SETUID": "users other than root",
    "SETGID": "groups other than root's",
    "SETPCAP": "bounding sets",
    "CHOWN": "files of the payload's user",
    "DAC_OVERRIDE": "images of other users",
    "MKNOD": "device nodes",
    "NET_ADMIN": "network interfaces",
    "KILL": "signals to the payload's user",
    "SYS_RESOURCE": "limits above krun's own, lower oom scores",
}
_ESSENTIAL = ("SYS_ADMIN", "SYS_CHROOT", "SETUID", "SETGID", "SETPCAP")


class Facts(Record):
    """What krun.inspection found out."""

    kernel: str
    machine: str
    cpu_flags: frozenset[str]
    devices: tuple[Device, ...]
    crun: Program
    km: Program
    init: Program
    podman: Program
    docker: Program
    containerd: Program
    cgroup: str
    controllers: tuple[str, ...]
    seccomp: bool
    libseccomp: str
    newuidmap: Program
    newgidmap: Program
    user: str
    euid: int
    user_namespaces: bool
    subuid: bool
    subgid: bool
    packages: tuple[str, ...]
    native: bool
    builtin: bool
    policy: str = ""
    policy_error: str = ""
    launcher_stale: str = ""
    # warm, stale, cold; empty in a checkout.
    start: str = ""
    # Capabilities, of CAPABILITIES, that root lacks here.
    lacking: tuple[str, ...] = ()
    no_new_privs: bool = False


class Finding(Record):
    """One line of the answer: what was looked at, how it is, and the way out where it is not ok."""

    name: str
    status: str
    found: str
    way_out: str = ""


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: (6, 18) of "6.18.5-cloud"."""
    numbers = []
    for part in text.split(".")[:2]:
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def kernel(facts: Facts) -> Finding:
    """The kernel's version."""
    if version_numbers(facts.kernel) < LEAST_KERNEL:
        return Finding("kernel", FAILURE, facts.kernel, "krun needs Linux 5.10 or newer")
    if version_numbers(facts.kernel) < NATIVE_KERNEL:
        text = "the native engine needs Linux 5.12 (mount_setattr): use --engine crun with km"
        return Finding("kernel", WARNING, facts.kernel, text)
    return Finding("kernel", OK, facts.kernel)


def cpu(facts: Facts) -> Finding:
    """The processor: kind, and hardware virtualization."""
    if facts.machine != "x86_64":
        return Finding("cpu", FAILURE, facts.machine, "krun's monitors run on x86-64 only")
    for flag, name in (("vmx", "Intel VT-x"), ("svm", "AMD-V")):
        if flag in facts.cpu_flags:
            return Finding("cpu", OK, f"x86_64 with {name} ({flag})")
    return Finding(
        "cpu",
        WARNING,
        "x86_64, no vmx or svm flag: km fails on programs with SSE or AVX code",
        "enable virtualization in the firmware; in a virtual machine, nested virtualization on "
        "its host (or Kontain's kkm module)",
    )


def devices(facts: Facts) -> list[Finding]:
    """The virtualization devices: one that works is enough."""
    findings = []
    works = any(device.present and not device.error for device in facts.devices)
    for device in facts.devices:
        name = device.path
        if not device.present:
            if works or device.path != "/dev/kvm":
                continue
            way = "modprobe kvm_intel or kvm_amd (see cpu), or install Kontain's kkm"
            findings.append(Finding(name, FAILURE, "not there", way))
        elif device.error:
            way = f"chmod 0666 {name} (by a udev rule, see docs/install.md), or join its group"
            if "ermission" not in device.error:
                way = "another program may hold it, or a cgroup rule denies it; see dmesg"
            status = WARNING if works else FAILURE
            findings.append(Finding(name, status, device.error, way))
        else:
            findings.append(Finding(name, OK, f"works, mode {device.mode:04o}"))
    return findings


def rootless_device(facts: Facts) -> Finding | None:
    """Whether containers of ordinary users can open a device: by its mode for others."""
    present = [device for device in facts.devices if device.present]
    if not present:
        return None
    open_to_all = [device for device in present if device.mode & 0o006 == 0o006]
    if open_to_all:
        return Finding("rootless device", OK, f"{open_to_all[0].path} is open to every user")
    device = present[0]
    return Finding(
        "rootless device",
        WARNING,
        f"{device.path} has mode {device.mode:04o}: rootless containers cannot open it",
        f'KERNEL=="{device.path[5:]}", MODE="0666" in /etc/udev/rules.d/99-krun.rules, '
        "then udevadm trigger",
    )


def engine(facts: Facts) -> list[Finding]:
    """The engines: crun, and krun's own."""
    status = WARNING if facts.native else FAILURE
    program = facts.crun
    findings = []
    if not program.path:
        way = "apt-get install crun, or set paths.crun in /etc/krun/policy.json"
        findings.append(Finding("crun", status, "not installed", way))
    elif program.error:
        way = "reinstall crun"
        findings.append(Finding("crun", status, f"{program.path}: {program.error}", way))
    elif version_numbers(program.version) < LEAST_CRUN:
        found = f"{program.version} at {program.path}"
        findings.append(Finding("crun", status, found, "krun needs crun 1.0 or newer"))
    elif facts.cgroup == "hybrid":
        way = "boot with systemd.unified_cgroup_hierarchy=1, or umount /sys/fs/cgroup/unified"
        found = f"{program.version} at {program.path} refuses the hybrid cgroup layout"
        if facts.native:
            found += " (the native engine is used)"
        findings.append(Finding("crun", status, found, way))
    else:
        findings.append(Finding("crun", OK, f"{program.version} at {program.path}"))
    if facts.native:
        if facts.libseccomp:
            findings.append(Finding("native engine", OK, "part of krun"))
        else:
            found = "without libseccomp it runs containers without a seccomp filter only"
            way = "apt-get install libseccomp2"
            findings.append(Finding("native engine", WARNING, found, way))
    return findings


def monitor(facts: Facts) -> list[Finding]:
    """The monitors: Kontain's km, and krun's own."""
    status = WARNING if facts.builtin else FAILURE
    program = facts.km
    instead = " (the built-in monitor is used)" if facts.builtin else ""
    findings = []
    if not program.path:
        way = "install Kontain's km to /opt/kontain/bin/km, or set paths.km in the policy"
        findings.append(Finding("km", status, f"not installed{instead}", way))
    elif program.error:
        found = f"{program.path}: {program.error}{instead}"
        findings.append(Finding("km", status, found, "reinstall km"))
    else:
        findings.append(Finding("km", OK, f"{program.version} at {program.path}"))
    if facts.builtin:
        kvm = any(d.path == "/dev/kvm" and d.present and not d.error for d in facts.devices)
        if kvm:
            findings.append(Finding("built-in monitor", OK, "part of krun"))
        else:
            status = WARNING if program.path and not program.error else FAILURE
            found = "needs /dev/kvm, and has no use for kkm"
            findings.append(Finding("built-in monitor", status, found, "see /dev/kvm"))
    return findings


def init(facts: Facts) -> Finding:
    """The init that goes in front of payloads."""
    if facts.init.path:
        return Finding("init", OK, facts.init.path)
    found = "no static tini or catatonit: signals may not end a payload that km runs as pid 1"
    return Finding("init", WARNING, found, "apt-get install tini")


def clients(facts: Facts) -> list[Finding]:
    """The programs that call krun; none of them is needed."""
    findings = []
    for name, program, package in (
        ("podman", facts.podman, "podman"),
        ("docker", facts.docker, "docker.io"),
        ("containerd", facts.containerd, "containerd"),
    ):
        if not program.path:
            findings.append(
                Finding(name, WARNING, "not installed", f"apt-get install {package}, if wanted")
            )
        elif program.error:
            findings.append(
                Finding(name, WARNING, f"{program.path}: {program.error}", f"reinstall {package}")
            )
        else:
            findings.append(Finding(name, OK, f"{program.version} at {program.path}"))
    return findings


def cgroup(facts: Facts) -> Finding:
    """The cgroup layout, and the controllers that limits need."""
    name = "cgroup"
    found = f"{facts.cgroup}, controllers: {' '.join(facts.controllers) or 'none'}"
    if facts.cgroup == "none":
        way = "mount -t cgroup2 none /sys/fs/cgroup"
        return Finding(name, FAILURE, "no cgroup file system is mounted", way)
    missing = [wanted for wanted in ("cpu", "memory", "pids") if wanted not in facts.controllers]
    if missing:
        way = f"without {', '.join(missing)} those limits fail; see cgroup.subtree_control"
        if facts.euid != 0:
            way = "let systemd delegate them: Delegate=yes of user@.service"
        return Finding(name, WARNING, found, way)
    return Finding(name, OK, found)


def capabilities(facts: Facts) -> Finding | None:
    """What root lacks where it is a container's, or a service's with less: containers need it."""
    if facts.euid != 0:
        return None
    if not facts.lacking:
        return Finding("capabilities", OK, "all that containers need")
    found = f"root lacks {', '.join(f'CAP_{one}' for one in facts.lacking)}"
    essential = [one for one in facts.lacking if one in _ESSENTIAL]
    if essential:
        way = "run krun on the host, or give the container around it --privileged"
        return Finding("capabilities", FAILURE, found, way)
    uses = "; ".join(CAPABILITIES[one] for one in facts.lacking)
    return Finding("capabilities", WARNING, found, f"containers that need this fail: {uses}")


def seccomp(facts: Facts) -> Finding:
    """Seccomp in the kernel."""
    if facts.seccomp:
        return Finding("seccomp", OK, f"in the kernel{', libseccomp' if facts.libseccomp else ''}")
    way = "a kernel with CONFIG_SECCOMP_FILTER=y"
    return Finding("seccomp", WARNING, "not in the kernel: profiles cannot be applied", way)


def rootless(facts: Facts) -> Finding:
    """What podman needs to run containers for ordinary users: needed for nothing else."""
    problems = []
    ways = []
    if not facts.user_namespaces:
        problems.append("user namespaces are off")
        ways.append("sysctl user.max_user_namespaces=28633")
    for name, program in (("newuidmap", facts.newuidmap), ("newgidmap", facts.newgidmap)):
        if not program.path:
            problems.append(f"no {name}")
        elif program.error:
            problems.append(f"{name}: {program.error}")
    if facts.no_new_privs:
        problems.append("no_new_privs is set: newuidmap and newgidmap have no effect")
        ways.append("begin in a session or service without NoNewPrivileges")
    if problems and (not facts.newuidmap.path or not facts.newgidmap.path):
        ways.append("apt-get install uidmap")
    if facts.euid != 0:
        for path, present in (("/etc/subuid", facts.subuid), ("/etc/subgid", facts.subgid)):
            if not present:
                problems.append(f"{facts.user} is not in {path}")
        if not (facts.subuid and facts.subgid):
            ways.append(
                f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {facts.user}"
            )
    if problems:
        way = "; ".join(ways) or "reinstall uidmap"
        return Finding("rootless", WARNING, ", ".join(problems), way)
    found = "newuidmap, newgidmap" + (f", sub-ids of {facts.user}" if facts.euid != 0 else "")
    return Finding("rootless", OK, found)


def packages(facts: Facts) -> Finding:
    """The Python packages; none is needed to run containers."""
    if facts.packages:
        names = " ".join(facts.packages)
        return Finding("packages", WARNING, f"missing: {names}", f"pip install {names}")
    return Finding("packages", OK, "all there")


def policy(facts: Facts) -> Finding:
    """The host's policy file: a wrong one stops every container."""
    if facts.policy_error:
        way = "correct it; docs/policy-file.md has the reference"
        return Finding("policy", FAILURE, facts.policy_error, way)
    return Finding("policy", OK, facts.policy or "none: the built-in one")


def launcher(facts: Facts) -> Finding | None:
    """The launcher, if it does not know the policy of now."""
    if not facts.launcher_stale:
        return None
    return Finding(
        "launcher",
        WARNING,
        f"the policy is newer than {facts.launcher_stale}: every verb starts Python",
        "run krun install again",
    )


def start(facts: Facts) -> Finding | None:
    """How the installed krun starts (krun.install.warm)."""
    if facts.start == "stale":
        text = "the processor or a library has changed since krun install: every verb starts Python"
        return Finding("start", WARNING, text, "run krun install again")
    return Finding("start", OK, facts.start) if facts.start else None


def judge(facts: Facts) -> list[Finding]:
    """Return every finding, in the order in which they matter."""
    findings = [
        kernel(facts),
        cpu(facts),
        *devices(facts),
        rootless_device(facts),
        *engine(facts),
        *monitor(facts),
        init(facts),
        capabilities(facts),
        cgroup(facts),
        seccomp(facts),
        policy(facts),
        launcher(facts),
        start(facts),
        *clients(facts),
        rootless(facts),
        packages(facts),
    ]
    return [finding for finding in findings if finding is not None]


def can_run(findings: list[Finding]) -> bool:
    """Return whether containers can run."""
    return all(finding.status != FAILURE for finding in findings)
