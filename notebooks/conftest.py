"""Hold each notebook to the time that its title cell promises (nbval runs the cells; this adds up their times)."""

import json
import os
from collections import Counter
from pathlib import Path

from build import BUDGET

_seconds: Counter[str] = Counter()


def pytest_runtest_logreport(report):
    _seconds[report.nodeid.split("::")[0]] += report.duration


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        return  # only the process that sees all reports judges
    # With more to do than cores to do it on, everything takes longer in proportion; on an idle machine this is 1.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = max(1.0, load / (os.cpu_count() or 1))
    for name, seconds in sorted(_seconds.items()):
        path = Path(session.config.rootpath, name)
        budget = int(BUDGET.search("".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]))[1])
        print(f"{name}: {seconds:.0f} s of at most {budget} s")
        if seconds > budget * busy:
            print(f"{name} takes longer than its title cell promises: shorten it, or promise more (60 s at most)")
            session.exitstatus = 1
