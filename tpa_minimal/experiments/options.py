"""The command line of every command: options from a dataclass, by tyro; an error is one line and a status."""

import contextlib
import io
import sys

import tyro


def parse(kind, arguments: list[str] | None, prog: str, **how):
    """The settings, an instance of the dataclass `kind`, that the command line `arguments` describes.

    Help is printed as ever. Raises SystemExit with status 2, after one line, for options that do not parse.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=prog, **how)
    except SystemExit as end:
        if end.code:
            lines = [line.strip("│╭╮╰╯ ") for line in said.getvalue().splitlines()][1:]
            first = next((i for i, line in enumerate(lines) if not line or set(line) == {"─"}), len(lines))
            print(f"{prog}: {' '.join(lines[:first])}; see --help", file=sys.stderr)
        raise


def say(line: str) -> None:
    """Print a line at once, unless whoever read the output has seen enough, or closed it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold letters that the terminal lacks
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(line, flush=True)


def finish(prog: str | None, status: int, line: str) -> int:
    """Say on stderr how the command `prog` ended, unless that is None; returns the exit status."""
    if prog:
        if hasattr(sys.stderr, "reconfigure"):
            sys.stderr.reconfigure(errors="replace")
        with contextlib.suppress(OSError, ValueError):
            print(f"{prog}: {line}", file=sys.stderr)
    return status
