"""Image references are read exactly; `foo:1` is never `foo:1.2`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krun.images.references import BadReference, Reference, familiar, parse

SHA = "sha256:" + "0123456789abcdef" * 4

GOOD = {
    "nginx": Reference("docker.io", "library/nginx", "latest"),
    "nginx:1.23": Reference("docker.io", "library/nginx", "1.23"),
    "user/app": Reference("docker.io", "user/app", "latest"),
    "docker.io/nginx": Reference("docker.io", "library/nginx", "latest"),
    "index.docker.io/library/nginx:1": Reference("docker.io", "library/nginx", "1"),
    "localhost/x": Reference("localhost", "x", "latest"),
    "localhost:5000/x:y": Reference("localhost:5000", "x", "y"),
    "127.0.0.1:5000/a/b__c/d--e.f:V_1.0-x": Reference("127.0.0.1:5000", "a/b__c/d--e.f", "V_1.0-x"),
    "[::1]:5000/x": Reference("[::1]:5000", "x", "latest"),
    "Host/x": Reference("Host", "x", "latest"),
    f"gcr.io/a/b@{SHA}": Reference("gcr.io", "a/b", "", SHA),
    f"gcr.io/a/b:t@{SHA}": Reference("gcr.io", "a/b", "t", SHA),
    "us.gcr.io/k8s-artifacts-prod/etcd:3.5.4-0": Reference(
        "us.gcr.io", "k8s-artifacts-prod/etcd", "3.5.4-0"
    ),
}

BAD = {
    "": "empty",
    ":tag": "no repository name",
    "a:": "tag after ':' is empty",
    "a:-b": "is no tag",
    "a:.b": "is no tag",
    "a:" + "x" * 129: "longer than 128",
    "A": "lower-case",
    "a/B": "lower-case",
    "-a": "starts with '-'",
    "a-": "ends in '-'",
    "a/": "empty path component",
    "/a": "empty path component",
    "a//b": "empty path component",
    "a..b": "does not separate",
    "a___b": "does not separate",
    "a._b": "does not separate",
    "a b": "' ' is not allowed",
    "a;rm -rf /": "not allowed",
    "$(id)": "not allowed",
    "a\n": "'\\n' is not allowed",
    "ä": "not allowed",
    "http://x/y": "begins with a scheme",
    "https://gcr.io/y:1": "begins with a scheme",
    "h.io:99999/x": "port '99999'",
    "-h.io/x": "is no domain name",
    "[::1/x": "IPv6",
    "a@sha256:12": "64 lower-case hex",
    "a@md5:" + "0" * 32: "not one of",
    "a@": "ALGORITHM:HEX",
    f"a@{SHA.upper()}": "not one of",
    "0123456789abcdef" * 4: "image id",
    "h.io/" + "a" * 255: "longer than 255",
}


@pytest.mark.parametrize("text", GOOD)
def test_good(text: str) -> None:
    assert parse(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_bad_names_the_part(text: str) -> None:
    with pytest.raises(BadReference) as caught:
        parse(text)
    assert BAD[text] in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_tag_is_compared_whole() -> None:
    assert parse("foo:1") != parse("foo:1.2")
    assert parse("foo:1").tagged == "docker.io/library/foo:1"


def test_the_digest_decides_what_is_pulled() -> None:
    reference = parse(f"gcr.io/a:t@{SHA}")
    assert reference.pullable == f"gcr.io/a@{SHA}"
    assert not reference.mutable
    assert parse("a").mutable


_WORD = st.text("abcz019", min_size=1, max_size=5)
_PATH = st.lists(st.lists(_WORD, min_size=1, max_size=3).map("_".join), min_size=1, max_size=3).map(
    "/".join
)
_HOST = st.sampled_from(
    ["", "gcr.io/", "localhost/", "10.0.0.1:5000/", "[fe80::1]:1/", "a-b.c:80/"]
)
_TAG = st.sampled_from(["", ":1", ":v1.2-x_Y", ":latest"])


@given(_HOST, _PATH, _TAG, st.sampled_from(["", "@" + SHA]))
def test_the_whole_form_reads_back(host: str, path: str, tag: str, digest: str) -> None:
    reference = parse(host + path + tag + digest)
    assert parse(str(reference)) == reference
    assert parse(familiar(reference)) == reference


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        reference = parse(text)
    except BadReference:
        return
    assert parse(str(reference)) == reference
