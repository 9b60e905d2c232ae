"""Mark a class: `python -m tpa_minimal grade SUBMISSIONS --out grades.csv`.

Of a submitted notebook only the answers count. The trusted process of a notebook defines what the project's own
notebook defines and calls the package's checkers; it never runs a student's line. Whenever a checker calls the answer,
a child process defines it and makes the call, with limits on time and memory, without a network and without
writing, and what comes back is data, such as numbers and tensors, never code. So a submission can bring about nothing
but its own answers. Python cannot hold back native code that sets out to break it: mark strangers' work on a machine
that holds nothing else.
"""

import ast
import base64
import builtins
import collections
import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from tpa_minimal.course import checks
from tpa_minimal.course.checks.judging import is_stub
from tpa_minimal.experiments.options import finish, parse
from tpa_minimal.files import FileError, read_json, write_whole

PACKAGE = Path(__file__).resolve().parents[1]
COLUMNS = ("student", "notebook", "exercise", "status", "diagnosis", "key")
STATUSES = ("ok", "fail", "todo", "did not run")
CALL = re.compile(r"checks\.(ex\d\d_\d+)\((\w+)\)")
NAME = re.compile(r"(?:(?P<student>.*?)[_\- ]+)??(?P<number>\d\d)_\w")
LARGEST_NOTEBOOK = 2**24  # bytes
LARGEST_CODE = 2**20  # characters of a notebook's code cells
LARGEST_ANSWER = 2**26  # bytes that a child may send back for one call
TO_THE_MARKER = 3  # a child's descriptor
FORBIDDEN = re.compile(
    r"gc\.get_|sys\._current_|subprocess\.|shutil\.|socket\.|ctypes\.|pty\.|signal\.pthread_kill|"
    r"os\.(remove|rename|rmdir|mkdir|truncate|link|symlink|chmod|chown|kill|fork|exec|posix_spawn|spawn|system)"
)


@dataclass(frozen=True)
class Settings:
    """Mark submitted notebooks with trusted checkers, and sum the class up exercise by exercise."""

    submissions: Annotated[Path, tyro.conf.Positional]
    """A folder with one folder for each student, or with files such as ada_05_factor_cache.ipynb."""
    out: Path = Path("grades.csv")
    """The table, one row for each student and exercise; rows of unchanged submissions are kept from run to run."""
    notebooks: Path = PACKAGE.parent / "notebooks"
    """The folder with the project's own notebooks, to which the answers belong."""
    seconds: float = 60.0
    """Time for one exercise of one student."""
    memory_gb: float = 2.0
    """Memory that an answer may take beyond what the notebook's definitions take."""
    jobs: int = os.cpu_count() or 1
    """Notebooks marked at the same time."""


@dataclass(frozen=True)
class Exercise:
    """An exercise of a trusted notebook: its checker, the name it defines, its stub, and the code cells before it."""

    checker: str
    name: str
    stub: str
    before: tuple[str, ...]


class DidNotRun(BaseException):
    """The answer could not be judged; not an Exception, so that no checker takes it for an answer."""


# ---------------------------------------------------------------------------------------------------- notebooks


def code_cells(path: Path) -> list[tuple[bool, str]]:
    """(tagged `exercise`, source) of a notebook's code cells; raises FileError for what is not a notebook."""
    if not stat.S_ISREG(path.lstat().st_mode):  # a link could lead to anybody's answers, a pipe never ends
        raise FileError(f"{path.name}: is not a plain file; hand in the notebook itself")
    notebook = read_json(path, LARGEST_NOTEBOOK)
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise FileError(f"{path.name}: is not a notebook of format 4: it has no list of cells")
    found = []
    for cell in cells:
        source, metadata = cell.get("source"), cell.get("metadata")
        source = source if isinstance(source, list) else [source]
        tags = metadata.get("tags") if isinstance(metadata, dict) else None
        if cell.get("cell_type") == "code" and all(isinstance(line, str) for line in source):
            found.append((isinstance(tags, list) and "exercise" in tags, "".join(source)))
    if sum(len(source) for _, source in found) > LARGEST_CODE:
        raise FileError(f"{path.name}: holds more than {LARGEST_CODE:,} characters of code")
    return found


def exercises(path: Path) -> list[Exercise]:
    """The exercises of a trusted notebook, in order; raises FileError for one without a checker."""
    cells, found = code_cells(path), []
    for i, (tagged, source) in enumerate(cells):
        if not tagged:
            continue
        call = next(filter(None, (CALL.search(text) for _, text in cells[i + 1 :])), None)
        if not call or call[2] not in defined(parsed(source)):
            raise FileError(f"{path}: no checker is called on the exercise that begins {source.splitlines()[0]!r}")
        found.append(Exercise(call[1], call[2], source, tuple(text for tag, text in cells[:i] if not tag)))
    return found


def parsed(source: str) -> list[ast.stmt]:
    """The statements of a cell, leaving out a notebook's `%` and `!` lines; raises SyntaxError."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return ast.parse(re.sub(r"^[ \t]*[%!].*$", "", source, flags=re.MULTILINE)).body


def defined(statements: list[ast.stmt]) -> set[str]:
    return {node.name for node in statements if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def bound(node: ast.stmt) -> set[str]:
    """The names that an import or a definition binds."""
    return defined([node]) or {(alias.asname or alias.name).split(".")[0] for alias in getattr(node, "names", ())}


def defining(source: str, literals: bool) -> list[ast.stmt]:
    """A cell's imports and definitions, and with `literals` its plain constants; nothing that computes."""
    try:
        statements = parsed(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    kept = []
    for node in statements:
        constant = False
        if literals and isinstance(node, ast.Assign):
            with contextlib.suppress(ValueError):
                ast.literal_eval(node.value)
                constant = True
        if constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            kept.append(node)
    return kept


def run(statements: list[ast.stmt], namespace: dict, name: str) -> None:
    exec(compile(ast.Module(statements, []), name, "exec"), namespace)


def answer_of(exercise: Exercise, cells: list[tuple[bool, str]]) -> str:
    """The cell of a submission that holds the answer; raises DidNotRun if there is none."""
    named = re.compile(rf"^(?:def|class)[ \t]+{exercise.name}\b", re.MULTILINE)
    # A tagged cell counts first; tags get lost where a notebook went through another editor.
    for wanted in (True, False):
        found = [source for tagged, source in cells if tagged is wanted and named.search(source)]
        if found:
            return found[-1]
    raise DidNotRun(f"no cell defines `{exercise.name}`: is it a notebook of another release, or was the cell deleted?")


# ------------------------------------------------------------------------------------- data that crosses the pipe


class Foreign:
    """Stands for an object that is no plain data; its class has the name of the object's."""


def encode(value, known: list, depth: int = 0):
    """JSON for a value: numbers, strings, containers, tensors. `known` are tensors that both sides have."""
    if depth > 50:
        raise ValueError("nested too deep")
    if value is None or isinstance(value, (bool, str)) and type(value) in (bool, str):
        return value
    if value is ...:
        return {"kind": "ellipsis"}
    if type(value) in (int, float):
        return {"kind": type(value).__name__, "value": hex(value) if type(value) is int else value.hex()}
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        scalar = not hasattr(value, "__array_finalize__") or getattr(value, "shape", None) == ()
        return {"kind": "numpy", "scalar": scalar, "value": encode(torch.as_tensor(value), [])}
    if isinstance(value, torch.Tensor):
        value = value.detach()
        for i, other in enumerate(known):
            if value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and value.dtype == other.dtype:
                return {"kind": "view", "of": i, "size": list(value.shape), "stride": value.stride(),
                        "offset": value.storage_offset()}  # fmt: skip
        raw = bytes(value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {"kind": "tensor", "dtype": str(value.dtype)[6:], "size": list(value.shape),
                "value": base64.b64encode(raw).decode()}  # fmt: skip
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = next(k for k in ("list", "tuple", "set", "frozenset") if isinstance(value, getattr(builtins, k)))
        return {"kind": kind, "value": [encode(part, known, depth + 1) for part in value]}
    if isinstance(value, dict):
        pairs = [[encode(part, known, depth + 1) for part in pair] for pair in value.items()]
        return {"kind": "dict", "value": pairs}
    return {"kind": "foreign", "value": type(value).__name__[:40]}


def can_be_sent(value) -> bool:
    """Whether `decode(encode(value))` is the same value of the same type, with tensors of the same memory layout."""
    if type(value) in (list, tuple, set, frozenset):
        return all(map(can_be_sent, value))
    if type(value) is dict:
        return all(map(can_be_sent, (*value, *value.values())))
    if type(value) is torch.Tensor:
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return whole and value.is_contiguous() and not value.requires_grad
    return value is None or value is ... or type(value) in (bool, str, int, float)


def decode(value, known: list):
    """The value that `encode` wrote; raises an Exception of any kind for what it cannot have written."""
    if not isinstance(value, dict):
        return value
    kind, held = value["kind"], value.get("value")
    if kind == "ellipsis":
        return ...
    if kind in ("int", "float"):
        return int(held, 16) if kind == "int" else float.fromhex(held)
    if kind == "numpy":
        array = decode(held, []).numpy()
        return array[()] if value["scalar"] else array
    if kind == "view":
        return known[value["of"]].detach().as_strided(value["size"], value["stride"], value["offset"])
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"])
        raw = bytearray(base64.b64decode(held))
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(value["size"])
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decode(part, known) for part in held)
    if kind == "dict":
        return {decode(key, known): decode(part, known) for key, part in held}
    return type(str(held)[:40], (Foreign,), {})()


def tensors_in(arguments) -> list[torch.Tensor]:
    """The tensors among some arguments and inside their lists, tuples and dicts, always in the same order."""
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (list, tuple)):
        return []
    return [found for part in arguments for found in tensors_in(part)]


# --------------------------------------------------------------------------------------------------- the child


def confine(memory: int, seconds: float) -> None:
    """Take from this process what an answer does not need: files to write, processes, network, much memory."""
    import resource  # Windows has none, and everything else of this file can be imported there

    def watch(event, arguments):
        writes = (
            event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & ~(os.O_CLOEXEC | 0o100000)
        )
        if writes or FORBIDDEN.match(event):
            raise PermissionError(f"an answer may not do this: {event}")

    with contextlib.suppress(OSError, ValueError):  # no such file, or no such limit on this system
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)


class Child:
    """A confined process that does `work`; its descriptor TO_THE_MARKER is one end of a socket, `socket` the other."""

    def __init__(self, work, settings: Settings):
        self.socket, theirs = socket.socketpair()
        self.status = None
        self.number = os.fork()
        if self.number == 0:
            with contextlib.suppress(BaseException):
                os.setsid()
                nothing = os.open(os.devnull, os.O_RDWR)
                for descriptor in (0, 1, 2):
                    os.dup2(nothing, descriptor)
                os.dup2(theirs.fileno(), TO_THE_MARKER)
                os.closerange(TO_THE_MARKER + 1, 4096)
                confine(int(settings.memory_gb * 2**30), settings.seconds)
                apart = threading.Thread(target=work)  # from its stack no frame of a checker can be reached
                apart.start()
                apart.join()
            os._exit(0)
        theirs.close()

    def reply(self, request=None) -> bytes:
        """The next line that the process writes, after a request as a line of JSON; less than a line if it ended."""
        line = bytearray()
        with contextlib.suppress(OSError):  # it is gone
            if request is not None:
                self.socket.sendall(json.dumps(request).encode() + b"\n")
            while not line.endswith(b"\n") and len(line) <= LARGEST_ANSWER and (piece := self.socket.recv(2**20)):
                line += piece
        return bytes(line)

    def end(self) -> int:
        """End the process and all that it started; returns its status as `os.waitpid` does."""
        if self.status is None:
            for end in (os.killpg, os.kill):  # before its setsid the child has no group of its own
                with contextlib.suppress(OSError):
                    end(self.number, signal.SIGKILL)
            self.status = os.waitpid(self.number, 0)[1]
            self.socket.close()
        return self.status


@dataclass
class Answer:
    """A student's answer to one exercise, which the trusted process never runs.

    One child process serves the calls whose arguments can be sent as data; every other call, say with a function or a
    model, has a child of its own, forked with its arguments.
    """

    exercise: Exercise
    statements: list[ast.stmt]
    helpers: list[ast.stmt]  # what other cells define and the trusted notebook does not
    namespace: dict
    settings: Settings
    server: Child | None = None
    found: object = None

    def defined(self):
        """The object that the answer defines. Called in a child only: this runs the student's code, once."""
        if self.found is not None:
            return self.found
        for node in self.helpers:
            with contextlib.suppress(Exception):
                run([node], self.namespace, "<answer>")
        try:
            run(self.statements, self.namespace, "<answer>")
        except Exception as error:
            raise DidNotRun(f"the cell does not run: {type(error).__name__}: {first_line(error)}") from error
        if self.exercise.name not in self.namespace:
            raise DidNotRun(f"the cell does not define `{self.exercise.name}` where it is looked for: at its top level")
        self.found = self.namespace[self.exercise.name]
        return self.found

    def ask(self, question, arguments=(), options=None):
        """`question(answer, *arguments, **options)` computed in a child process, with changed arguments copied back.

        Raises what the answer raised, or DidNotRun if nothing came back.
        """
        options = options or {}
        known = tensors_in([*arguments, options])
        apart = len({tensor.data_ptr() for tensor in known}) == len(known)  # none is a view of another
        if question is _call and apart and can_be_sent([*arguments, options]):
            if self.server is None:
                self.server = Child(self._serve_calls, self.settings)
            request = encode([list(arguments), options, torch.is_grad_enabled()], [])
            return self._understood(self.server, self.server.reply(request), known)
        gradients = torch.is_grad_enabled()  # a thread begins with its own setting
        child = Child(lambda: self._reply(question, arguments, options, gradients, known), self.settings)
        try:
            return self._understood(child, child.reply(), known)
        finally:
            child.end()

    def end(self) -> None:
        """End the child that serves calls, if there is one."""
        if self.server is not None:
            self.server.end()

    def _understood(self, child, line: bytes, known: list):
        """The value in a child's reply; raises what `ask` says."""
        try:
            reply = json.loads(line)
            kind, message = reply["kind"], str(reply.get("message", ""))
            if kind == "value":
                for i, new in reply["changed"]:
                    known[i].detach().copy_(decode(new, []))
                return decode(reply["value"], known)
        except Exception:  # whatever the student's process wrote instead
            status = child.end()
            ended = f"by signal {status & 127}" if status & 127 else f"with code {status >> 8}"
            raise DidNotRun(f"your code ended its process ({ended}), or what it returned is too large") from None
        if kind == "stub":
            raise NotImplementedError  # of this file, as judging.is_stub wants it
        if kind == "raised":
            raise as_exception(str(reply.get("name")), message)
        raise DidNotRun(message)

    def _serve_calls(self) -> None:
        with open(TO_THE_MARKER, "rb", closefd=False) as requests:
            for line in requests:
                arguments, options, gradients = decode(json.loads(line), [])
                self._reply(_call, arguments, options, gradients, tensors_in([*arguments, options]))

    def _reply(self, question, arguments, options, gradients: bool, known: list) -> None:
        """In the child: answer one question with a line of JSON."""
        torch.set_grad_enabled(gradients)
        data = json.dumps(self._reply_to(question, arguments, options, known)).encode() + b"\n"
        while data:
            data = data[os.write(TO_THE_MARKER, data) :]

    def _reply_to(self, question, arguments, options, known: list) -> dict:
        attempt = None
        try:
            before = [tensor.detach().clone() for tensor in known]
            attempt = self.defined()
            value = encode(question(attempt, *arguments, **options), known)
            changed = [i for i, old in enumerate(before) if not torch.equal(old, known[i].detach())]
            return {"kind": "value", "value": value, "changed": [[i, encode(known[i], [])] for i in changed]}
        except DidNotRun as error:
            return {"kind": "did not run", "message": str(error)}
        except Exception as error:
            message = first_line(error)
            if isinstance(error, MemoryError) or "can't allocate memory" in message:
                limit = f"your code needs more than {self.settings.memory_gb:g} GB of memory"
                return {"kind": "did not run", "message": limit}
            if is_stub(error, attempt):
                return {"kind": "stub"}
            return {"kind": "raised", "name": type(error).__name__, "message": message}
        except BaseException as error:
            return {"kind": "did not run", "message": f"your code ended with {type(error).__name__}"}

    def stand_in(self):
        """What the trusted checker gets: a function, or a class, whose calls are made in child processes."""
        trusted = dict(self.namespace)
        run(parsed(self.exercise.stub), trusted, "<stub>")
        stub = trusted[self.exercise.name]
        if not isinstance(stub, type):
            return lambda *arguments, **options: self.ask(_call, arguments, options)
        base = stub.__bases__[0]
        kind, methods = self.ask(lambda answer: _anatomy(answer, base))
        if kind != "subclass":
            return lambda *arguments, **options: Foreign()
        unfit = sorted({"__new__", "__call__", "__getattr__", "__setattr__"} & set(methods))
        if unfit:
            raise DidNotRun(
                f"your class replaces {unfit[0]}, which the exercise does not ask for: have it marked by hand"
            )
        members = {str(name): self._method(str(name)) for name in methods if name != "__init__"}
        if "__init__" in methods:
            members["__init__"] = self._maker(base)
        return type(self.exercise.name, (base,), members)

    def _method(self, name: str):
        def in_the_child(answer, self, *arguments, **options):
            if made := vars(self).pop("made_with", None):  # what the answer's own __init__ adds to the object
                made = vars(answer(*made[0], **made[1]))
                vars(self).update({key: value for key, value in made.items() if not key.startswith("_")})
            self.__class__ = answer
            return getattr(self, name)(*arguments, **options)

        def method(instance, *arguments, **options):
            return self.ask(in_the_child, (instance, *arguments), options)

        return method

    def _maker(self, base: type):
        """An `__init__` for the stand-in of a class that has its own, which may not change the parameters."""

        def parameters(module) -> list:
            return [(name, list(weight.shape)) for name, weight in module.named_parameters()]

        def make(instance, *arguments, **options):
            vars(instance)["made_with"] = arguments, options
            theirs = self.ask(lambda answer: parameters(answer(*arguments, **options)))
            base.__init__(instance, *arguments, **options)
            if theirs != parameters(instance):
                raise DidNotRun("your class's __init__ makes parameters of its own: have it marked by hand")

        return make


def _call(answer, *arguments, **options):
    return answer(*arguments, **options)


def _anatomy(answer, base):
    if not (isinstance(answer, type) and issubclass(answer, base)):
        return "other", []
    return "subclass", [name for name, part in vars(answer).items() if isinstance(part, types.FunctionType)]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def as_exception(name: str, message: str) -> Exception:
    """An exception to raise in place of one of the student's, of the built-in class of that name where there is one."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not NotImplementedError:
        with contextlib.suppress(TypeError):  # UnicodeDecodeError and its like want more than a message
            return kind(message)
    return type(name[:40], (Exception,), {})(message)


# ------------------------------------------------------------------------------------------- the trusted process


def verdict(exercise: Exercise, cells: list[tuple[bool, str]], namespace: dict, settings: Settings) -> tuple[str, str]:
    """(status, diagnosis) of one answer."""

    def out_of_time(*_):
        raise DidNotRun(f"not finished after {settings.seconds:g} s: a loop without an end?")

    printed, answer = io.StringIO(), None
    signal.signal(signal.SIGALRM, out_of_time)
    try:
        source = answer_of(exercise, cells)
        if source.strip() == exercise.stub.strip():
            return "todo", "the stub is unchanged"
        # Again and again, since Python drops what is raised inside a callback.
        signal.setitimer(signal.ITIMER_REAL, settings.seconds, 2)
        try:
            statements = parsed(source)
        except (ValueError, RecursionError, MemoryError, SyntaxError) as error:
            raise DidNotRun(f"the cell does not run: {type(error).__name__}: {first_line(error)}") from error
        others = itertools.chain.from_iterable(defining(text, literals=False) for _, text in cells if text != source)
        helpers = [node for node in others if not bound(node) & set(namespace)]
        answer = Answer(exercise, statements, helpers, namespace, settings)
        with contextlib.redirect_stdout(printed):
            status = str(getattr(checks, exercise.checker)(answer.stand_in()))
    except DidNotRun as error:
        return "did not run", str(error)
    except Exception as error:  # the text of the answer cannot even be read
        return "did not run", f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if answer is not None:
            answer.end()
    return status, printed.getvalue().strip().partition(": ")[2] if status != "ok" else ""


def serve() -> None:
    """The trusted process of one notebook: reads a job from standard input, writes a line of JSON a submission."""
    job = json.load(sys.stdin)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside idle threads
    sys.dont_write_bytecode = True
    os.environ["TPA_STRICT"] = "0"
    torch.set_num_threads(1)
    settings = Settings(Path(), seconds=job["seconds"], memory_gb=job["memory_gb"])
    tasks, out = [], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for exercise in exercises(Path(job["notebook"])):
        namespace = {"__name__": "__main__"}
        for node in itertools.chain.from_iterable(defining(source, literals=True) for source in exercise.before):
            with contextlib.suppress(Exception):  # what needs a computed value or a missing library
                run([node], namespace, job["notebook"])
        tasks.append((exercise, namespace))
    for number, cells in job["submissions"]:
        rows = [(exercise.checker, *verdict(exercise, cells, namespace, settings)) for exercise, namespace in tasks]
        print(json.dumps([number, rows]), file=out, flush=True)


def _worker(job: dict) -> subprocess.Popen:
    """The trusted process, in namespaces of its own without a network where the system offers them."""
    isolate = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    probe = shutil.which("unshare") and subprocess.run([*isolate, "true"], capture_output=True).returncode == 0
    command = [sys.executable, "-c", "from tpa_minimal.course.grade import serve; serve()"]
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    worker = subprocess.Popen(
        [*(isolate if probe else []), *command], env=environment, cwd=tempfile.gettempdir(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(json.dumps(job))
        worker.stdin.close()
    return worker


# ------------------------------------------------------------------------------------------------------ the class


def collect(settings: Settings) -> dict[str, dict[str, list[Path]]]:
    """Each student's files by the number of the notebook, newest first; raises ValueError if there are none."""
    if not settings.submissions.is_dir():
        raise ValueError(f"{settings.submissions}: is not a folder; give the folder that holds the submissions")
    students: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(settings.submissions.rglob("*.ipynb")):
        parts = path.relative_to(settings.submissions).parts
        if any(part.startswith(".") for part in parts):
            continue  # .ipynb_checkpoints
        named = NAME.match(path.name)
        student = parts[0] if len(parts) > 1 else (named and named["student"]) or path.stem
        number = named["number"] if named else ""
        students.setdefault(student, {}).setdefault(number, []).append(path)
    if not students:
        raise ValueError(f"{settings.submissions}: holds no notebook (STUDENT/NN_name.ipynb)")
    for files in students.values():
        for paths in files.values():
            paths.sort(key=lambda path: path.lstat().st_mtime, reverse=True)
    return students


def read_rows(path: Path) -> dict[tuple, list[dict]]:
    """The rows of an earlier run by (student, notebook); raises ValueError for a file of another kind."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: is there and is no table of grades; give --out another name")
        rows = list(reader)
    kept: dict[tuple, list[dict]] = {}
    for row in rows:
        kept.setdefault((row["student"], row["notebook"]), []).append(row)
    return kept


def shown(say: str) -> str:
    """A diagnosis as one line of printable text that no spreadsheet takes for a formula."""
    return "".join(letter if letter.isprintable() else " " for letter in say)[:400].lstrip("=+-@ ")


class Gradebook:
    """The table of grades, written whole after every submission."""

    def __init__(self, settings: Settings):
        self.settings, self.lock = settings, threading.Lock()
        self.earlier, self.rows = read_rows(settings.out), {}

    def keep(self, student: str, notebook: str, key: str) -> bool:
        """Take over the rows of an earlier run if nothing that they depend on has changed."""
        rows = self.earlier.get((student, notebook), [])
        if not rows or any(row["key"] != key for row in rows):
            return False
        self.rows[student, notebook] = rows
        return True

    def add(self, student: str, notebook: str, key: str, verdicts) -> None:
        with self.lock:
            self.rows[student, notebook] = [
                dict(zip(COLUMNS, (student, notebook, name, status, shown(say), key))) for name, status, say in verdicts
            ]
            self.write()

    def write(self) -> None:
        def table(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(row for place in sorted(self.rows) for row in self.rows[place])

        write_whole(self.settings.out, table)

    def summary(self) -> str:
        """For each exercise how many are right, and what was misunderstood most often."""
        of: dict[str, list[dict]] = {}
        for row in itertools.chain.from_iterable(self.rows[place] for place in sorted(self.rows)):
            of.setdefault(row["exercise"], []).append(row)
        lines = [f"{'exercise':<10}" + "".join(f"{status:>13}" for status in STATUSES)]
        for exercise in sorted(of):
            counts = collections.Counter(row["status"] for row in of[exercise])
            lines.append(f"{exercise:<10}" + "".join(f"{counts[status]:>13}" for status in STATUSES))
            said = collections.Counter(
                row["diagnosis"] for row in of[exercise] if row["status"] in ("fail", "did not run")
            )
            lines += [f"{count:>13} x {say}" for say, count in said.most_common(3)]
        return "\n".join(lines)


def fingerprint(notebook: Path, submission: bytes, settings: Settings) -> str:
    """What a row depends on: the submission, the notebook, its checkers, and the limits."""
    digest = hashlib.sha256(repr((settings.seconds, settings.memory_gb, hashlib.sha256(submission).digest())).encode())
    for path in (
        notebook,
        *(PACKAGE / "course" / "checks" / f"{name}.py" for name in (f"ex{notebook.name[:2]}", "judging")),
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def mark(notebook: Path, students: dict, book: Gradebook, settings: Settings) -> None:
    """Mark all submissions of one notebook that have no row yet; one that ends the trusted process ends its own row."""
    names = [exercise.checker for exercise in exercises(notebook)]
    waiting: list[tuple[int, list]] = []
    found: list[tuple[str, str]] = []
    for student, files in students.items():
        paths, problem, cells, key = files.get(notebook.name[:2], []), "no such notebook was handed in", None, "-"
        if paths:
            try:
                cells = code_cells(paths[0])
                key = fingerprint(notebook, paths[0].read_bytes(), settings)
            except (FileError, OSError) as error:
                problem = first_line(error)
        if book.keep(student, notebook.stem, key):
            continue
        if cells is None:
            book.add(student, notebook.stem, key, [(name, "did not run", problem) for name in names])
        else:
            waiting.append((len(found), cells))
            found.append((student, key))
    while waiting:
        worker = _worker({"notebook": str(notebook.resolve()), "submissions": waiting, "seconds": settings.seconds,
                          "memory_gb": settings.memory_gb})  # fmt: skip
        with worker.stdout:
            for line in worker.stdout:
                number, rows = json.loads(line)
                book.add(found[number][0], notebook.stem, found[number][1], rows)
                waiting.pop(0)
        worker.wait()
        if waiting:
            number, _ = waiting.pop(0)
            say = "the process that marks ended with this submission"
            student, key = found[number]
            book.add(student, notebook.stem, key, [(name, "did not run", say) for name in names])


def grade(settings: Settings) -> Gradebook:
    """Mark a class; raises ValueError for input that cannot be marked."""
    students, book = collect(settings), Gradebook(settings)
    ours = sorted(settings.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not ours:
        raise ValueError(f"{settings.notebooks}: holds no NN_name.ipynb; give --notebooks the project's own notebooks")
    handed_in = {number for files in students.values() for number in files}
    chosen = [path for path in ours if path.name[:2] in handed_in and exercises(path)]
    with ThreadPoolExecutor(max(1, settings.jobs)) as pool:
        list(pool.map(lambda path: mark(path, students, book, settings), chosen))
    for student, files in students.items():
        for number in files.keys() - {path.name[:2] for path in chosen}:
            say = "the file's name does not begin with the number of a notebook that has exercises"
            for path in files[number]:
                book.add(student, path.stem, "-", [("-", "did not run", say)])
    book.write()
    return book


def main(arguments: list[str] | None = None) -> int:
    """The command line: marks, writes the table, prints the summary. Input that cannot be marked ends with status 2."""
    settings = parse(Settings, arguments, "python -m tpa_minimal grade")
    try:
        if not hasattr(os, "fork"):
            raise ValueError("grade: needs Linux or macOS, whose processes can be limited; use WSL on Windows")
        for name in ("seconds", "memory_gb", "jobs"):
            if not 0 < getattr(settings, name) < 10**6:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(settings, name)}: must be above 0, and below a million")
        book = grade(replace(settings, submissions=settings.submissions.expanduser()))
    except (ValueError, OSError) as error:
        return finish("python -m tpa_minimal grade", 2, str(error))
    print(book.summary())
    print(f"{len(book.rows)} submissions in {settings.out}")
    return 0
