# make demo, make test: from a fresh clone to digits drawn and tests passed. Needs python3 with venv, make and a C++ compiler;
# everything else is installed into .venv at the versions of constraints.txt. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEPENDENCIES := $(VENV)/dependencies.stamp
EXTENSION := $(VENV)/extension.stamp
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)
CXX_FILES := $(filter csrc/%,$(SOURCES)) $(wildcard tests/ptx/*.h tests/ptx/*.cpp)
ARGS ?=
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test benchmark gpu-check versions lint format build clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(EXTENSION) ## draw 256 digits: out/digits.png, out/digits.npz, and the figures
	$(RUN) examples/digits/draw.py

test: $(EXTENSION) ## run the test suite (ARGS="-k loss" passes arguments to pytest)
	$(RUN) -m pytest -n 2 $(ARGS)

benchmark: $(EXTENSION) ## measure, and write README's numbers: 40 minutes on two idle cores (ARGS=--quick: rehearse in out/benchmark)
	$(RUN) -m benchmarks $(ARGS)
	$(RUN) -m benchmarks.solvers --kept-back $(ARGS)
	$(RUN) -m benchmarks.demo $(ARGS)
	$(RUN) -m benchmarks.readme $(ARGS)

gpu-check: ## on a GPU: build, test, sanitize and measure in ten minutes, with the Python that has a CUDA torch (ARGS=--rehearse: on a CPU)
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

versions: ## build and test every promised torch and Python, and write docs/versions.md: two hours (ARGS="--torch 2.11.0": a part)
	$(PYTHON) .ci/versions.py --write $(ARGS)

lint: $(DEPENDENCIES) ## check style and types: ruff, clang-format, mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) $(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) -m mypy

format: $(DEPENDENCIES) ## rewrite Python and C++ in the house style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) $(VENV)/bin/clang-format -i $(CXX_FILES)

build: $(EXTENSION) ## make .venv and build the extension in place

clean: ## remove everything that make made, .venv and out included
	rm -rf $(VENV) build dist out *.egg-info scoresde_ext/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEPENDENCIES): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("make needs Python 3.10 or newer, this is " + sys.version.split()[0] + \
	    ": make PYTHON=/path/to/python3 chooses another" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the CPU build of torch"
	@$(RUN) -m pip install -c constraints.txt torch || { echo >&2; echo >&2 "\
	make: pip found no CPU build of torch as constraints.txt pins it. Give pip a place that has PyTorch's CPU wheels, by \
	PIP_EXTRA_INDEX_URL (the CPU index that PyTorch's installation page names) or PIP_FIND_LINKS (a folder of wheels), \
	and run make again. A CUDA build is never fetched."; exit 1; }
	@echo "Installing the other dependencies"
	@$(RUN) -m pip install -r constraints.txt
	@touch $@

# An editable install points at the folder it was made in: build again where the clone was moved.
ifneq ($(shell cat $(EXTENSION) 2>/dev/null),$(CURDIR))
.PHONY: $(EXTENSION)
endif
$(EXTENSION): $(DEPENDENCIES) $(SOURCES)
	@echo "Building the extension (from nothing, a minute or two)"
	@$(RUN) -m pip install --no-build-isolation --no-deps -e .
	@echo '$(CURDIR)' > $@
