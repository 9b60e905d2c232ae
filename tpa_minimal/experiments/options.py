"""The command line of every command: options from a dataclass, by tyro; an error is one line and a status."""

import contextlib
import io
import os
import sys


def parse(kind, arguments: list[str] | None, prog: str, **how):
    """The settings, an instance of the dataclass `kind`, that the command line `arguments` describes.

    Help is printed as ever. Raises SystemExit with status 2, after one line, for options that do not parse.
    """
    import tyro  # here, so that `--help` of all commands stays light

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=prog, **how)
    except SystemExit as end:
        if end.code:
            lines = [line.strip("│╭╮╰╯ ") for line in said.getvalue().splitlines()][1:]
            first = next((i for i, line in enumerate(lines) if not line or set(line) == {"─"}), len(lines))
            finish(prog, 2, f"{' '.join(lines[:first])}; see --help")
        raise


def say(line: str) -> None:
    """Print a line at once. A terminal that lacks its letters, or output that is closed or full, is no error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(line, flush=True)
    except OSError as error:
        silence()
        if not isinstance(error, BrokenPipeError):  # then whoever read the output has seen enough
            finish("output", 0, f"{error}; nothing more is printed, the work goes on")
    except ValueError:  # closed
        pass


def silence() -> None:
    """Have what is printed from now on, and what could not be printed, go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def finish(prog: str | None, status: int, line: str) -> int:
    """Say on stderr, in one printable line, how the command `prog` ended, unless that is None; returns `status`."""
    if prog:
        line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
        with contextlib.suppress(OSError, ValueError):
            print(f"{prog}: {line}", file=sys.stderr)
    return status
