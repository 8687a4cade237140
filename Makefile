# `make test` and `make bench` set up everything they need in .venv; `make gpu OUT=dir` uses the torch that is installed.
PYTHON ?= python3
VENV := .venv
JOBS := $(or $(MAX_JOBS),2)
PY := $(VENV)/bin/python
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu*' -o -name '*.h') CMakeLists.txt setup.py pyproject.toml

COMMA := ,
SHELL := bash
.SHELLFLAGS := -o pipefail -c
.PHONY: test sanitize bench lint gpu gpu-build gpu-test gpu-sanitize gpu-bench coverage clean triton36 oldest launches

# torch is pinned with all else: a range would take the newest build, with gigabytes of CUDA packages.
$(VENV)/environment.stamp: constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r constraints-dev.txt
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
	find build/emulator -name '*.gcda' -delete  # of the build before
	touch $@

# One process a core, whose OpenMP threads give way instead of spinning for their turn.
test: $(VENV)/build.stamp $(VENV)/emulator.stamp
	OMP_WAIT_POLICY=PASSIVE PYELASTIC_TEST_BACKENDS=eager,cpu,cuda$(if $(filter Linux,$(shell uname)),$(COMMA)triton) $(PY) -m pytest -n $(JOBS)

bench: $(VENV)/build.stamp
	$(PY) -m benchmarks

# Lines of device code that the tests of backend "cuda" reach, from the emulator's build with counters.
coverage: $(VENV)/build.stamp $(VENV)/emulator.stamp
	find build/emulator -name '*.gcda' -delete
	$(PY) -m pytest -q tests/ops -k cuda
	$(PY) tests/device_coverage.py

# Every case of the op tests on backend "cuda" under AddressSanitizer and the race detector; `test` runs a draw of them.
sanitize: $(VENV)/build.stamp $(VENV)/emulator.stamp
	PYELASTIC_TEST_SANITIZED_CASES=1000000 $(PY) -m pytest -q tests/test_emulated_builds.py

# The Triton of torch 2.11: every kernel compiled ahead of time, then the interpreted tests (its interpreter wants an older numpy).
triton36: $(VENV)/build.stamp
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton36 triton==3.6.0 "numpy<2.3"
	PYTHONPATH=$(VENV)/triton36 $(PY) tests/kernel_budget.py --compare
	OMP_WAIT_POLICY=PASSIVE PYTHONPATH=$(VENV)/triton36:. $(PY) -m pytest -q -n $(JOBS) tests/ops tests/test_interpreted.py -k triton

# What the Triton launchers pass, through Triton's JIT up to the launch, for a GPU that is not there: tests/compile_only.py.
# The test left out takes tiles that only the interpreter has room for.
launches: $(VENV)/build.stamp
	OMP_WAIT_POLICY=PASSIVE PYTHONPATH=tests:. $(PY) -m pytest -q -n $(JOBS) -p compile_only --cases 3 --tb no -r '' -k triton tests/ops \
	  --deselect tests/ops/test_maxsim_triton.py::test_winners_of_long_documents_take_32_bits

# The oldest torch, on the CPU (its wheel brings 3 GB of CUDA); its Triton is too old for the kernels.
oldest: $(VENV)/build.stamp
	$(PYTHON) -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/python -m pip install --quiet torch==2.6.0 "numpy<2.3" pytest pytest-xdist hypothesis scikit-learn rich \
	  matplotlib psutil filelock
	OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. $(VENV)/oldest/bin/python -m pytest -q -n $(JOBS) -m "not slow" -k "not triton" \
	  --ignore tests/test_interpreted.py --ignore tests/test_packaging.py

lint: $(VENV)/environment.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# On a machine with a GPU, against the torch that is there and without network. STEPS splits it over calls with a time limit.
STEPS ?= build test sanitize bench
ARCH = $(shell $(PYTHON) -c "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}{b}' + 'a' * (a >= 9))")
gpu:
	@test -n "$(OUT)" || { echo "usage: make gpu OUT=dir [STEPS='build test sanitize bench']"; exit 2; }
	mkdir -p "$(OUT)"
	set -e; for step in $(STEPS); do $(MAKE) --no-print-directory gpu-$$step; done

# The link: without an installation nothing maps the package pyelastic.triton_kernels to its folder.
gpu-build:
	ln -sfn ../triton_kernels pyelastic/triton_kernels
	PYELASTIC_CUDA=ON PYELASTIC_CUDA_ARCHS=$(ARCH) $(PYTHON) setup.py -q build_ext --inplace
	cmake -S . -B build/planted -G Ninja -DPYELASTIC_PLANTED=ON -DPYELASTIC_CUDA=ON -DPYELASTIC_CUDA_ARCHS=$(ARCH) \
	  -DPython_EXECUTABLE="$$(command -v $(PYTHON))" -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)"
	cmake --build build/planted --target planted

# A dozen processes share the GPU: one would need longer than such a call may take, with Triton's compiling most of all.
gpu-test:
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. \
	  $(PYTHON) -m pytest -m "not slow" -n $$(n=$$(nproc); echo $$((n > 12 ? 12 : n))) 2>&1 | tee "$(OUT)/tests.log"

gpu-sanitize:
	PYTHONPATH=. $(PYTHON) tests/gpu_sanitize.py 2>&1 | tee "$(OUT)/sanitize.log"

gpu-bench:
	PYTHONPATH=. $(PYTHON) -m benchmarks --full --rounds 5 --out "$(OUT)" 2>&1 | tee "$(OUT)/bench.log"

clean:
	rm -rf $(VENV) build pyelastic/_C*.so pyelastic/_build.json pyelastic/triton_kernels *.egg-info
