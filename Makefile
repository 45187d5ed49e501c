# Each target makes its own environment in .venv; nothing but python3 need be installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.langppl-installed

.DEFAULT_GOAL := help
.PHONY: help env demo test lint bench peers truth

help:
	@echo "make demo   the posterior of a missing sentence, on a real language model"
	@echo "make test   the test suite"
	@echo "make lint   ruff, mypy and the import contracts"
	@echo "make bench  the shorter benchmarks, beside what one would use instead"
	@echo "make peers  particles beside llamppl and genlm-control, in an environment of its own"
	@echo "make truth  is SMC unbiased? the whole grid of programs, guides, twists and schemes"
	@echo "make env    the environment alone, in $(VENV)"

env: $(STAMP)

# torch goes first, so that a failure of the largest download shows at once and its wheel is not
# resolved together with everything else.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev,plots]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/story_infilling.py

# One thread a worker: two workers that each take every core are slower than one. The longest tests
# stand in one file, so an idle worker takes over what waits behind them.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy langppl tests/test_typed.py
	$(BIN)/lint-imports

bench: $(STAMP)
	for name in prefix_rewards step decoding lean grammars limit growth precision \
			calibration page; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; \
	done

truth: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/truth.py

PEERS := .venv-peers

peers:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -c constraints.txt torch
	$(PEERS)/bin/python -m pip install -c constraints.txt -c benchmarks/peers-constraints.txt \
		-e '.[plots,peers]'
	$(PEERS)/bin/python benchmarks/particles.py
	$(PEERS)/bin/python benchmarks/screening.py
	$(PEERS)/bin/python benchmarks/page.py
