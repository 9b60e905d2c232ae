"""The exercises' checkers: each prints [todo], [ok] or [fail] with a diagnosis of the likely mistake.

A checker `exNN_K(attempt)` tries the reader's function and raises WrongAnswer with what is probably wrong.
With the environment variable TPA_STRICT=1 anything but [ok] raises, so that the solved notebooks test themselves.
"""

import functools
import os


class WrongAnswer(Exception):
    """An attempt that runs but is not right; the message says what is probably wrong."""


def exercise(check):
    """Turn a function that raises WrongAnswer into a checker: it prints one line and returns "todo", "ok" or "fail"."""

    @functools.wraps(check)
    def run(attempt, *more):
        try:
            check(attempt, *more)
            status, message = "ok", "well done"
        except NotImplementedError:
            status, message = "todo", "not written yet: replace `raise NotImplementedError` and run this cell again"
        except WrongAnswer as wrong:
            status, message = "fail", str(wrong)
        except Exception as error:  # the reader's code broke: say how, without a page of traceback
            status, message = "fail", f"your code raised {type(error).__name__}: {error}"
        line = f"[{status}] {check.__name__}: {message}"
        print(line)
        if status != "ok" and os.environ.get("TPA_STRICT") == "1":
            raise AssertionError(line)
        return status

    return run
