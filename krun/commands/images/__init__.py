"""The verbs of `krun images`, one a module."""
