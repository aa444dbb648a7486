# make demo: set up, pack, train and judge on a small set. make test: set up and test.
# CUDA=12 in front of setup takes DALI for CUDA 12.
PYTHON ?= python3
VENV ?= .venv
CUDA ?= 13
# A process of tests for each core; each takes gigabytes with the processes that it starts.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal
BIN := $(VENV)/bin
READY := $(VENV)/.ready-cuda$(CUDA)

.PHONY: setup demo test test-all check format bench lock clean

setup: $(READY)

# With uv where it is installed, which is faster, else with venv and pip. Compiled as pip does it:
# where Python may write no bytecode every start of train.py would take 12 s and not 5.
$(READY): requirements.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes \
			-r requirements.txt; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt; \
	fi
	@if [ "$(CUDA)" = 12 ]; then \
		$(BIN)/python -m pip uninstall --quiet --yes nvidia-dali-cuda130 && \
		$(BIN)/python -m pip install --quiet "nvidia-dali-cuda120>=2.4,<3"; \
	fi
	@touch $@

demo: setup
	$(BIN)/python eval/demo.py demo

test: setup
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL)

test-all: setup
	$(BIN)/python -m pytest -q $(PARALLEL)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	for program in tests/bench/*.py; do $(BIN)/python $$program || exit 1; done

# Needs uv. Extras: one DALI, the demo's pictures, the tools.
lock:
	uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
		--extra cuda13 --extra demo --extra dev --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" -o requirements.txt

clean:
	rm -rf $(VENV) demo runs
