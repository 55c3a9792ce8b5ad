"""The places where images live on a node: podman, docker and containerd, behind one interface."""
