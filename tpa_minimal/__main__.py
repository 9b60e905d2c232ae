"""The one command line: `python -m tpa_minimal COMMAND`, or `tpa-minimal COMMAND`; COMMAND --help lists its options."""

import importlib
import io
import os
import sys

from tpa_minimal.experiments.options import finish, silence

PROG = "python -m tpa_minimal"
# COMMAND: "module:function", imported when it is asked for; the function takes the arguments and returns a status.
COMMANDS = {
    "train": "tpa_minimal.experiments.train:main",
    "generate": "tpa_minimal.experiments.generate:main",
    "bench": "tpa_minimal.experiments.bench:main",
    "grade": "tpa_minimal.course.grade:main",
    "handout": "tpa_minimal.course.handout:main",
    "evaluate": "tpa_minimal.experiments.evaluate:main",
    "compare": "tpa_minimal.experiments.compare:main",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for a command that does not exist."""
    status = 0
    try:
        try:
            status = _run(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has what they wanted
        silence()
    except OSError as error:  # of printing, or of a path at which no command has looked
        silence()
        return finish(PROG, 1, str(error))
    except KeyboardInterrupt:
        return finish(PROG, 130, "interrupted")
    return status


def _run(arguments: list[str]) -> int:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed or not _writable(stream):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    usage = f"{PROG} COMMAND ...: choose one of {', '.join(COMMANDS)}; COMMAND --help lists its options"
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        named = f"{arguments[0]}: there is no such command; " if arguments else ""
        return finish(PROG, 2, f"{named}{usage}")
    module, _, function = COMMANDS[arguments[0]].partition(":")
    return getattr(importlib.import_module(module), function)(arguments[1:])


def _writable(stream) -> bool:
    try:
        os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed by whoever started us; streams of a notebook have no number and are fine
        return type(stream) is not io.TextIOWrapper
    return True


if __name__ == "__main__":
    sys.exit(main())
