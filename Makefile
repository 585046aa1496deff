# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt

.PHONY: install demo demo-smollm2 test test-gpu bench bench-gpu lint clean

install: .venv/.demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: setup.py constraints.txt | .venv/bin/python
	$(PIP) -e '.[demo]'
	$(BIN)/rlhf-fast build
	touch $@

.venv/.test: .venv/.demo
	$(PIP) -e '.[demo,test]'
	touch $@

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf runs build *.egg-info
