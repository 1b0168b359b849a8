# `make demo` and `make test` set up .venv themselves. They need Python, make and a package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs test test-all lint clean

demo: .venv/ready
	$(BIN)/simsiam demo

# The documentation, in site/: open site/index.html. Every warning is an error.
docs: .venv/ready
	rm -rf build/docs site
	$(BIN)/python docs/prepare_site.py build/docs
	$(BIN)/zensical build --strict

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

# What is too long for every commit: hours. Building the package needs a package index.
test-all: lint
	$(BIN)/pytest -m ""
	$(BIN)/python tests/equality.py
	$(BIN)/python tests/mutations.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/mypy --platform darwin

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .*_cache build site
