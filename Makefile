# Set-up, the main job, tests and the bundled backbone. Every target makes .venv first if it has to.
#
#   make demo                         the main job on the bundled backbone, end to end
#   make test                         the test suite, offline
#   make audit                        pins, files, licences and known vulnerabilities of what is installed
#   make setup TORCH_INDEX=<url>      take torch from another package index (a CPU-only build, for example)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.flashmem-installed
BENCH := $(BIN)/flashmem-bench
TORCH := $(shell grep -i '^torch==' constraints.txt)
TORCH_INDEX ?=
DEMO_LIMIT ?= 100
TINY_MINUTES ?= 74
METHODS := vanilla,flashmem,flashmem-literal,flashmem-prompt-end,flashmem-no-monitor,flashmem-fixed-trigger,flashmem-random-trigger,flashmem-output-entropy,flashmem-separate-encoder,flashmem-random-memory,flashmem-shuffled-memory,flashmem-mean-memory,flashmem-noop-memory

.PHONY: setup demo test test-all faults report reproduce tiny memories memories-seeds lint audit matrix wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashmem needs Python 3.11 or newer: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BENCH) run --suite wordmath,hops --method $(METHODS) --limit $(DEMO_LIMIT)
	$(BENCH) ablate monitor-threshold --suite wordmath --limit $(DEMO_LIMIT)
	$(BENCH) report

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The tests of a cluster need Ray, which nothing else does.
test-all: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'slow or not slow'

# Every kind of fault that is injected, how often, and what it cost; results/reference/resilience.md has the outcome.
FAULT_TESTS := $(addprefix tests/test_,store_kills.py store_disk.py lease.py lines.py runner.py workers.py ray.py)
faults: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	mkdir -p build && rm -f build/faults.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow or not slow' --faults $(CURDIR)/build/faults.jsonl $(FAULT_TESTS)
	$(BIN)/python -m tests.faults build/faults.jsonl

report: setup
	$(BENCH) report

# A recipe from plan to report; stopped, the same command continues. RECIPE is a name from recipes/ or a file.
reproduce: setup
	$(BENCH) reproduce $(or $(RECIPE),$(error name one, such as make reproduce RECIPE=qwen2.5-1.5b-gsm8k))

# The bundled backbone from scratch; the real training splits come from FLASHMEM_DATA. Stopped, it continues.
# Memories and thresholds belong to one backbone: make memories comes after it.
tiny: setup
	$(BIN)/python -m flashmem_bench.tiny.pretrain --minutes $(TINY_MINUTES) --processes 2

# Memories and thresholds for the bundled backbone, as their recipes say: two trainings side by side, one core each.
BUNDLED := flashmem_bench/tiny/weights
JOINT := $(BENCH) train --recipe flashmem-tiny-joint --quiet
RIVALS := $(BENCH) train --recipe flashmem-tiny-rivals --quiet
HOPS := $(BENCH) train --recipe flashmem-tiny-hops --quiet
HOPS_MEMGEN := $(HOPS) --method memgen --insertion prompt-end --set memory.init=inherited --lr 3e-4 --prefix-gib 4
memories: export OMP_NUM_THREADS = 1
memories: setup
	$(JOINT) --method flashmem --train-seed 0 --out $(BUNDLED)/checkpoints/joint/flashmem/seed0 & \
	for memory in hops/flashmem hops-list/flashmem hops-list/flashmem-separate-encoder; do \
	  $(BENCH) train --recipe flashmem-tiny-$${memory%%/*} --quiet --method $${memory##*/} --train-seed 0 --out $(BUNDLED)/checkpoints/$$memory/seed0 || exit; \
	done; wait
	$(JOINT) --method flashmem-separate-encoder --out $(BUNDLED)/checkpoints/joint/flashmem-separate-encoder/seed0
	$(JOINT) --method memgen --set memory.init=inherited --lr 3e-4 --minutes 11 --prefix-gib 4 --out $(BUNDLED)/checkpoints/joint/memgen/seed0 & \
	for method in lora-sft prompt-tuning; do $(RIVALS) --method $$method --out $(BUNDLED)/checkpoints/joint/$$method/seed0 || exit; done; wait
	$(HOPS_MEMGEN) --train-seed 1 --out $(BUNDLED)/checkpoints/hops/memgen/seed1 & \
	$(HOPS) --method lora-sft --insertion prompt-end --train-seed 2 --out $(BUNDLED)/checkpoints/hops/lora-sft/seed2 && \
	$(HOPS) --method prompt-tuning --insertion prompt-end --minutes 6 --out $(BUNDLED)/checkpoints/hops/prompt-tuning/seed0; wait
	$(BENCH) train --recipe flashmem-tiny-hops-ablations --quiet --method flashmem-plus --out $(BUNDLED)/checkpoints/hops/flashmem-plus/seed0
	# Of long curves every tenth step is enough.
	for curve in $$(find $(BUNDLED)/checkpoints -name curves.csv -size +32k); do \
	  awk 'NR <= 2 || NR % 10 == 1' $$curve > $$curve.thin && mv $$curve.thin $$curve || exit; \
	done
	$(BENCH) calibrate --suite wordmath,hops,hops-list,recall,babi,gsm8k --limit 100 --joint --out $(BUNDLED)/thresholds

# The other training seeds of the results; 12 MB hold one memory of each kind, the one of three seeds that gains most and breaks
# least on validation.
memories-seeds: export OMP_NUM_THREADS = 1
memories-seeds: setup
	for seed in 1 2; do \
	  $(JOINT) --method flashmem --train-seed $$seed --out build/memories/joint/flashmem/seed$$seed && \
	  $(HOPS) --method flashmem --train-seed $$seed --out build/memories/hops/flashmem/seed$$seed || exit; \
	done
	for seed in 1 2; do \
	  $(BENCH) train --recipe flashmem-tiny-hops-ablations --quiet --method flashmem-plus --train-seed $$seed --out build/memories/hops/flashmem-plus/seed$$seed || exit; \
	done
	for seed in 0 2; do $(HOPS_MEMGEN) --train-seed $$seed --out build/memories/hops/memgen/seed$$seed || exit; done
	for seed in 0 1; do $(HOPS) --method lora-sft --insertion prompt-end --train-seed $$seed --out build/memories/hops/lora-sft/seed$$seed || exit; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: setup
	$(BIN)/python .ci/audit.py

# A share of every method on every suite; SEED, any text, decides which cells.
SEED ?= $(shell git rev-parse HEAD 2>/dev/null || echo none)
SHARE ?= 0.1
matrix: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix --seed $(SEED) --share $(SHARE)

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
