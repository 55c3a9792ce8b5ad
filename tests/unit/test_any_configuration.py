"""Whatever the specification allows in a configuration ends in a decision or in a KrunError."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from documents import valid_mutants
from hosts import HOST
from hypothesis import HealthCheck, given, settings

from krun import extension, jsontext, spec, survey, translate
from krun.errors import KrunError
from krun.grammar import Settings
from krun.network import reader
from krun.plan.build import build
from krun.policy import Policy

GENERATED = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("image") / "rootfs"
    for name in ("bin", "dev", "proc"):
        (top / name).mkdir(parents=True)
    for name in ("sh", "echo", "app", "sleep"):
        (top / "bin" / name).symlink_to("busybox")
    (top / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (top / "bin/busybox").chmod(0o755)
    return top


@GENERATED
@given(document=valid_mutants(spec.parse))
def test_it_is_translated_or_refused(document: Any, rootfs: Path) -> None:
    document = {**document, "root": {**document["root"], "path": str(rootfs)}}
    before = copy.deepcopy(document)
    try:
        choice = extension.choose(document, Policy(), Settings())
        facts = survey.survey(document, "/", choice, Policy(), [])
        result = translate.translate(document, choice, HOST, facts)
    except KrunError as error:
        assert error.exit_code in (1, 126, 127)
        assert error.message
    else:
        jsontext.dumps(result.spec).encode()
        assert spec.parse(result.spec) is result.spec
    assert document == before


@GENERATED
@given(document=valid_mutants(spec.parse))
def test_it_is_planned_or_refused(document: Any) -> None:
    for version in (1, 2):
        for systemd in (False, True):
            try:
                build(document, "krun-test", "/bundle", version, systemd)
            except KrunError as error:
                assert error.message


@GENERATED
@given(document=valid_mutants(spec.parse))
def test_its_network_is_read_or_refused(document: Any) -> None:
    try:
        reader.of(document)
    except KrunError as error:
        assert error.message
