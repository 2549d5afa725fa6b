# Needs Python 3.11, pip, make and a C compiler (one package of reasoning-gym has no wheel). No GPU.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo install test test-slow mutants lint clean

demo: install models/tiny
	$(BIN)/dppo fit --config configs/quickstart.yaml $(ARGS)

install: $(INSTALLED)

$(INSTALLED): requirements-cpu.txt pyproject.toml
	@echo "installing about 200 packages into .venv (3 GB, some minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Python 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r requirements-cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

models/tiny: | $(INSTALLED)
	$(BIN)/dppo prepare tiny --out $@

# Two tests at a time; those that share an engine or ranks go to one of the two (see tests/conftest.py).
test: install
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadscope --durations 10

test-slow: install
	$(BIN)/python -m pytest -m slow --durations 10

mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv models build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
