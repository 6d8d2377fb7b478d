# One virtual environment in .venv, filled from constraints.txt. Needs only Python 3.11 or later with pip and venv.
# Stamps in .venv say which extras are installed, so that nothing is installed twice.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DECLARED := pyproject.toml constraints.txt
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints.txt

.PHONY: help setup demo check test contract bench docs constraints clean

help:
	@echo 'make demo           train a small network on embedded data, compress it to int8, print the ledger'
	@echo 'make test           run the tests (10 minutes at most on 2 cores)'
	@echo 'make check          lint, types, import contract, limits'
	@echo 'make contract       every step over every model pattern and setting'
	@echo 'make docs           build the documentation into site/'
	@echo 'make bench NAME=x [ARGS=...]   repeat benchmarks/x.py and rewrite its JSON'
	@echo 'make setup          only make .venv, with everything that the above needs but the rivals of bench'

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'pared needs Python 3.11 or later; "$(PYTHON)" is older or missing. Say which to use: make PYTHON=python3.12 ...' >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo 'cannot make a virtual environment; on Debian: apt-get install python3-venv' >&2; exit 2; }
	@touch $@

# torch and hatchling come first: the first so that pip settles on one build, the second because nothing is built in isolation.
$(VENV)/pared.stamp: $(VENV)/python.stamp $(DECLARED)
	@echo 'installing pared into $(VENV) (the first time takes minutes)'
	@$(INSTALL) torch hatchling editables
	@$(INSTALL) -e .
	@touch $@

$(VENV)/%.stamp: $(VENV)/pared.stamp
	@echo 'installing the extra $*'
	@$(INSTALL) -e '.[$*]'
	@touch $@

# No build of torchvision for CPUs fits the pinned torch, and one that does not fit breaks torchmetrics by its mere
# presence. So it lies apart, where only tests and benchmarks that want its architectures look (tests/torchvision_models.py),
# and timm, which imports it, beside it.
$(VENV)/torchvision.stamp: $(VENV)/dev.stamp
	@echo 'installing torchvision and timm apart'
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/apart torchvision timm
	@touch $@

setup: $(VENV)/dev.stamp $(VENV)/docs.stamp $(VENV)/torchvision.stamp

demo: $(VENV)/pared.stamp
	@$(BIN)/pared demo

check: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python scripts/check_limits.py

# Two processes of one thread each: most of the time is spent in Python, which uses one core. A file stays in one of them.
# Where one of them dies, the run ends and names the test; pytest-xdist would put another in its place and wait forever.
test: $(VENV)/torchvision.stamp
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

contract: $(VENV)/torchvision.stamp
	@OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m contract tests

docs: $(VENV)/docs.stamp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/bench.stamp $(VENV)/torchvision.stamp
	@test -n '$(NAME)' || { echo 'say which: make bench NAME=..., one of' $(basename $(notdir $(wildcard benchmarks/*.py))) >&2; exit 2; }
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)

# A clean environment with every extra that CI or bench installs, frozen; torch, torchvision and timm stay as they are.
constraints: $(VENV)/python.stamp
	@rm -rf $(VENV)/new && $(PYTHON) -m venv $(VENV)/new
	@$(VENV)/new/bin/python -m pip install --quiet hatchling editables
	@$(VENV)/new/bin/python -m pip install --quiet --no-build-isolation \
	  $$(grep -E '^torch==' constraints.txt) -e '.[dev,docs,bench]'
	@$(VENV)/new/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(VENV)/new/frozen
	@grep -E '^(timm|torchvision)==' constraints.txt >> $(VENV)/new/frozen
	@{ grep '^#' constraints.txt; LC_ALL=C sort -f $(VENV)/new/frozen; } > $(VENV)/new/constraints.txt
	@mv $(VENV)/new/constraints.txt constraints.txt && rm -rf $(VENV)/new

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
