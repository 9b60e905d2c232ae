"""The one command line: `python -m tpa_minimal COMMAND`, or `tpa-minimal COMMAND`; COMMAND --help lists its options."""

import importlib
import io
import os
import sys

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
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except BrokenPipeError:  # whoever read the output has what they wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _run(arguments: list[str]) -> int:
    if sys.stdout is None or sys.stdout.closed or not _writable(sys.stdout):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for the rest of the process
    usage = f"python -m tpa_minimal COMMAND ...: choose one of {', '.join(COMMANDS)}; COMMAND --help lists its options"
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        named = f"{arguments[0]}: there is no such command; " if arguments else ""
        print(f"{named}{usage}", file=sys.stderr)
        return 2
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
