# make setup    the environment in .venv with acefast installed in it
# make search   setup, then the default search: dense, UGS and ACE on a generated citation graph, with report and plot
# make test     setup, then all tests
#
# PYTHON=  the interpreter to start from (default python3)
# TORCH=   what to install as torch (a requirement or a wheel). Default: the torch that PYTHON already has; else a CPU
#          build where there is no GPU, so that no CUDA packages are pulled.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
TORCH ?=
TORCH_RELEASE = 2.13.0

BIN = $(VENV)/bin
DGL = $(VENV)/dgl
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES = setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
HAS_TORCH = $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes)

.PHONY: setup search test clean

setup: $(VENV)/.acefast

$(VENV)/.torch:
	$(PYTHON) -m venv $(if $(and $(HAS_TORCH),$(if $(TORCH),,yes)),--system-site-packages) $(VENV)
ifneq ($(TORCH),)
	$(PIP) "$(TORCH)"
else ifneq ($(HAS_TORCH),yes)
	@if nvidia-smi >/dev/null 2>&1; then $(PIP) "torch>=2.10"; \
	elif ! $(PIP) "torch==$(TORCH_RELEASE)+cpu" 2>/dev/null; then \
		echo "No CPU build of torch $(TORCH_RELEASE) is on offer to pip here; installing the default build, which may be large (name another by TORCH=)."; \
		$(PIP) "torch>=2.10"; \
	fi
endif
	@touch $@

$(VENV)/.acefast: $(VENV)/.torch $(SOURCES)
	$(PIP) "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(PIP) --no-build-isolation --editable .
	@touch $@

# What only the tests need; neighbours' prebuilt wheels are taken where they lie beside the checkout and fit.
$(VENV)/.test: $(VENV)/.acefast
	$(PIP) --no-build-isolation --editable ".[test]"
	@for wheel in ../shared/wheels/*.whl; do \
		[ ! -e "$$wheel" ] || $(PIP) --no-index --no-deps "$$wheel" || echo "not used: $$wheel"; \
	done
	@$(MAKE) --no-print-directory $(DGL)/.done || echo "DGL cannot be installed here; its converter is not tested."
	@touch $@

# DGL wants an old setuptools, so it has an environment of its own, which sees the packages of the main one.
$(DGL)/.done: $(VENV)/.acefast
	@$(PYTHON) -m venv $(DGL)
	@$(DGL)/bin/python -m pip install --quiet --disable-pip-version-check "setuptools<70" dgl==1.1.3
	@$(BIN)/python -c "import sys; print('\n'.join(p for p in sys.path if 'site-packages' in p))" \
		> $$($(DGL)/bin/python -c "import site; print(site.getsitepackages()[0])")/main.pth
	@touch $@

search: setup
	$(BIN)/acefast demo --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info acefast/lib acefast/_C*.so
