# Every target works in a fresh clone: what it needs is installed into $(VENV) first, at the versions of constraints.txt.
VENV    ?= .venv
PYTHON  ?= python3
FILE    ?= pipelines/speedrun.yaml
PROFILE ?= laptop
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart fmt check test life drills gpu bench

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(VENV)/.run ## text to a model that talks, on this machine (ONCE=1: end by itself)
	@$(BIN)/nanochat run $(FILE) --profile $(PROFILE)
	@$(BIN)/nanochat report $(FILE) --profile $(PROFILE)
	@$(BIN)/nanochat serve $(FILE) --profile $(PROFILE) $(if $(ONCE),--once) \
		--ask "What arguments does math.sqrt take?" --ask "What is the Python module zipfile for?"

fmt: $(VENV)/.dev ## format the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

check: $(VENV)/.dev ## style, types and layers
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

test: check ## check, then the tests (under ten minutes on two cores)
	$(BIN)/python -m pytest -m "not slow and not gpu and not multigpu and not life and not drill"

life: $(VENV)/.dev ## the whole laptop profile and README's commands, from the command line
	$(BIN)/python -m pytest -m "life or slow" --timeout 2400

drills: $(VENV)/.dev ## kill workers and drivers, and look at what is left
	$(BIN)/python -m pytest -m drill --timeout 1200

gpu: $(VENV)/.dev ## the tests that need CUDA
	$(BIN)/python -m pytest -m "gpu or multigpu"

bench: $(VENV)/.run ## tokens/s of training and decoding on this machine
	$(BIN)/nanochat bench train && $(BIN)/nanochat bench decode

$(VENV)/.run: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (one or two minutes the first time)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(PIP) --editable '.[dev]'
	@touch $@
