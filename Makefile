# Two commands: `make demo` shows what onnxpress does, `make test` checks that it does.
# Both make the environment first; PYTHON, VENV and OUT may be set. `make test-transformers5` runs the tests of exporters
# in a second environment: transformers 5, no optimum.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VENV5 ?= .venv-transformers5
STAMP5 := $(VENV5)/.installed

.PHONY: demo test test-transformers5 install

install: $(STAMP)

# constraints.txt holds the versions that were tried together.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,optimum]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py --output $(OUT)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

$(STAMP5): pyproject.toml constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install --quiet --upgrade pip
	$(VENV5)/bin/python -m pip install --quiet --constraint constraints-transformers5.txt --editable '.[dev]'
	touch $(STAMP5)

test-transformers5: $(STAMP5)
	$(VENV5)/bin/python -m pytest tests/architectures tests/models
