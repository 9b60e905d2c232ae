"""The exercises' checkers, one file for each notebook: `checks.ex05_1(attempt)` is in `ex05.py`."""

import importlib


def __getattr__(name: str):
    """The checker `exNN_K`, or the whole file `exNN`, imported when it is first asked for."""
    if name[:2] == "ex" and name[2:4].isdigit():
        module = importlib.import_module(f"{__name__}.{name[:4]}")
        return module if name == module.__name__[-4:] else getattr(module, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
