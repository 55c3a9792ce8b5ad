"""This node's name and labels: from a file, or from Kubernetes' node object."""

from __future__ import annotations

import platform
from typing import Any

from krun.errors import KrunError
from krun.images import documents
from krun.images.files import read
from krun.images.settings import Settings, node_name
from krun.record import Record

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Node(Record):
    """One node: its name, as in ImageWarm's nodeName, and its labels."""

    name: str
    labels: dict[str, str]


def _well_known(name: str) -> dict[str, str]:
    """Return the labels that every kubelet sets (kubernetes.io/docs/reference/labels…)."""
    machine = platform.machine()
    return {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": _ARCHITECTURES.get(machine, machine),
    }


def _labels(value: Any, origin: str) -> dict[str, str]:
    if isinstance(value, dict) and value.get("kind") == "Node":
        metadata = value.get("metadata")
        value = metadata.get("labels") or {} if isinstance(metadata, dict) else None
    if not isinstance(value, dict):
        raise KrunError(f"{origin}: is neither a mapping of labels nor a Node object")
    for label, text in value.items():
        if not isinstance(label, str) or not isinstance(text, str):
            raise KrunError(f"{origin}: {label}: must be a string", "put quotes around it")
    return dict(value)


def from_file(path: str) -> dict[str, str]:
    """Read labels: LABEL=VALUE lines, or YAML or JSON of a mapping or of a Node object."""
    data = read(path, "labels of this node", "see labels_file and --labels")
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if lines and all("=" in line and ": " not in line for line in lines):
        return dict(line.split("=", 1) for line in lines)
    found = documents.parse(data, path)
    return _labels(found[0], path) if found else {}


def from_kubernetes(kubeconfig: str, name: str) -> dict[str, str]:
    """Ask Kubernetes for the node's labels, with the given kubeconfig."""
    from krun.images import kubernetes

    return _labels(kubernetes.node_object(kubeconfig, name), f"node {name}")


def load(settings: Settings) -> Node:
    """Return this node."""
    name = node_name(settings)
    labels = _well_known(name)
    if settings.kubeconfig:
        labels.update(from_kubernetes(settings.kubeconfig, name))
    if settings.labels_file:
        labels.update(from_file(settings.labels_file))
    return Node(name, labels)
