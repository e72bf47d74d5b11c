# Needs Python 3.11 or newer and make; everything else goes into .deepclust-env. `make help` lists the targets.

PYTHON ?= python3
VENV := .deepclust-env
PY := $(VENV)/bin/python
STAMP := $(VENV)/complete
LOCK := $(VENV).lock
PIP := $(PY) -m pip --disable-pip-version-check
FILE ?=
PORT ?= 8000

.DEFAULT_GOAL := help
.PHONY: help env book html serve refresh records sweep test test-pages test-long mutants bench clean

help: ## list the targets
	@echo "Targets (the first one you want is 'make book'):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

# The environment counts as made only when its stamp names this folder and these lists of packages: an
# interrupted run leaves no stamp, a moved checkout another folder, an edited list another sum. Its folder has a
# name that editors and other tools do not use, so what is removed here is always what was made here.
env: ## make the environment in .deepclust-env from constraints.txt
	@set -e; \
	want="$(CURDIR)|$$(cat constraints.txt pyproject.toml | cksum)"; \
	made() { have="$$(cat $(STAMP) 2>/dev/null || true)"; [ "$$have" = "$$want" ] && $(PY) -c '' 2>/dev/null; }; \
	if made; then exit 0; fi; \
	until mkdir $(LOCK) 2>/dev/null; do \
	  [ -d $(LOCK) ] || { echo "$(CURDIR) cannot be written: make needs a folder of its own there." >&2; exit 1; }; \
	  [ -n "$$said" ] || echo "Waiting: another make is installing the packages (if none is, remove $(LOCK))."; \
	  said=yes; sleep 1; done; \
	trap 'rmdir $(LOCK)' EXIT; trap 'exit 130' INT TERM; \
	if made; then exit 0; fi; \
	command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is too old ($$($(PYTHON) --version 2>&1)): Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt install python3-venv) and run make again." >&2; exit 1; }; \
	if [ -e $(VENV) ] && { [ "$${have%%|*}" != "$(CURDIR)" ] || ! $(PY) -c '' 2>/dev/null; }; then \
	  echo "The environment in $(VENV) is half-made or of another folder: making it again."; rm -rf $(VENV); fi; \
	rm -f $(STAMP); \
	echo "Installing the packages of constraints.txt into $(VENV) (minutes and gigabytes the first time) ..."; \
	[ -e $(VENV) ] || $(PYTHON) -m venv $(VENV); \
	{ $(PIP) install --quiet --no-input --only-binary=:all: -r constraints.txt \
	  && $(PIP) install --quiet --no-input --no-deps --no-build-isolation -e .; } || { \
	  echo "The packages could not be installed (pip says why above): mend that and run make again." >&2; exit 1; }; \
	printf '%s\n' "$$want" > $(STAMP)

book: env ## run every chapter at its quick profile and render the book
	@$(PY) book/make.py book

html: env ## render the book from the committed outputs, running nothing
	@$(PY) book/make.py html

serve: env ## show the rendered book in a browser (PORT=8000)
	@$(PY) book/make.py serve --port $(PORT)

refresh: env ## re-run the chapters whose code changed and store their outputs (ALL=1 for every chapter)
	@$(PY) book/make.py refresh $(if $(ALL),--all)

records: env ## record the quick profile of every chapter again, seeds 0 to 4
	@$(PY) book/make.py records

sweep: env ## run a sweep: make sweep FILE=book/experiments/NAME.yaml
	@test -n "$(FILE)" || { echo "Name the sweep: make sweep FILE=book/experiments/NAME.yaml" >&2; exit 2; }
	@$(PY) -m deepclust_nb.sweep "$(FILE)"

test: env ## check everything: style, units, chapters, a run with other parameters, the pages in a browser
	@$(PY) book/make.py test

test-pages: env ## render the book and open every page in Chromium: widths, colour schemes, mathematics, steppers, search
	@$(PY) book/make.py test-pages

test-long: env ## the tests that need many minutes or full data sets
	@$(PY) -m pytest tests -m long

mutants: env ## plant the known bugs one at a time and name those that no test notices (hours; ONLY=list or id)
	@$(PY) tests/mutants/plant.py $(ONLY)

bench: env ## measure the training step against this machine's matrix product
	@$(PY) -m pytest tests/benchmarks -s

clean: ## remove what was built; the environment stays
	@rm -rf _build dist .ruff_cache .pytest_cache
