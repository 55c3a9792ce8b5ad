"""main(argv) -> int: read the line, run the verb; the only map from exception to exit code."""

from __future__ import annotations

import _signal
import os
import sys

from krun import log, reader
from krun.errors import CannotExecute, ExecFailed, KrunError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.grammar import Call

# What a shell reports for a process that SIGINT and SIGPIPE ended (signal(7), bash(1)).
INTERRUPTED = 128 + 2
BROKEN_PIPE = 128 + 13
EXEC_FAILED = 255


def run(call: Call) -> int:
    """Run one verb and return its exit status."""
    module = __import__(call.command.implementation, fromlist=["run"])
    status: int = module.run(call)
    return status


def guarded(call: Call) -> int:
    """Run a verb; whatever goes wrong becomes one line and an exit status."""
    # The other statuses of exec are the process's, as with runc.
    failed = EXEC_FAILED if call.verb == "exec" else KrunError.exit_code
    try:
        if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
            # The launcher left it at that (krun.install.launcher.python_words).
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        status = run(call)
        log.flush()
        return status
    except KrunError as error:
        # In the container's output, as with runc, nobody but the payload speaks.
        own = call.verb == "run" and isinstance(error, ExecFailed)
        log.error(str(error), "" if own else log.NAME)
        if isinstance(error, UsageError):
            return error.exit_code
        # Only run and monitor end with the payload's status, of which 126 and 127 are two.
        if isinstance(error, CannotExecute) and call.verb in ("run", "monitor"):
            return error.exit_code
        return failed
    except ModuleNotFoundError as error:
        # Not by name: the package index has another krun.
        extra = "'.[images]'" if call.verb.startswith("images") else "."
        log.error(
            f"krun {call.verb} needs the Python package {error.name}, which is not installed "
            f"(pip install {extra} in krun's checkout, or of its wheel)"
        )
        return 1
    except ImportError as error:
        # A file of krun's own could not be read: a damaged copy, or no descriptor was free.
        log.error(f"krun {call.verb} could not be loaded: {error} (krun install writes it anew)")
        return 1
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        log.error(f"{where}{error.strerror or error}")
        return failed
    except KeyboardInterrupt:
        return INTERRUPTED
    except RecursionError:
        log.error("the input is nested too deeply")
        return 1
    except MemoryError:
        log.error("out of memory")
        return 1
    except Exception as error:
        # A defect; its user gets one line all the same.
        if call.settings.debug:
            raise
        log.error(
            f"{type(error).__name__}: {error} (a defect of krun's: please report it with the "
            "traceback that --debug prints)"
        )
        return 1


def _explain(argv: list[str]) -> Call | int:
    if argv in (["--version"], ["-v"], ["-V"]):
        from krun import version

        sys.stdout.write(version.text() + "\n")
        return 0
    from krun import help

    return help.read(argv)


def explained(argv: list[str]) -> Call | int:
    """Read a line with click: a Call, or the exit status of the help or error it printed."""
    try:
        return _explain(argv)
    except ModuleNotFoundError as error:
        log.error(f"this command line needs help to be read, and {error.name} is not installed")
        return UsageError.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        log.error(f"standard output: {error.strerror}")
        return 1


def main(argv: list[str]) -> int:
    """Run krun with the arguments argv (without the program's name)."""
    try:
        call = reader.parse(argv)
    except reader.Unrecognised:
        answer = explained(argv)
        if isinstance(answer, int):
            return answer
        call = answer
    settings = call.settings
    try:
        log.configure(settings.log, settings.log_format, settings.log_level, settings.debug)
    except KrunError as error:
        log.error(str(error))
        return error.exit_code
    return guarded(call)


def fill_standard_descriptors() -> None:
    """Put the null device where 0, 1 or 2 is closed, as Go's runtime does for runc.

    What krun opens next would become one of them, and the payload's.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open("/dev/null", os.O_RDWR)
            if null != descriptor:
                os.close(null)
                continue
            os.set_inheritable(null, True)
            setattr(sys, name, open(descriptor, mode, closefd=False))


def console() -> None:
    """Entry point: end the process without the interpreter's slow teardown."""
    fill_standard_descriptors()
    status = main(sys.argv[1:])
    try:
        log.flush()
    except OSError as error:
        # Of a failure the line is there; the interpreter would add a traceback.
        if status == 0:
            log.error(f"{error.filename}: {error.strerror}")
            status = 1
    os._exit(status)


if __name__ == "__main__":
    console()
