"""Sphinx extension of `make book`: the repository's address, and docstrings shown as they are typed."""

import re
from textwrap import dedent, indent

from build import repository


def setup(app) -> dict:
    """Called by Sphinx, which _config.yml tells of this file."""
    app.connect("config-inited", lambda app, config: config.html_theme_options.update(repository_url=repository()))
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: as_typed(lines))
    return {"parallel_read_safe": True}


def as_typed(lines: list[str]) -> None:
    """Turn a docstring's lines, in place, into reStructuredText: names as code, examples and columns untouched."""
    blocks = []
    for block in "\n".join(lines).split("\n\n"):
        rows = block.splitlines()
        indented = any(row.startswith("    ") for row in rows)
        columns = len(rows) > 1 and all("  " in row for row in rows)
        if indented or columns:
            blocks.append("::\n\n" + indent(dedent(block), "    "))
        else:
            blocks.append(re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", block))
    lines[:] = [*"\n\n".join(blocks).splitlines(), ""]
