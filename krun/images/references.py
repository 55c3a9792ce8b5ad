"""Image references: the grammar of the distribution specification with docker's familiar defaults.

`foo:1` is never `foo:1.2`: references are compared as parsed values, not as text.  The hooks
import this module, so it imports nothing but records and errors.
"""

from __future__ import annotations

from krun.errors import KrunError
from krun.record import Record

DEFAULT_HOST = "docker.io"
DEFAULT_TAG = "latest"
# Longest repository name and tag (distribution-spec, "Pulling manifests"; reference grammar).
NAME_LIMIT = 255
TAG_LIMIT = 128

_LOWER_ALNUM = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_ALNUM = _LOWER_ALNUM | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_TAG = _ALNUM | frozenset("_.-")
_HEX = frozenset("0123456789abcdef")
_DIGITS = frozenset("0123456789")
_IPV6 = frozenset("0123456789abcdefABCDEF:")
# Hex digits of the registered digest algorithms (image-spec, descriptor.md).
_DIGEST_SIZES = {"sha256": 64, "sha384": 96, "sha512": 128}


class BadReference(KrunError):
    """The text is no image reference."""


class Reference(Record):
    """One image: `host` with port, `path` of the repository, `tag` or "", `digest` or ""."""

    host: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Host and path, without tag and digest."""
        return f"{self.host}/{self.path}"

    @property
    def tagged(self) -> str:
        """The name that a store lists for the tag, "" without one."""
        return f"{self.host}/{self.path}:{self.tag}" if self.tag else ""

    @property
    def digested(self) -> str:
        """The name by digest, "" without one."""
        return f"{self.host}/{self.path}@{self.digest}" if self.digest else ""

    @property
    def pullable(self) -> str:
        """What to ask a store for: the digest decides where there is one."""
        return self.digested or self.tagged

    @property
    def mutable(self) -> bool:
        """True if what it names is expected to change: `latest` without a digest."""
        return not self.digest and self.tag == DEFAULT_TAG

    def __str__(self) -> str:
        text = f"{self.host}/{self.path}"
        if self.tag:
            text += f":{self.tag}"
        return f"{text}@{self.digest}" if self.digest else text


def _bad(text: str, why: str) -> BadReference:
    return BadReference(
        f"image reference {text[:300]!r}: {why}", "the form is [HOST[:PORT]/]PATH[:TAG][@DIGEST]"
    )


def digest_fault(digest: str) -> str:
    """Return what is wrong with a digest, "" if nothing is."""
    algorithm, colon, value = digest.partition(":")
    if not colon or not algorithm:
        return "a digest is ALGORITHM:HEX"
    size = _DIGEST_SIZES.get(algorithm)
    if size is None:
        return f"digest algorithm {algorithm!r} is not one of sha256, sha384, sha512"
    if len(value) != size or not _HEX.issuperset(value):
        return f"a {algorithm} digest has {size} lower-case hex digits"
    return ""


def _component_fault(component: str) -> str:
    """Return why component is no path component: [a-z0-9]+ joined by ".", "_", "__" or "-"+."""
    if not component:
        return "an empty path component"
    if _LOWER_ALNUM.issuperset(component):
        return ""
    separator = ""
    for character in component + "\0":
        if character in _LOWER_ALNUM:
            if separator and separator not in (".", "_", "__") and separator.strip("-"):
                return f"{separator!r} does not separate words of a path"
            separator = ""
        elif character == "\0":
            if separator:
                return f"path component {component!r} ends in {separator!r}"
        elif character in "._-":
            if not separator and component[0] == character and component.startswith(character):
                return f"path component {component!r} starts with {character!r}"
            separator += character
        elif "A" <= character <= "Z":
            return "a repository path is lower-case"
        else:
            return f"{character!r} is not allowed in a path"
    return ""


def _host_fault(host: str) -> str:
    """Return why host is no HOST[:PORT]."""
    if host.startswith("["):
        address, bracket, rest = host[1:].partition("]")
        if not bracket or not address or not _IPV6.issuperset(address):
            return f"host {host!r} is no IPv6 address in brackets"
        colon, port = rest[:1], rest[1:]
        if colon not in ("", ":"):
            return f"host {host!r} has text after its bracket"
    else:
        name, colon, port = host.partition(":")
        for label in name.split("."):
            if not label or not (_ALNUM | {"-"}).issuperset(label) or "-" in (label[0], label[-1]):
                return f"host {name!r} is no domain name or IPv4 address"
    if colon and (not port or not _DIGITS.issuperset(port) or int(port) > 65535):
        return f"port {port!r} is no number up to 65535"
    return ""


def parse(text: str) -> Reference:
    """Read a reference as people write it; `nginx` is docker.io/library/nginx:latest.

    Raises BadReference that says which part is wrong.
    """
    if "://" in text:
        raise _bad(text, "it begins with a scheme, which no reference has")
    rest, at, digest = text.partition("@")
    if at:
        fault = digest_fault(digest)
        if fault:
            raise _bad(text, fault)
    slash = rest.rfind("/")
    colon = rest.find(":", slash + 1)
    tag = ""
    if colon >= 0:
        rest, tag = rest[:colon], rest[colon + 1 :]
        if not tag:
            raise _bad(text, "the tag after ':' is empty")
        if len(tag) > TAG_LIMIT:
            raise _bad(text, f"the tag is longer than {TAG_LIMIT} characters")
        if not _TAG.issuperset(tag) or tag[0] in ".-":
            raise _bad(text, f"{tag!r} is no tag ([A-Za-z0-9_][A-Za-z0-9_.-]*)")
    if not rest:
        raise _bad(text, "it is empty" if not text else "there is no repository name")
    first, slash_found, path = rest.partition("/")
    # docker's rule for telling a host from the first part of a path (distribution/reference).
    named_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    if slash_found and named_host:
        host = first
        fault = _host_fault(host)
        if fault:
            raise _bad(text, fault)
        if host == "index.docker.io":
            host = DEFAULT_HOST
    else:
        host, path = DEFAULT_HOST, rest
    if len(host) + 1 + len(path) > NAME_LIMIT:
        raise _bad(text, f"the name is longer than {NAME_LIMIT} characters")
    for component in path.split("/"):
        fault = _component_fault(component)
        if fault:
            raise _bad(text, fault)
    if len(path) == 64 and not slash_found and _HEX.issuperset(path):
        raise _bad(text, "64 hex digits are an image id, not a name")
    if host == DEFAULT_HOST and "/" not in path:
        path = f"library/{path}"
    if not tag and not digest:
        tag = DEFAULT_TAG
    return Reference(host, path, tag, digest)


def familiar(reference: Reference) -> str:
    """Return the short form that people read: without docker.io/library and :latest."""
    text = str(reference)
    for prefix in ("docker.io/library/", "docker.io/"):
        if text.startswith(prefix):
            return text[len(prefix) :]
    return text
