"""The one command line: commands are imported when they are asked for; whatever is wrong is one line and status 2."""

import importlib
import os
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


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "grade", "handout", "compare table --out"])
def test_an_error_is_one_line_whatever_the_value_holds(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = ["--preset"] if command == "train" else []
    value = f"{tmp_path}/no\nsuch\x1b$\udce9"
    (tmp_path / "no\nsuch\x1b$\udce9").touch()
    assert command_line.main([*command.split(), *option, value]) in (1, 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.isascii() and "\\n" in err and "\x1b" not in err and "Traceback" not in err


RUN = "import sys; from tpa_minimal.__main__ import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_is_full_is_one_line_and_status_1():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", RUN, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr


def test_a_reader_that_leaves_early_ends_no_command(tmp_path):
    options = "train --data lessons --tokens 20000 --steps 1 --batch-size 2 --seq-len 8 --set n_layer=1 --device cpu"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", RUN, *options.split(), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "Broken pipe" not in done.stderr and (tmp_path / "run/loss.png").exists()


def test_ctrl_c_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert command_line.main(["train"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_letters_that_the_terminal_lacks_are_no_error():
    code = "from tpa_minimal import __main__ as m; m._run(['--help']); print('\u00b1')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("\\xb1\n")


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import os; os.close(1); from tpa_minimal.__main__ import main; raise SystemExit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
