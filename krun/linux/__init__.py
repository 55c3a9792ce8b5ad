"""Thin wrappers that carry the kernel's names and raise OSError with the path."""
