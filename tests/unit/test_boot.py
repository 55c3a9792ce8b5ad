"""What stands for the module os in the installed krun is as good as os, and becomes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BOOT = Path(__file__).parents[2] / "krun" / "install" / "boot.py"
BEGIN = "import sys\nexec(sys.argv[1])\nstand_in()\n"


def run(program: str, *argv: str) -> Any:
    """Run a program in an interpreter that has just been started; return what it prints."""
    words = [sys.executable, "-I", "-S", "-c", BEGIN + program, BOOT.read_text(), *argv]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_plain_use_does_not_load_os() -> None:
    names = run(
        "import os\n"
        "os.close(os.open('/', os.O_RDONLY)), os.getpid(), os.path.exists(os.fsdecode(b'/'))\n"
        "import os.path\n"
        "names = [n for n in ('os', '_collections_abc') if n in sys.modules and\n"
        "         sys.modules[n].__class__ is type(sys)]\n"
        "import json; print(json.dumps(names))"
    )
    assert names == []


def test_every_name_of_os_is_there() -> None:
    wanted = [name for name in dir(os) if not name.startswith("__")]
    missing = run(
        "import os\n"
        "missing = [name for name in sys.argv[2:] if not hasattr(os, name)]\n"
        "import json; print(json.dumps(missing))",
        *wanted,
    )
    assert missing == []


def test_asking_for_more_brings_the_real_module() -> None:
    found = run(
        "import os as early\n"
        "from os import PathLike, environ\n"
        "import os, os.path\n"
        "import json; print(json.dumps([\n"
        "    os.__class__ is type(sys), early is os, early.environ is os.environ,\n"
        "    early.PathLike is PathLike, os.path is early.path, type(environ).__name__]))"
    )
    assert found == [True, False, True, True, True, "_Environ"]


def test_a_name_that_os_lacks_is_an_attribute_error() -> None:
    assert run("import os, json; print(json.dumps(hasattr(os, 'nonesuch')))") is False


def test_file_names_are_coded_as_os_does() -> None:
    names = ["/a", "é", "\udcff"]
    found = run(
        "import os, json\n"
        "names = json.loads(sys.argv[2])\n"
        "print(json.dumps([[os.fsencode(n).hex(), os.fsdecode(os.fsencode(n))] for n in names]))",
        json.dumps(names),
    )
    assert found == [[os.fsencode(name).hex(), name] for name in names]
