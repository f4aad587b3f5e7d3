# Everything here needs only Python >= 3.11 (with venv) and make; `python` may be another name: make PYTHON=python3.12
PYTHON ?= python3
# A good part of the tests waits for real time to pass: three of them at once keep two cores busy.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(max(2, (os.cpu_count() or 2) * 3 // 2))')
VENV := .venv
BIN := $(VENV)/bin

.PHONY: dashboards run test lint bench format clean lock

run: $(VENV)/.run  ## start routerd on 127.0.0.1:8080
	$(BIN)/routerd serve

test: $(VENV)/.test  ## the whole suite; what cannot run here is skipped by name
	-@$(BIN)/python -m tests.hermes_rig  # its own venv; without it the Hermes tests are skipped by name
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test  ## side by side with nginx and LiteLLM; ARGS=--quick for the short one
	$(BIN)/python -m tests.bench $(ARGS)

dashboards: $(VENV)/.test  ## write grafana/dashboards anew from grafana/*.py
	$(BIN)/python -m grafana.build

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("routerd needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml .lock/run.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .lock/run.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run .lock/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .lock/test.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

lock:  ## pin anew what pyproject.toml asks for, for every platform, with hashes
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url pyproject.toml -o .lock/run.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --extra test --extra lint pyproject.toml -o .lock/test.txt

.PHONY: install uninstall

install:  ## as a systemd service, or an upgrade of it (root); PIP_NO_INDEX and PIP_FIND_LINKS for a local wheelhouse
	PYTHON=$(PYTHON) sh systemd/install.sh

uninstall:  ## keeps configuration and state unless PURGE=1
	PURGE=$(PURGE) sh systemd/uninstall.sh
