"""The verbs of `krun images cache`, as the grammar's table."""

from __future__ import annotations

from krun.grammar import Argument, Command, Option
from krun.images.grammar import ALL, FORMAT, NAMESPACE, NODE, PLACE, PULLING

_NAMES = (Argument("NAME", "*"),)
_RECORD_ONLY = Option(("--record-only",), "only store the wish: `watch` acts on it")

COMMANDS = (
    Command(
        "apply",
        "create or update objects, and bring this node to what they want",
        (),
        (
            Option(
                ("--filename", "-f"),
                "manifest, directory of manifests, or - for stdin",
                "FILE",
                repeat=True,
            ),
            _RECORD_ONLY,
            *PULLING,
            *NODE,
            FORMAT,
            *PLACE,
        ),
        detail="Kinds: ImageCache (kubefledged.io/v1alpha2, v1alpha3), ImageWarm "
        "(caching.knative.dev/v1alpha1) and Secret. Every object is checked before any is stored.",
        examples=("krun images cache apply -f secret.yaml -f cache.yaml",),
        module="krun.commands.images.cache_apply",
    ),
    Command(
        "get",
        "list the objects and how they are",
        _NAMES,
        (NAMESPACE, FORMAT, *PLACE),
        module="krun.commands.images.cache_get",
    ),
    Command(
        "describe",
        "show everything of an object: images, failures, conditions",
        (Argument("NAME", "+"),),
        (NAMESPACE, FORMAT, *PLACE),
        detail="NAME, KIND/NAME or KIND/NAMESPACE/NAME; ic and iw are short for the kinds.",
        module="krun.commands.images.cache_describe",
    ),
    Command(
        "refresh",
        "pull again what is missing or has changed",
        _NAMES,
        (ALL, NAMESPACE, _RECORD_ONLY, *PULLING, *NODE, FORMAT, *PLACE),
        examples=("krun images cache refresh --all",),
        module="krun.commands.images.cache_refresh",
    ),
    Command(
        "purge",
        "remove an object's images from this node, but keep the object",
        _NAMES,
        (ALL, NAMESPACE, _RECORD_ONLY, *NODE, FORMAT, *PLACE),
        detail="They stay away until the object changes or is refreshed. An image that a "
        "container uses is never removed.",
        module="krun.commands.images.cache_purge",
    ),
    Command(
        "delete",
        "remove an object and its images",
        _NAMES,
        (
            ALL,
            NAMESPACE,
            Option(("--keep-images",), "remove the object alone"),
            _RECORD_ONLY,
            *NODE,
            FORMAT,
            *PLACE,
        ),
        detail="The object goes when its images are gone; one that a container uses holds it.",
        module="krun.commands.images.cache_delete",
    ),
    Command(
        "watch",
        "keep this node as the objects want it, until stopped",
        (),
        (
            Option(("--interval",), "time between two looks at the store", "DURATION", "30s"),
            Option(("--once",), "make one pass and return"),
            *PULLING,
            *NODE,
            FORMAT,
            *PLACE,
        ),
        detail="What a service runs: see krun-images.service.",
        module="krun.commands.images.cache_watch",
    ),
    Command(
        "suggest",
        "write an ImageCache of the images that this node uses",
        (),
        (
            Option(("--name",), "name of the object", "NAME", "suggested"),
            Option(("--namespace", "-n"), "namespace of the object", "NAMESPACE", "default"),
            Option(("--of-namespace",), "only what pods of this namespace use", "NAMESPACE"),
            Option(("--annotated",), "only containers with kontain.app/images-cache=true"),
            Option(("--since",), "only starts of this last time, such as 7d", "DURATION"),
            Option(("--least",), "only images with at least N starts", "N", 1, integer=True),
            Option(("--by-digest",), "name images by the digest that ran"),
            *PLACE,
        ),
        examples=("krun images cache suggest --since 7d | krun images cache apply -f -",),
        module="krun.commands.images.cache_suggest",
    ),
)
