"""begin(archive): what the launcher's interpreter runs first; modules come out of one file.

The file holds this module's code, then [library, packages, {name: (code, is a package, path)}],
each written by marshal.  One read replaces three look-ups in directories and an open for each of
the two dozen modules of a verb: 1.4 ms of 5 on two cores.
"""

from __future__ import annotations

import marshal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Module = tuple[bytes, bool, str]


class Archive:
    """Finder and loader of the modules of one file (importlib's MetaPathFinder and Loader)."""

    def __init__(self, modules: dict[str, Module]) -> None:
        self.modules = modules
        # importlib.machinery is an import of its own; the type is at hand.
        self.spec: Any = type(sys.__spec__)

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Return the spec of a module that the file holds."""
        found = self.modules.get(name)
        if found is None:
            return None
        _, package, origin = found
        spec = self.spec(name, self, origin=origin, is_package=package)
        spec.has_location = True
        if package:
            spec.submodule_search_locations.append(origin.rpartition("/")[0])
        return spec

    def create_module(self, spec: object) -> None:
        """Leave the making of the module to the interpreter."""

    def exec_module(self, module: Any) -> None:
        """Run the module's code."""
        exec(marshal.loads(self.modules[module.__name__][0]), module.__dict__)  # noqa: S102


def begin(archive: Any) -> None:
    """Read the rest of the archive and run krun's command line; does not return."""
    library, packages, modules = marshal.load(archive)
    archive.close()
    sys.path.insert(0, library)
    sys.path += packages
    sys.meta_path.insert(0, Archive(modules))
    from krun.__main__ import console

    console()
