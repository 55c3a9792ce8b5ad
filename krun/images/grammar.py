"""The verbs of `krun images`, as the grammar's table."""

from __future__ import annotations

from krun.grammar import Argument, Command, Option

CONFIG = Option(("--config",), "settings file (default /etc/krun/images.toml)", "FILE")
STORE = Option(
    ("--store",), "where the images live", "STORE", choices=("podman", "docker", "containerd")
)
STATE = Option(("--state",), "state directory (default /var/lib/krun/images)", "DIR")
FORMAT = Option(("--format",), "output form", "FORMAT", "table", choices=("table", "json"))
NAMESPACE = Option(("--namespace", "-n"), "only objects of this namespace", "NAMESPACE", "")
ALL = Option(("--all",), "every object")
PLACE = (STORE, CONFIG, STATE)
NODE = (
    Option(("--node",), "name of this node (default: the host name)", "NAME"),
    Option(
        ("--labels",), "labels of this node: LABEL=VALUE lines, a mapping or a Node object", "FILE"
    ),
)
PULLING = (
    Option(("--authfile",), "registry credentials (auth.json or config.json)", "FILE"),
    Option(("--secrets",), "directory of Secret manifests for imagePullSecrets", "DIR"),
    Option(("--parallel",), "pulls at a time", "N", integer=True),
    Option(("--layers",), "layers at a time in one pull", "N", integer=True),
    Option(("--timeout",), "time for one pull, such as 5m", "DURATION"),
    Option(("--retries",), "further tries of a pull that failed for the moment", "N", integer=True),
)

COMMANDS = (
    Command(
        "warm",
        "pull images now, so that later starts find them",
        (Argument("IMAGE", "*"),),
        (
            Option(("--file", "-f"), "file of image references, one a line", "FILE", repeat=True),
            Option(("--pin",), "pin them too"),
            Option(("--background",), "for the prefetch hook: lowest priority, no output"),
            *PULLING,
            FORMAT,
            *PLACE,
        ),
        detail="An image that is there already is not fetched again; `latest` is compared with "
        "its registry first.",
        examples=("krun images warm nginx:1.23 quay.io/app@sha256:…", "krun images warm -f list"),
        module="krun.commands.images.warm",
    ),
    Command(
        "ls",
        "list the images of the store: size, pinned, in use, wanted",
        (),
        (FORMAT, *PLACE, *NODE),
        module="krun.commands.images.ls",
    ),
    Command(
        "status",
        "say what a start would have to fetch: percent warm and bytes missing per image",
        (Argument("IMAGE", "*"),),
        (FORMAT, *PLACE, *NODE, PULLING[0], PULLING[1]),
        detail="Without IMAGE: every image that a cache wants on this node.",
        examples=("krun images status nginx:1.23",),
        module="krun.commands.images.status",
    ),
    Command(
        "pin",
        "keep images from every garbage collection",
        (Argument("IMAGE", "+"),),
        PLACE,
        detail="containerd: the label that the kubelet respects; podman and docker: a container "
        "that never starts, which `container prune` and `system prune` would remove.",
        module="krun.commands.images.pin",
    ),
    Command(
        "unpin",
        "undo pin",
        (Argument("IMAGE", "+"),),
        PLACE,
        module="krun.commands.images.unpin",
    ),
    Command(
        "gc",
        "drop least recently used images until the store fits a quota",
        (),
        (
            Option(("--quota",), "greatest size of all images, such as 20GiB", "SIZE"),
            Option(("--dry-run",), "print what would go, remove nothing"),
            FORMAT,
            *PLACE,
            *NODE,
        ),
        detail="Images that are pinned, used by a container or wanted by a cache always stay.",
        examples=("krun images gc --quota 20GiB --dry-run",),
        module="krun.commands.images.gc",
    ),
    Command(
        "hooks",
        "install the hooks that check, record and prefetch, for podman and CRI-O",
        (),
        (
            Option(
                ("--prefix",), "where the programs go: PREFIX/lib/krun-hooks", "DIR", "/usr/local"
            ),
            Option(("--hooks-dir",), "hooks.d directory", "DIR", "/etc/containers/oci/hooks.d"),
            Option(("--policy",), "policy file (default /etc/krun/images-policy.json)", "FILE"),
            Option(
                ("--mode",),
                "mode of the check, if it is not the policy's",
                "MODE",
                choices=("record", "warn", "refuse"),
            ),
            Option(("--remove",), "remove them again"),
            CONFIG,
            STATE,
        ),
        detail="Run it again after an upgrade of krun. For CRI-O name a directory that its "
        "hooks_dir lists.",
        examples=("krun images hooks --mode warn", "krun images hooks --remove"),
        module="krun.commands.images.hooks",
    ),
    Command(
        "cache",
        "keep images on this node: ImageCache and ImageWarm objects",
        group="krun.images.cache_grammar",
    ),
)
