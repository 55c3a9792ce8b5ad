"""Act on a plan inside the new namespaces, while the host's tree is still the process's root.

The container's root is a descriptor; every path below it goes through krun.linux.path.
"""
