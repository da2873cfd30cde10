# make run       train jobs/gpt_small.yaml on this machine, from nothing but Python and a C compiler
# make test      the same set-up, then the tests
# make check     lint, format, types, layers
# make bench     speed and memory against the stated targets
# make generate  the schemas, the table of options and the golden plans, after an option has changed

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test check bench generate install clean

run: $(STAMP)
	$(BIN)/dtrain submit jobs/gpt_small.yaml

# What starts worlds of ranks, or Ray, has every core to itself; the rest goes two at a time.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 tests/unit tests/golden tests/kubernetes
	$(BIN)/python -m pytest tests/multiprocess tests/ray tests/gpu

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

generate: $(STAMP)
	$(BIN)/python -m dtrain.spec.schema
	$(BIN)/python tests/golden/plans.py

install: $(STAMP)

# The stamp is written last: an installation that was interrupted is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dtrain needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf .venv build dist dtrain.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find dtrain tests -name __pycache__ -type d -exec rm -rf {} +
