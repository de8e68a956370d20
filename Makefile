# make setup   a virtual environment in .venv with everything pinned in requirements.txt, and comcat itself, editable
# make test    the whole check: lint, format, types, imports, then the tests
# make help    the other targets

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.comcat-ready
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/python -m uv)

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-oldest try-release demo gpu results lint format lock clean

help:
	@echo 'make setup      create .venv with the pinned dependencies and comcat (PYTHON=python3.12 picks the interpreter)'
	@echo 'make test       lint, format, types, imports, then the tests that need no GPU and little time'
	@echo 'make test-slow  the slow and the GPU tests'
	@echo 'make test-oldest  the tests of hosts on the oldest releases that pyproject.toml allows, in an environment of its own'
	@echo 'make try-release  build wheel and sdist, and try them with each extra in fresh environments'
	@echo 'make demo       compress a model trained on built-in digits, end to end'
	@echo 'make gpu        measure speed, accuracy and memory on a CUDA card, in at most eight minutes'
	@echo 'make results    write docs/results.md from the committed results, and check every figure of the other pages'
	@echo 'make lint       all checks but the tests'
	@echo 'make format     let ruff format and mend the code'
	@echo 'make lock       write requirements.txt anew from pyproject.toml (UPGRADE=1 takes the newest releases)'
	@echo 'make clean      remove caches and build outputs; .venv stays'

setup: $(READY)

# uv and not pip, for two reasons. It installs some gigabytes in a fraction of the time. And timm needs torchvision,
# whose builds want the full torch; where pip is set up to prefer a local CPU-only torch, it picks one that breaks
# torchvision. Where uv is missing it goes into the new environment itself, or into the user's where Python has no
# venv module.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("comcat needs Python 3.11 or newer, \
	got %d.%d; name another: make setup PYTHON=python3.12" % v)'
	@set -eu; \
	if uv --version >/dev/null 2>&1; then \
	    uv=uv; \
	elif $(BIN)/python -m uv --version >/dev/null 2>&1; then \
	    uv='$(BIN)/python -m uv'; \
	elif $(PYTHON) -m venv $(VENV) >/dev/null 2>&1; then \
	    $(BIN)/python -m pip install --quiet uv; \
	    uv='$(BIN)/python -m uv'; \
	else \
	    $(PYTHON) -m pip install --quiet --user uv || $(PYTHON) -m pip install --quiet --user --break-system-packages uv; \
	    uv='$(PYTHON) -m uv'; \
	fi; \
	$(BIN)/python -c '' 2>/dev/null || $$uv venv --quiet --clear --python "$(PYTHON)" $(VENV); \
	$$uv pip install --python $(BIN)/python --require-hashes -r requirements.txt; \
	$$uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

test: lint
	CI=1 $(BIN)/pytest -n auto --dist loadfile -m 'not slow and not gpu'

test-slow: setup
	$(BIN)/pytest -m 'slow or gpu'

OLDEST := .venv-oldest
test-oldest: setup
	$(UV) venv --quiet --clear --python $(BIN)/python $(OLDEST)
	$(UV) pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[timm,transformers,train,dev]'
	$(OLDEST)/bin/python -c 'import timm, torch, transformers as t; print(torch.__version__, timm.__version__, t.__version__)'
	CI=1 $(OLDEST)/bin/pytest -n auto -m 'not slow and not gpu' tests/hosts

try-release: setup
	$(BIN)/python .ci/release/run.py --uv '$(UV)'

demo: setup
	$(BIN)/comcat demo compress

gpu: setup
	$(BIN)/python benchmarks/gpu.py

results: setup
	$(BIN)/python benchmarks/summarise.py
	$(BIN)/python benchmarks/picture.py
	$(BIN)/python benchmarks/claims.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(UV) pip compile pyproject.toml --extra all --extra dev --universal --python-version 3.11 --fork-strategy fewest \
	    --generate-hashes --no-emit-index-url --custom-compile-command 'make lock' --quiet \
	    $(if $(UPGRADE),--upgrade) --output-file requirements.txt

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
