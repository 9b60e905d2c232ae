"""The one command line: commands are imported when they are asked for; whatever is wrong is one line and status 2."""

import importlib
import subprocess
import sys

import pytest

from tpa_minimal import __main__ as command_line


def test_help_lists_the_commands(capsys):
    assert command_line.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in command_line.COMMANDS) and {"train", "evaluate"} <= command_line.COMMANDS.keys()


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--version"]])
def test_what_is_no_command_is_named(arguments, capsys):
    assert command_line.main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "choose one of train" in err and "".join(arguments) in err


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_each_command_is_there_and_has_help(name, capsys):
    module, _, function = command_line.COMMANDS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    with pytest.raises(SystemExit) as end:
        command_line.main([name, "--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["train --steps x", "train --no-such y", "bench decode --repeats z"])
def test_options_that_do_not_parse_are_one_line(options, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.main(options.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and options.split()[-1] in err


def test_nothing_heavy_is_loaded_for_help():
    code = "import sys; from tpa_minimal.__main__ import main; main(['--help']); print('tyro' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False\n")


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import os; os.close(1); from tpa_minimal.__main__ import main; raise SystemExit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
