# `make test` and `make bench` set up everything they need in .venv; `make gpu OUT=dir` uses the torch that is installed.
PYTHON ?= python3
VENV := .venv
JOBS := $(or $(MAX_JOBS),2)
PY := $(VENV)/bin/python
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu*' -o -name '*.h') CMakeLists.txt setup.py pyproject.toml

.PHONY: test bench lint gpu clean

# torch by itself first: a range would take the newest build, with gigabytes of CUDA packages.
$(VENV)/environment.stamp: constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints-dev.txt torch==2.13.0 numpy
	$(PY) -m pip install --quiet -c constraints-dev.txt setuptools pybind11 cmake ninja pytest hypothesis ruff mypy rich \
	  matplotlib psutil scikit-learn pytorch-metric-learning
	touch $@

$(VENV)/build.stamp: $(VENV)/environment.stamp $(SOURCES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# The CUDA kernels on the CPU, for tests.
$(VENV)/emulator.stamp: $(VENV)/environment.stamp $(SOURCES)
	mkdir -p build
	$(VENV)/bin/cmake -S . -B build/emulator -G Ninja -DPYELASTIC_EMULATOR=ON -DPYELASTIC_CUDA=OFF \
	  -DPython_EXECUTABLE="$(CURDIR)/$(PY)" -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" \
	  -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" > build/emulator.log
	$(VENV)/bin/cmake --build build/emulator --parallel $(JOBS) >> build/emulator.log || { cat build/emulator.log; exit 1; }
	touch $@

test: $(VENV)/build.stamp $(VENV)/emulator.stamp
	$(PY) -m pytest

bench: $(VENV)/build.stamp
	$(PY) -m benchmarks

lint: $(VENV)/environment.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# On a machine with a GPU, against the torch that is there and without network.
gpu:
	@test -n "$(OUT)" || { echo "usage: make gpu OUT=dir"; exit 2; }
	$(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest
	PYTHONPATH=. $(PYTHON) -m benchmarks --out "$(OUT)"

clean:
	rm -rf $(VENV) build pyelastic/_C*.so pyelastic/_build.json *.egg-info
