"""begin(…): what the launcher's interpreter runs first; modules come out of few files.

The archive is one tuple written by marshal: this module's code, then begin's arguments.  Modules
are {name: (code, is a package, path)}.  It has the modules that every hot verb needs; those that
only some need are in files of their own, read whole when the first of them is imported.  One read
replaces three look-ups in directories and an open for each module: 1.4 ms of 5 on two cores.  A
file that ends in .so is one of the interpreter's shared objects, named so that the standard
library's directories need not be listed to find it: 0.1 ms.
"""

from __future__ import annotations

import gc
import marshal
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Module = tuple[bytes, bool, str]


# Bytes; no part comes near.
LARGEST = 1 << 20


def contents(file: str) -> Any:
    """Return what marshal wrote to a file, without the objects that open() makes."""
    fd = posix.open(file, posix.O_RDONLY | posix.O_CLOEXEC)
    data = posix.read(fd, LARGEST)
    posix.close(fd)
    return marshal.loads(data)


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
            self.modules.update(contents(file))
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

        if not posix.access(file, posix.R_OK):
            return None
        spec = self.spec(name, ExtensionFileLoader(name, file), origin=file)
        spec.has_location = True
        return spec

    def create_module(self, spec: object) -> None:
        """Leave the making of the module to the interpreter."""

    def exec_module(self, module: Any) -> None:
        """Run the module's code."""
        exec(marshal.loads(self.modules[module.__name__][0]), module.__dict__)  # noqa: S102


class Os(type(sys)):  # type: ignore[misc]
    """Stands for the module os until more than posix, paths and file names is asked of it.

    `import os` takes 0.7 ms, most of it for the abstract classes that os.environ is made from.
    """

    @staticmethod
    def fsencode(name: Any) -> bytes:
        """os.fsencode."""
        name = posix.fspath(name)
        return name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name

    @staticmethod
    def fsdecode(name: Any) -> str:
        """os.fsdecode."""
        name = posix.fspath(name)
        return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name

    def __getattr__(self, name: str) -> Any:
        """Become the real module: whoever holds this one has all of it from now on."""
        if sys.modules.get("os") is self:
            del sys.modules["os"]
        import os

        self.__dict__.update(os.__dict__)
        return getattr(os, name)


def stand_in() -> None:
    """Put Os in place of the module that nobody has imported yet."""
    if "os" in sys.modules or sys.getfilesystemencoding() != "utf-8":
        return
    module = sys.modules["os"] = Os("os")
    names = posix.__dict__.items()
    module.__dict__.update((name, value) for name, value in names if name[:2] != "__")
    # os makes it a mapping of strings.
    del module.__dict__["environ"]
    import posixpath

    module.path = sys.modules["os.path"] = posixpath


def ready(
    library: str, packages: list[str], modules: dict[str, Module], files: dict[str, str]
) -> None:
    """Make krun's modules importable."""
    # Modules make objects that stay: collecting them time and again costs 0.6 ms.
    gc.set_threshold(20_000)
    stand_in()
    # After the standard library, which is asked for more often.
    sys.path += [library, *packages]
    sys.meta_path.insert(0, Archive(modules, files))


def begin(
    library: str, packages: list[str], modules: dict[str, Module], files: dict[str, str]
) -> None:
    """Run krun's command line; does not return."""
    ready(library, packages, modules, files)
    from krun.__main__ import console

    console()
