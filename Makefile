# `make train` and `make test` need nothing but Python >= 3.10, a C++ compiler and make.
# VENV names the environment; with `VENV=` the ambient Python is used as it is, and only the libraries are built.

PYTHON ?= python3
VENV ?= .venv

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
EMULATION := $(wildcard $(addprefix python_tests/emulation/*.,cpp cu cuh h))

# Of one interpreter: is it there, and new enough?
define CHECK_PYTHON
@command -v $(1) >/dev/null || { echo "cbn_ext needs Python 3.10 or newer; $(1) was not found" >&2; exit 1; }
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cbn_ext needs Python 3.10 or newer; \
	$(1) is %s. Name another one: make PYTHON=python3.12" % sys.version.split()[0])'
endef

ifneq ($(VENV),)

BIN := $(VENV)/bin/
RUN := $(BIN)python
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
BUILT := $(VENV)/.built
PIP_INSTALL := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt

# pip, not python: an environment that came out without pip is made again, and says again what is missing.
$(BIN)pip:
	$(call CHECK_PYTHON,$(PYTHON))
	$(PYTHON) -m venv $(VENV)

# torch and the build tools first: then the package is built against this torch, by these tools.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)pip
	$(PIP_INSTALL) torch ninja pybind11 setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@

$(LINTERS): constraints.txt | $(BIN)pip
	$(PIP_INSTALL) clang-format ruff
	@touch $@

else

RUN := $(PYTHON)
BUILT := build/.built-$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')

endif

.DEFAULT_GOAL := help
.PHONY: help train test bench gpu gpu-rest gpu-sweep lint

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST)

train: $(BUILT)  ## train a compound network on long-tailed digits and report its accuracy
	$(RUN) -m train

test: $(BUILT)  ## run the tests
	$(RUN) -m pytest

bench: $(BUILT)  ## measure layers and training steps against nn.BatchNorm2d
	$(RUN) -m bench

gpu: | $(INSTALLED)  ## on a machine with a GPU: build, run the short tests, measure layers and networks
	$(call CHECK_PYTHON,$(RUN))
	$(RUN) -m python_tests.gpu first

gpu-rest: | $(INSTALLED)  ## there: run the long tests, compute-sanitizer and the profiler
	$(call CHECK_PYTHON,$(RUN))
	$(RUN) -m python_tests.gpu rest

gpu-sweep: | $(INSTALLED)  ## there: compare constants of the launch planning, measure networks for longer
	$(call CHECK_PYTHON,$(RUN))
	$(RUN) -m python_tests.gpu sweep

lint: $(LINTERS)  ## check the style of Python and C++
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(SOURCES) $(EMULATION)

# ninja knows which objects are out of date; this rule only saves asking it.
$(BUILT): $(SOURCES) setup.py $(wildcard build_backend/*.py) | $(INSTALLED)
	$(call CHECK_PYTHON,$(RUN))
	$(RUN) setup.py build_ext --inplace
	@mkdir -p $(@D) && touch $@
