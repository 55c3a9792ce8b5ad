"""Putting krun on a machine: the library's copy, the launcher, and what podman and others read."""
