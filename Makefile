# `make demo` and `make test` do all the set-up themselves, in a virtual environment that VENV can point elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.fusedloss-installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

# Workers of the tests (auto: one a core), of one thread each. They start with neighbouring tests, so that few set the
# same fixture up.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all check ext bench format clean

demo: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r examples/requirements.txt
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(PYTEST) -m "not slow"

# With the tests marked slow.
test-all: $(STAMP)
	$(PYTEST)

# Every check, whether or not one before it fails.
check: $(STAMP)
	@status=0; \
	for check in "ruff check ." "ruff format --check ." "clang-format --dry-run --Werror csrc/*" mypy; do \
	    echo "== $$check"; $(BIN)/$$check || status=1; \
	done; \
	exit $$status

bench: $(STAMP)
	$(BIN)/python -m bench softmax_ce class_stats

# Rebuilds the compiled module in place, for work on csrc/.
ext: $(STAMP)
	$(BIN)/python setup.py --quiet build_ext --inplace

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[all,dev]"
	touch $(STAMP)

clean:
	rm -rf build dist *.egg-info fusedloss/_C*.so
