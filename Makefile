# make demo    train three experts, merge and compare them
# make test    the whole test suite
# make lint    formatting, style, types
# make check   lint and test
# make peft-suite TESTS=DIR   PEFT's own tests on our method; DIR is `tests` of a checkout of huggingface/peft
# All run in .venv, which is made on first use from constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint check peft-suite clean

demo: $(INSTALLED)
	$(BIN)/sparselet demo --out sparselet-demo

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

peft-suite: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check diffusers parameterized
	$(BIN)/python tests/peft_suite/run.py $(TESTS)

clean:
	rm -rf $(VENV) sparselet-demo sparselet-demo.partial

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "sparselet needs Python 3.11 or later; name one with make PYTHON=..." >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)
