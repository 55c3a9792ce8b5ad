"""The command line, declared once: verbs, their arguments and options; read by reader and help.

Names, options and defaults are runc's where runc has the verb, plus crun's where crun has more.
"""

from __future__ import annotations

from krun.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Option(Record):
    """One option: `names` as typed, `metavar` empty for a flag."""

    names: tuple[str, ...]
    help: str
    metavar: str = ""
    default: str | int | None = None
    repeat: bool = False
    integer: bool = False
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name the value is filed under: the first long name, with underscores."""
        for name in self.names:
            if name.startswith("--"):
                return name[2:].replace("-", "_")
        return self.names[0].lstrip("-")


class Argument(Record):
    """One positional argument; `number` is "1", "?" (optional), "+" or "*"."""

    name: str
    number: str = "1"


class Command(Record):
    """One verb; with `group`, a family of verbs whose table is COMMANDS of that module."""

    name: str
    summary: str
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    detail: str = ""
    examples: tuple[str, ...] = ()
    rest: bool = False
    module: str = ""
    group: str = ""

    @property
    def implementation(self) -> str:
        """The module that has run(call)."""
        return self.module or f"krun.commands.{self.name.replace('-', '_')}"


class Settings(Record):
    """The global options: those before the verb."""

    root: str | None = None
    log: str | None = None
    log_format: str = "text"
    log_level: str | None = None
    debug: bool = False
    systemd_cgroup: bool = False
    cgroup_manager: str | None = None
    rootless: str | None = None
    criu: str | None = None
    engine: str | None = None
    monitor: str | None = None
    mode: str | None = None
    network: str | None = None
    policy: str | None = None


class Call(Record):
    """One command line, read."""

    verb: str
    settings: Settings
    options: dict[str, Any]
    arguments: list[str]
    command: Command


GLOBAL_OPTIONS = (
    Option(("--root",), "directory of the containers' state (default /run/krun)", "DIR"),
    Option(("--log",), "write log lines to this file as well as errors to stderr", "FILE"),
    Option(
        ("--log-format",),
        "form of the log lines",
        "FORMAT",
        default="text",
        choices=("text", "json"),
    ),
    Option(
        ("--log-level",),
        "least level that is logged",
        "LEVEL",
        choices=("error", "warning", "info", "debug"),
    ),
    Option(("--debug",), "log every decision"),
    Option(("--systemd-cgroup",), "let systemd make the cgroup (cgroupsPath is slice:prefix:name)"),
    Option(
        ("--cgroup-manager",),
        "who makes the cgroup",
        "MANAGER",
        choices=("cgroupfs", "systemd", "disabled"),
    ),
    Option(("--rootless",), "ignore cgroup permission errors: true, false or auto", "VALUE"),
    Option(("--criu",), "accepted for runc's callers; the engine finds criu itself", "PATH"),
    Option(
        ("--engine",), "what builds the container", "ENGINE", choices=("auto", "crun", "native")
    ),
    Option(
        ("--monitor",),
        "what runs the payload's virtual machine",
        "MONITOR",
        choices=("auto", "km", "builtin", "none"),
    ),
    Option(
        ("--mode",),
        "which containers get a VM: all, or only labelled ones",
        "MODE",
        choices=("all", "label"),
    ),
    Option(
        ("--network",),
        "network, in its short form, of containers that ask for none and are in none",
        "REQUEST",
    ),
    Option(("--policy",), "the host's policy file (default /etc/krun/policy.json)", "FILE"),
)

_ID = (Argument("ID"),)
_BUNDLE = Option(("--bundle", "-b"), "directory of config.json and the root filesystem", "DIR", ".")
_CONFIG = Option(("--config", "-f"), "configuration file instead of BUNDLE/config.json", "FILE")
_FORMAT = Option(("--format", "-f"), "output form", "FORMAT", "table", choices=("table", "json"))
_TEXT_OR_JSON = Option(("--format",), "output form", "FORMAT", "text", choices=("text", "json"))
_CONSOLE = Option(
    ("--console-socket",), "AF_UNIX socket that receives the terminal's master end", "SOCKET"
)
_PID_FILE = Option(("--pid-file",), "file to write the process id to", "FILE")
_PRESERVE = Option(
    ("--preserve-fds",),
    "pass N more descriptors to the container, after stdio and LISTEN_FDS",
    "N",
    0,
    integer=True,
)
_NO_PIVOT = Option(("--no-pivot",), "move the mount instead of pivot_root (root on a ramdisk)")
_NO_KEYRING = Option(("--no-new-keyring",), "keep the caller's session keyring")
_NO_SUBREAPER = Option(("--no-subreaper",), "do not reap the container's orphans")
_CREATE = (
    _BUNDLE,
    _CONFIG,
    _CONSOLE,
    _PID_FILE,
    _NO_PIVOT,
    _NO_KEYRING,
    _NO_SUBREAPER,
    _PRESERVE,
)
_REGEX = Option(("--regex", "-r"), "ID is a regular expression")
_ANNOTATION = Option(
    ("--annotation", "-a"), "add an annotation, as podman would", "KEY=VALUE", repeat=True
)

COMMANDS = (
    Command(
        "create",
        "create a container: everything is ready, the payload waits for start",
        _ID,
        _CREATE,
        examples=("krun create --bundle /srv/web web1",),
    ),
    Command("start", "run the payload of a created container", _ID),
    Command(
        "state",
        "print a container's state as JSON",
        _ID,
        (
            Option(("--all", "-a"), "the engine's every detail (crun engine)"),
            Option(("--regex", "-r"), "ID is a regular expression (crun engine)"),
        ),
    ),
    Command(
        "kill",
        "send a signal to a container's payload",
        (Argument("ID"), Argument("SIGNAL", "?")),
        (
            Option(("--all", "-a"), "signal every process of the container"),
            Option(("--regex", "-r"), "ID is a regular expression"),
        ),
        detail="SIGNAL is a name (TERM, SIGTERM) or a number; SIGTERM when left out.",
        examples=("krun kill web1", "krun kill web1 KILL"),
    ),
    Command(
        "delete",
        "remove a container and all it held",
        _ID,
        (Option(("--force", "-f"), "kill it first; no error when there is none"), _REGEX),
    ),
    Command(
        "run",
        "create and start a container, and wait for its payload",
        _ID,
        (
            *_CREATE,
            Option(("--detach", "-d"), "return as soon as the payload runs"),
            Option(("--keep",), "do not delete the container when its payload ends"),
        ),
        examples=("krun spec --bundle /srv/web && krun run --bundle /srv/web web1",),
    ),
    Command(
        "exec",
        "run one more process in a container, in a VM of its own",
        (Argument("ID"), Argument("COMMAND", "*")),
        (
            _CONSOLE,
            Option(("--cwd",), "working directory in the container", "DIR"),
            Option(("--env", "-e"), "add an environment variable", "KEY=VALUE", repeat=True),
            Option(("--tty", "-t"), "allocate a pseudo-terminal"),
            Option(("--user", "-u"), "user in the container", "UID[:GID]"),
            Option(
                ("--additional-gids", "-g"),
                "additional group",
                "GID",
                repeat=True,
                integer=True,
            ),
            Option(("--process", "-p"), "process.json to run", "FILE"),
            Option(("--detach", "-d"), "return as soon as the process runs"),
            _PID_FILE,
            Option(("--process-label",), "SELinux label of the process", "LABEL"),
            Option(("--apparmor",), "AppArmor profile of the process", "PROFILE"),
            Option(("--no-new-privs",), "set no_new_privs"),
            Option(("--cap", "-c"), "add a capability", "CAP", repeat=True),
            _PRESERVE,
            Option(("--cgroup",), "sub-cgroup, as [controller:]path", "PATH", repeat=True),
            Option(("--ignore-paused",), "allow exec in a paused container"),
        ),
        rest=True,
        examples=("krun exec web1 /bin/sh -c 'uname -r'", "krun exec --tty web1 /bin/sh"),
    ),
    Command(
        "list",
        "list the containers of this root",
        (),
        (_FORMAT, Option(("--quiet", "-q"), "ids only")),
    ),
    Command(
        "ps",
        "list the processes of a container",
        (Argument("ID"), Argument("PS_OPTION", "*")),
        (_FORMAT,),
        rest=True,
    ),
    Command("pause", "freeze every process of a container", _ID),
    Command("resume", "thaw a paused container", _ID),
    Command(
        "update",
        "change the resource limits of a container",
        _ID,
        (
            Option(("--resources", "-r"), "JSON of linux.resources, - for stdin", "FILE"),
            Option(("--blkio-weight",), "block I/O weight, 10 to 1000", "N"),
            Option(("--cpu-period",), "CFS period in microseconds", "USEC"),
            Option(("--cpu-quota",), "CFS quota in microseconds", "USEC"),
            Option(("--cpu-burst",), "CFS burst in microseconds", "USEC"),
            Option(("--cpu-share",), "CPU shares", "N"),
            Option(("--cpu-rt-period",), "realtime period in microseconds", "USEC"),
            Option(("--cpu-rt-runtime",), "realtime runtime in microseconds", "USEC"),
            Option(("--cpu-idle",), "1 makes the container SCHED_IDLE", "N"),
            Option(("--cpuset-cpus",), "CPUs to use", "LIST"),
            Option(("--cpuset-mems",), "memory nodes to use", "LIST"),
            Option(("--kernel-memory",), "kernel memory limit (obsolete)", "BYTES"),
            Option(("--kernel-memory-tcp",), "kernel TCP memory limit (obsolete)", "BYTES"),
            Option(("--memory",), "memory limit in bytes", "BYTES"),
            Option(("--memory-reservation",), "soft memory limit in bytes", "BYTES"),
            Option(("--memory-swap",), "memory and swap in bytes, -1 for no limit", "BYTES"),
            Option(("--pids-limit",), "greatest number of tasks", "N"),
            Option(("--l3-cache-schema",), "Intel RDT L3 cache schema", "SCHEMA"),
            Option(("--mem-bw-schema",), "Intel RDT memory bandwidth schema", "SCHEMA"),
        ),
    ),
    Command(
        "events",
        "print a container's resource statistics and out-of-memory events",
        _ID,
        (
            Option(("--stats",), "print the statistics once and return"),
            Option(("--interval",), "time between two statistics", "DURATION", "5s"),
        ),
    ),
    Command(
        "checkpoint",
        "save a running container to files (crun engine, criu)",
        _ID,
        (
            Option(("--image-path",), "directory of the saved files", "DIR"),
            Option(("--work-path",), "directory of logs", "DIR"),
            Option(("--parent-path",), "directory of the previous pre-dump", "DIR"),
            Option(("--leave-running",), "leave the container running"),
            Option(("--tcp-established",), "allow open TCP connections"),
            Option(("--ext-unix-sk",), "allow external UNIX sockets"),
            Option(("--shell-job",), "allow shell jobs"),
            Option(("--file-locks",), "allow file locks"),
            Option(("--pre-dump",), "save memory only, leave the container running"),
            Option(("--lazy-pages",), "restore memory lazily"),
            Option(("--status-fd",), "descriptor criu reports readiness on", "FD"),
            Option(("--page-server",), "address of the page server", "ADDRESS:PORT"),
            Option(("--manage-cgroups-mode",), "soft, full, strict or ignore", "MODE"),
            Option(("--empty-ns",), "create a namespace without its properties", "NS", repeat=True),
            Option(("--auto-dedup",), "deduplicate memory images"),
        ),
    ),
    Command(
        "restore",
        "start a container from a checkpoint (crun engine, criu)",
        _ID,
        (
            _BUNDLE,
            _CONSOLE,
            _PID_FILE,
            _NO_PIVOT,
            _NO_SUBREAPER,
            Option(("--image-path",), "directory of the saved files", "DIR"),
            Option(("--work-path",), "directory of logs", "DIR"),
            Option(("--tcp-established",), "allow open TCP connections"),
            Option(("--ext-unix-sk",), "allow external UNIX sockets"),
            Option(("--shell-job",), "allow shell jobs"),
            Option(("--file-locks",), "allow file locks"),
            Option(("--detach", "-d"), "return as soon as the container runs"),
            Option(("--manage-cgroups-mode",), "soft, full, strict or ignore", "MODE"),
            Option(("--empty-ns",), "create a namespace without its properties", "NS", repeat=True),
            Option(("--auto-dedup",), "deduplicate memory images"),
            Option(("--lazy-pages",), "restore memory lazily"),
            Option(("--lsm-profile",), "LSM profile, as TYPE:NAME", "PROFILE"),
            Option(("--lsm-mount-context",), "LSM mount context", "CONTEXT"),
        ),
    ),
    Command("features", "print what this runtime supports, as JSON"),
    Command(
        "spec",
        "write a config.json that runs",
        (),
        (
            _BUNDLE,
            Option(("--file", "-f"), "file to write (default BUNDLE/config.json)", "FILE"),
            Option(("--rootless",), "for an ordinary user"),
        ),
        examples=("mkdir -p b/rootfs && krun spec --bundle b",),
    ),
    Command(
        "translate",
        "print the configuration that the engine will get",
        (),
        (_BUNDLE, _CONFIG, _ANNOTATION),
        detail="The payload is shown wrapped by its monitor; nothing is run.",
        examples=("krun translate --bundle B --annotation app.kontain.monitor=km",),
    ),
    Command(
        "plan",
        "print what the native engine would do, as data",
        (),
        (_BUNDLE, _CONFIG, _ANNOTATION),
        detail="Every namespace, mount, device, cgroup write and credential; nothing is done.",
        examples=("krun plan --bundle B",),
    ),
    Command(
        "validate",
        "check config.json against the specification; name every violation",
        (),
        (_BUNDLE, _CONFIG, _TEXT_OR_JSON),
        examples=("krun validate --bundle B --format json",),
    ),
    Command(
        "monitor",
        "run a program in the built-in monitor's virtual machine, without a container",
        (Argument("PAYLOAD"), Argument("ARG", "*")),
        (
            Option(("-e", "--putenv"), "the program's environment: only these", "K=V", repeat=True),
            Option(("--copyenv",), "the environment without names that start so", "A=B=C"),
            Option(("-F", "--virt-device"), "open this KVM device", "DEVICE"),
            Option(
                ("-P", "--membus-width"), "guest-physical size as a power of two", "N", integer=True
            ),
            Option(("-C", "--coredump"), "write a core file here when a signal ends it", "FILE"),
            Option(
                ("-k", "--km-log-to"), "where the statistics go: stderr, none or a file", "FILE"
            ),
            Option(("-S", "--hcall-stats"), "print calls and time per system call at the end"),
            Option(("-V", "--verbose"), "log unimplemented calls and fatal signals"),
            Option(("--kill-unimpl-scall",), "SIGSYS for system calls that are not implemented"),
            Option(
                ("--ring",),
                "processor ring the program runs in; 0 only where ring 3 is emulated",
                "N",
                default=3,
                integer=True,
            ),
            Option(("--no-seccomp",), "do not confine the monitor's own system calls"),
        ),
        rest=True,
        examples=("krun monitor /bin/echo hello", "krun monitor -S ./payload arg"),
    ),
    Command(
        "check",
        "check whether this machine can run containers in VMs, and say what is missing",
        (),
        (_TEXT_OR_JSON,),
    ),
    Command(
        "images",
        "have images on this node before a container needs them",
        group="krun.images.grammar",
    ),
    Command(
        "install",
        "put krun on this machine and tell podman, docker or containerd about it",
        (),
        (
            Option(("--podman",), "register in containers.conf"),
            Option(("--docker",), "register in docker's daemon.json"),
            Option(("--containerd",), "register in containerd's config.toml"),
            Option(("--crio",), "register in CRI-O's drop-in directory"),
            Option(
                ("--name",),
                "runtime name to register (default krun and kontain)",
                "NAME",
                repeat=True,
            ),
            Option(("--cold",), "start Python anew for each verb (see docs/install.md)"),
            Option(("--prefix",), "where to install", "DIR", "/usr/local"),
            Option(("--destdir",), "staging directory put before every path", "DIR", ""),
        ),
        examples=("krun install --podman --docker --name kontain",),
    ),
    Command(
        "uninstall",
        "undo krun install",
        (),
        (
            Option(("--prefix",), "where it was installed", "DIR", "/usr/local"),
            Option(("--destdir",), "staging directory put before every path", "DIR", ""),
        ),
    ),
    Command(
        "network", "see, define and pool the networks of containers", group="krun.network.grammar"
    ),
    Command(
        "completion",
        "print the shell completion script",
        (Argument("SHELL"),),
        detail="SHELL is bash, zsh or fish.",
    ),
)


def command_of(name: str, commands: tuple[Command, ...] = COMMANDS) -> Command | None:
    """Return the command of that exact name."""
    for command in commands:
        if command.name == name:
            return command
    return None


def members(command: Command) -> tuple[Command, ...]:
    """Return the verbs of a group; imports the group's table."""
    module = __import__(command.group, fromlist=["COMMANDS"])
    commands: tuple[Command, ...] = module.COMMANDS
    return commands


def defaults(options: tuple[Option, ...]) -> dict[str, Any]:
    """Return what the options are when the line does not give them."""
    values: dict[str, Any] = {}
    for option in options:
        if option.repeat:
            values[option.key] = []
        else:
            values[option.key] = option.default if option.metavar else False
    return values
