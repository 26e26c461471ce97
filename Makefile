# `make demo` and `make test` do all set-up themselves; a second call finds the environment ready.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: env demo test check docs fmt clean

env: $(READY)

# PyPI's torch for Linux carries several GB of CUDA: take the CPU build where there is no GPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	if [ "$$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null || \
	  $(PIP) "torch==$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null || \
	  $(PIP) torch; \
	else $(PIP) torch; fi
	$(PIP) -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/upop demo

# A file of tests stays in one process; one thread each, since the processes already use all cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

# A link or reference that leads nowhere is an error.
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache docs/_build docs/generated
