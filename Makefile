# make run: from a fresh checkout to a first result. make test: all that CI runs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PINS   := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := run
.PHONY: run test check golden picture wheel clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	$(BIN)/robench run --defense shortrun --attack pgd

test: check
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m pytest -m slow || test $$? -eq 5  # 5: there is no slow test

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

golden: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --update-golden -k golden
	git diff --stat

picture: $(VENV)/.installed-dev
	$(BIN)/robench leaderboard build
	$(BIN)/python tools/picture_boards.py

wheel: $(VENV)/.installed-dev
	rm -rf build  # setuptools reuses it: a deleted plugin would be in the next wheel
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "robench needs Python 3.11 or newer; '$(PYTHON)' is not: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PINS) | $(BIN)/python
	@echo "installing robench into $(VENV) (once; torch is large)"
	$(PIP) -e '.[report]'
	@touch $@

# torchattacks names requests ~= 2.25.1, which contradicts constraints.txt, and torchvision; it imports neither, so it goes in
# without what it names (scipy, tqdm and numpy are here already).
$(VENV)/.installed-dev: $(PINS) | $(BIN)/python
	@echo "installing robench and its test tools into $(VENV) (once; torch is large)"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps torchattacks
	@touch $(VENV)/.installed $@
