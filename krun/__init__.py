"""krun: an OCI runtime front end that runs every payload in its own virtual machine."""

__version__ = "0.1.0"
