# make demo, make test: everything on a fresh machine. `make help` lists the rest.
PYTHON ?= python3
PIP_FLAGS ?=
TEST_JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PACK := demo/demo.moepack
PACKAGES := convert kernels layout runtime
NATIVE := setup.py $(wildcard kernels/native/*)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt

.PHONY: help demo test test-parity test-slow test-metal fuzz golden-check lint typecheck bench clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed ## Install, convert the bundled checkpoint, verify, generate.
	$(BIN)/moe-convert demo/checkpoint $(PACK) --bits 4
	$(BIN)/moe-inspect verify $(PACK)
	$(BIN)/moe-inspect show $(PACK)
	$(BIN)/moe-run generate $(PACK) "Tell me a story about a fox." --temperature 0

test: $(VENV)/.test ## The fast suite: real parts, no network, under 3 minutes on 2 cores.
	$(BIN)/pytest -m "not parity and not slow and not fuzz" --numprocesses $(TEST_JOBS) $(PYTEST_FLAGS)

test-parity: $(VENV)/.parity ## Against transformers, MLX and lm-evaluation-harness.
	$(BIN)/pytest -m parity --timeout 1200 $(PYTEST_FLAGS)

test-slow: $(VENV)/.slow ## Kills at random instants, full disks, memory limits, sanitizers.
	$(BIN)/pytest -m slow --timeout 1200 $(PYTEST_FLAGS)

test-metal: $(VENV)/.test ## On a Mac: every kernel against its reference, the demo's tokens, a report to post.
	$(BIN)/python tests/metal_report.py

fuzz: $(VENV)/.test ## Damaged manifests and headers for a minute (MOEPACK_FUZZ_SECONDS).
	$(BIN)/pytest -m fuzz --timeout 3600 $(PYTEST_FLAGS)

golden-check: $(VENV)/.test ## The writer still writes the frozen packs byte for byte.
	$(BIN)/python tests/make_golden.py --check tests/golden/v1

lint: $(VENV)/.lint ## Style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.lint ## Types of the four packages.
	$(BIN)/mypy $(PACKAGES:%=-p moepack.%)

bench: $(VENV)/.installed ## Quality of the demo model at 16, 8, 4, 3 and 2 bits.
	$(BIN)/python benchmarks/quality.py $(BENCH_FLAGS)

clean: ## Remove what make made, the environment included.
	rm -rf $(VENV) $(PACK) $(PACK).plan.json build *.egg-info

# One environment; each stamp is newer than what it was made from.
$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "moepack needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/pip
	$(INSTALL) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.slow: $(VENV)/.test
	$(INSTALL) --editable '.[test,slow]'
	touch $@

$(VENV)/.parity: $(VENV)/.test
	$(INSTALL) --editable '.[test,parity,ray,lm-eval]'
	touch $@

# Editors and mypy do not follow the mapping of folders to moepack.*: links that say the same.
$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) --editable '.[test,lint]'
	mkdir -p build/links/moepack
	for name in $(PACKAGES); do ln -sfn ../../../$$name build/links/moepack/$$name; done
	touch $@
