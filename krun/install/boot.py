"""begin(archive): what the launcher's interpreter runs first; modules come out of few files.

The archive holds this module's code, then [library, packages, modules, {name: file}], each
written by marshal; modules are {name: (code, is a package, path)}.  It has the modules of the
verbs that clients call; those of the native engine, the network and the built-in monitor are in
files of their own, read when the first of them is imported.  One read replaces three look-ups in
directories and an open for each module: 1.4 ms of 5 on two cores.  A file that ends in .so is one
of the interpreter's shared objects, named so that the standard library's directories need not be
listed to find it: 0.1 ms.
"""

from __future__ import annotations

import gc
import marshal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Module = tuple[bytes, bool, str]


class Archive:
    """Finder and loader of the modules of the files (importlib's MetaPathFinder and Loader)."""

    def __init__(self, modules: dict[str, Module], files: dict[str, str]) -> None:
        self.modules = modules
        self.files = files
        # importlib.machinery is an import of its own; the type is at hand.
        self.spec: Any = type(sys.__spec__)

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Return the spec of a module that is in one of the files."""
        found = self.modules.get(name)
        if found is None:
            file = self.files.get(name)
            if file is None:
                return None
            if file.endswith(".so"):
                return self.extension(name, file)
            with open(file, "rb") as archive:
                self.modules.update(marshal.loads(archive.read()))
            found = self.modules[name]
        _, package, origin = found
        spec = self.spec(name, self, origin=origin, is_package=package)
        spec.has_location = True
        if package:
            spec.submodule_search_locations.append(origin.rpartition("/")[0])
        return spec

    def extension(self, name: str, file: str) -> Any:
        """Return the spec of a shared object; None, for the usual search, where it is gone."""
        from _frozen_importlib_external import ExtensionFileLoader
        from posix import access

        if not access(file, 4):
            return None
        spec = self.spec(name, ExtensionFileLoader(name, file), origin=file)
        spec.has_location = True
        return spec

    def create_module(self, spec: object) -> None:
        """Leave the making of the module to the interpreter."""

    def exec_module(self, module: Any) -> None:
        """Run the module's code."""
        exec(marshal.loads(self.modules[module.__name__][0]), module.__dict__)  # noqa: S102


def begin(archive: Any) -> None:
    """Read the rest of the archive and run krun's command line; does not return."""
    library, packages, modules, files = marshal.loads(archive.read())
    archive.close()
    # Modules make objects that stay: collecting them time and again costs 0.6 ms.
    gc.set_threshold(20_000)
    # After the standard library, which is asked for more often.
    sys.path += [library, *packages]
    sys.meta_path.insert(0, Archive(modules, files))
    from krun.__main__ import console

    console()
