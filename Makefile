# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= auto
# Two test processes with one thread each use two cores better than one process with two threads.
TWO_CORES := OMP_NUM_THREADS=1
# The notebooks run as they do without a network, whatever this machine has.
NBVAL := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=120

.PHONY: help setup demo test handout lab work book slides notebooks stamp lint

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/installed  ## make the virtual environment (the other targets do this by themselves)

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { $(PYTHON) --version; echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: setup  ## train a small T6, generate with its factor cache, weigh the cache; DATA=auto|fineweb-edu|lessons|PATH
	$(BIN)/python -m tpa_minimal train --data $(DATA) --preset tiny --out runs/demo --resume

test: setup lint  ## all tests and all notebooks
	$(TWO_CORES) $(BIN)/python -m pytest -n 2 --dist loadfile tests
	$(TWO_CORES) $(NBVAL) notebooks/*.ipynb
	$(TWO_CORES) TPA_STRICT=1 $(NBVAL) notebooks/solutions/*.ipynb

lab: setup work  ## JupyterLab on copies of the notebooks in work/, where you can change what you like
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/work/00_start_here.ipynb

# Only what is missing is copied, so nothing that a student wrote is lost; links work as they do from notebooks/.
work:
	@mkdir -p work/solutions
	@cd notebooks && for file in *.ipynb solutions/*.ipynb README.md; do \
	  [ -e "../work/$$file" ] || cp "$$file" "../work/$$file"; done

book: setup  ## a site of notebooks, guide and module in _build/html, to be read without a network
	$(BIN)/jupyter-book build notebooks --path-output . -W --keep-going

slides: setup  ## the 90-minute lecture in _build/slides: a page for a browser without a network, and a PDF
	$(BIN)/python notebooks/slides.py

handout: setup  ## what students get, in handout/: notebooks, a wheel, an environment
	$(BIN)/python -m tpa_minimal handout handout

notebooks: setup  ## build and execute all notebooks from notebooks/src
	$(BIN)/python notebooks/build.py

stamp: setup  ## write the repository address of pyproject.toml into badges, set-up cells and README
	$(BIN)/python notebooks/build.py --stamp

lint: setup  ## ruff, over code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
