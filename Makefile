# `make demo` and `make test` make .venv themselves; nothing is installed outside this directory.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# The exact versions of every environment that is made here; pyproject.toml has the ranges.
CONSTRAINTS := .ci/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
BUNDLE ?= out/minilm
# Of the tests: files side by side, since what the tests of one file share takes long to make.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile
# The page that holds what `make bench`, `bench-…` and `ingest-cuda` have measured.
RESULTS ?= pipeline/bench/RESULTS.md
# What `make bench` times; `make bench MODELS=minilm LENGTHS=128` is a short one.
MODELS ?= minilm synthetic:distilbert-base synthetic:bert-base synthetic:bert-large
BATCHES ?= 1,8
# Who is timed beside Bertile; torch-compile makes code for each size, a minute or so of a large model.
PEERS ?= onnxruntime openvino torch torch-compile deepsparse llamacpp
LENGTHS ?= 16,32,64,128,384
REPEAT ?= 10
LOG_SECONDS ?= 300
# What `make logs` searches, and how: a processor's first log takes LOG_EFFORT=quick and two models.
LOG_EFFORT ?= full
LOG_THREADS ?= 2 1
LOG_MODELS ?= bert-base minilm bert-large distilbert-base
LOG_PRECISIONS ?= fp32 int8 int4 bf16 fp16
# Of families younger than BERT, by LOG_YOUNG_EFFORT: -short models have the kernels of long ones.
LOG_YOUNG ?= modernbert-base modernbert-large nomic-bert-base deberta-v3-base qwen3-short gemma3-short bge-m3-short
LOG_YOUNG_PRECISIONS ?= fp32 int8 bf16
LOG_YOUNG_EFFORT ?= quick
LOG_PRUNED ?= int8@0.8:4x1 int8@0.9:4x1 int8@0.95:4x1 fp32@0.9:unstructured
# What `make bench-sparse` prunes, of the synthetic models.
SPARSE_MODEL ?= bert-base

# What `make bench-load` and `make bench-streams` call, and for how many seconds each engine.
LOAD_MODEL ?= minilm
LOAD_SECONDS ?= 5

# What `make bench-tuning` tunes from an empty log, and times beside the shipped log's kernels.
TUNING_MODEL ?= synthetic:bert-base
TUNING_TRIALS ?=
TUNING := out/tuning

# What `make pack-cuda` prepares for a machine with a GPU, and of each kernel how many candidates.
CUDA_TARGET ?= cuda-sm90
CUDA_TRIALS ?= 48
CUDA := out/cuda

# QEMU, arm64 libraries and TVM's runtime for arm64, where no package of Debian's is installed.
ARM := $(VENV)/arm
export PATH := $(abspath $(ARM))/usr/bin:$(PATH)
ARM_ENV = $(if $(wildcard $(ARM)/usr/aarch64-linux-gnu),QEMU_LD_PREFIX=$(abspath $(ARM))/usr/aarch64-linux-gnu)

.PHONY: wheel help demo docs test test-slow test-arm lint format bench bench-precisions bench-sparse bench-tuning logs
.PHONY: bench-load bench-streams bench-acceptance bench-texts bench-server
.PHONY: logs-arm pack-cuda bench-cuda ingest-cuda clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       compile minilm for this machine, compare sentences, time it"
	@echo "make test       the tests (some minutes); make test-slow has the long ones too"
	@echo "make test-arm   bundles for ARM, run under QEMU, and compared with this machine's"
	@echo "make docs       the pages, the notebooks and the Python API as a site, into out/docs"
	@echo "make lint       ruff; make format lets it rewrite"
	@echo "make bench      time models in fp32 beside $(PEERS); tables into $(RESULTS)"
	@echo "make bench-precisions   the same in int8 and bf16"
	@echo "make bench-sparse   pruned models beside peers, and time against sparsity, into $(RESULTS)"
	@echo "make bench-load   a request beside busy cores; make bench-streams, several at once"
	@echo "make bench-acceptance   every case that has a bound beside every peer, in one table"
	@echo "make bench-texts   2,000 texts to vectors, and queries, beside who else does that (half an hour)"
	@echo "make bench-server   \`bertile serve\` under load, beside servers of other engines (15 min)"
	@echo "make bench-tuning   tune a model from an empty log, compare with the shipped one (10 min)"
	@echo "make pack-cuda    all that a machine with a GPU measures, to be carried there (20 min)"
	@echo "make bench-cuda   measure it, on that machine; make ingest-cuda, its results at home"
	@echo "make logs       tune the kernels whose logs ship in tuning_logs (four hours)"
	@echo "make logs-arm   the same for ARM, by estimate (half an hour)"
	@echo "make wheel      what a package index serves, into dist/: Bertile, TVM's runtime"
	@echo "make clean      remove .venv, out and what Python and the tests left"

demo: $(VENV)/.installed
	@$(BIN)/bertile demo -o $(BUNDLE)

test: $(VENV)/.installed
	@$(MAKE) -s $(VENV)/.arm || echo "ARM code cannot be run here: its tests are skipped" >&2
	@$(ARM_ENV) $(BIN)/python -m pytest -q $(WORKERS) -m "not slow and not gpu"

test-slow: $(VENV)/.slow
	@$(MAKE) -s $(VENV)/.arm || echo "ARM code cannot be run here: its tests are skipped" >&2
	@$(ARM_ENV) $(BIN)/python -m pytest -q $(WORKERS) -m "not gpu"

# Bundles of a two-layer model and of MiniLM for every ARM row, run as ARM code; tuning on an ARM server.
test-arm: $(VENV)/.arm
	@$(MAKE) -s $(VENV)/.arm-python || echo "no ARM server: the test of tuning on one is skipped" >&2
	@$(ARM_ENV) $(BIN)/python -m pytest -q tests/run/test_arm_bundles.py tests/run/test_opener.py \
	  tests/bundle/test_musl.py tests/schedules/test_arm.py tests/tune/measure/test_device_arm.py

$(VENV)/.arm-python: tests/install_arm_python.sh pipeline/bundle/wheels-aarch64.txt | $(VENV)/.installed
	@echo "install what an ARM server runs: Debian's Python, TVM for arm64"
	@sh tests/install_arm_python.sh $(ARM)/python $(BIN)/python
	@touch $@

$(VENV)/.arm: tests/install_arm.sh pipeline/bundle/wheels-aarch64.txt | $(VENV)/.installed
	@echo "install what runs ARM code: QEMU, arm64 libraries, TVM's runtime for arm64"
	@sh tests/install_arm.sh $(ARM) $(BIN)/python
	@touch $@

# All pages, the notebooks and the reference of the Python API; a warning is an error.
docs: $(VENV)/.slow
	@$(BIN)/python -m sphinx -q -W --keep-going -c .ci -b html . out/docs
	@echo "out/docs/index.html"

$(VENV)/.slow: $(VENV)/.installed
	@echo "install what builds the pages and checks types, and libraries that adapters are for"
	@$(PIP) -e ".[slow]"
	@touch $@

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.bench
	@$(BIN)/bertile bench $(MODELS) --against $(PEERS) \
	  --batch $(BATCHES) --length $(LENGTHS) --repeat $(REPEAT) --startup --markdown \
	  --into $(RESULTS)

# int8 and bf16 beside the peers' forms of the same; DeepSparse comes into the cache at its first use.
bench-precisions: $(VENV)/.bench
	@for precision in int8 bf16; do \
	  $(BIN)/bertile bench $(MODELS) --precision $$precision \
	    --against $(PEERS) --batch $(BATCHES) --length $(LENGTHS) \
	    --repeat $(REPEAT) --markdown --into $(RESULTS) || exit; done

# Table into RESULTS, curve (.svg, .csv) beside the module that draws it; peers get the same zeros.
bench-sparse: $(VENV)/.bench
	@$(BIN)/python -m bertile.studies.sparse_bench --model $(SPARSE_MODEL) --repeat $(REPEAT) \
	  --into $(RESULTS) -o pipeline/studies

# What a request costs on a machine that does something else too, and what a waiting model burns.
bench-load: $(VENV)/.bench
	@$(BIN)/bertile bench $(LOAD_MODEL) --load --duration $(LOAD_SECONDS) \
	  --against onnxruntime,openvino,torch --markdown --into $(RESULTS)

# Two streams of one thread beside one of two threads, each with two callers.
bench-streams: $(VENV)/.bench
	@$(BIN)/bertile bench $(LOAD_MODEL) --threads 2 --streams 1,2 --concurrency 2 --length 16,32 \
	  --duration $(LOAD_SECONDS) --against onnxruntime,openvino --markdown --into $(RESULTS)

# Each case with the share of the best peer's time that it may take at most; REPEAT=3 is a short run.
bench-acceptance: $(VENV)/.bench
	@$(BIN)/python -m bertile.studies.acceptance --repeat $(REPEAT) --into $(RESULTS)

# Texts to vectors; packages that cannot stand beside Bertile's own come into the cache at first use.
bench-texts: $(VENV)/.bench
	@$(BIN)/python -m bertile.studies.text_bench --memory --startup --into $(RESULTS)

# The server with 64 clients beside peers, under overload, idle, and beside slow clients.
bench-server: $(VENV)/.bench
	@$(BIN)/python -m bertile.studies.server_load load overload idle slow --into $(RESULTS)

# "vs engine" in the row of out/tuning/shipped is what `--tune quick` reaches of the shipped log.
bench-tuning: $(VENV)/.bench
	@rm -rf $(TUNING)
	@$(BIN)/bertile compile $(TUNING_MODEL) -q --log-dir $(TUNING)/none -o $(TUNING)/shipped
	@$(BIN)/bertile compile $(TUNING_MODEL) -q --no-shipped-log --log-dir $(TUNING)/none \
	  -o $(TUNING)/untuned
	@$(BIN)/bertile tune $(TUNING_MODEL) --tune quick $(TUNING_TRIALS:%=--trials %) \
	  --no-shipped-log --log-dir $(TUNING)/log
	@$(BIN)/bertile compile $(TUNING_MODEL) -q --no-shipped-log --log-dir $(TUNING)/log \
	  -o $(TUNING)/quick
	@$(BIN)/bertile bench $(TUNING)/quick \
	  --against $(TUNING)/shipped,$(TUNING)/untuned,onnxruntime --markdown \
	  --into "$(RESULTS)#bench-tuning"

# torch first and by itself: the packages behind it take any torch that they find in place.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "python3.11 was not found: install Python 3.11" >&2; exit 3; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11" >&2; exit 3; }
	@test -x $(BIN)/python || { echo "make $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "install torch (1 of 2)"
	@$(PIP) torch
	@echo "install bertile and the rest (2 of 2)"
	@$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	@echo "install the engines to compare with"
	@$(PIP) -e ".[bench]"
	@touch $@

# What ships in tuning_logs: four hours, on a machine that does nothing else meanwhile.
logs: $(VENV)/.installed
	@for precision in $(LOG_PRECISIONS); do for threads in $(LOG_THREADS); do \
	  for model in $(LOG_MODELS); do \
	    $(BIN)/bertile tune synthetic:$$model --tune $(LOG_EFFORT) --timeout $(LOG_SECONDS) \
	      --precision $$precision --threads $$threads --log-dir tuning_logs || exit; \
	done; done; done
	@for threads in $(LOG_THREADS); do \
	  for model in $(LOG_PRUNED); do \
	    $(BIN)/bertile tune synthetic:bert-base@$${model#*@} --precision $${model%@*} --tune $(LOG_EFFORT) \
	      --timeout $(LOG_SECONDS) --threads $$threads --log-dir tuning_logs || exit; \
	done; done
	@for precision in $(LOG_YOUNG_PRECISIONS); do for model in $(LOG_YOUNG); do \
	  $(BIN)/bertile tune synthetic:$$model --precision $$precision --tune $(LOG_YOUNG_EFFORT) \
	    --timeout $(LOG_SECONDS) --log-dir tuning_logs || exit; \
	done; done

# What ships for ARM, by llvm-mca's estimate: half an hour, whatever else the machine does.
logs-arm: $(VENV)/.arm
	@for target in arm-a72 arm-a76 arm-v1 arm-v2; do \
	  case $$target in arm-v*) more=bf16;; *) more=;; esac; \
	  for model in bert-base minilm; do for precision in fp32 int8 $$more; do \
	    $(BIN)/bertile tune synthetic:$$model --tune full --trials 10 --precision $$precision \
	      --target $$target --threads 4 --runner mca --log-dir tuning_logs || exit; \
	done; done; done

# To be carried with tests/gpu_session.sh, which lies beside them, to a machine that has python3,
# numpy, torch and transformers: sh gpu_session.sh . RESULTS
pack-cuda: $(VENV)/.installed
	@mkdir -p $(CUDA)
	@cp tests/gpu_session.sh $(CUDA)
	@$(BIN)/python -m bertile.studies.cuda_package --checks $(CUDA)/checks.tar.xz \
	  --target $(CUDA_TARGET)
	@$(BIN)/python -m bertile.studies.cuda_package -o $(CUDA)/bench.tar.xz --target $(CUDA_TARGET)
	@for precision in fp16 int8; do \
	  $(BIN)/bertile tune synthetic:bert-base --target $(CUDA_TARGET) --precision $$precision \
	    --trials $(CUDA_TRIALS) --pack $(CUDA)/round-$$precision.pyz || exit; done

# Needs no .venv: it is what the session on the machine with the GPU runs.
bench-cuda:
	@sh $(CUDA)/gpu_session.sh $(CUDA) $(CUDA)/results

# Wheels of another checkout's state would come along out of build/.
wheel: $(VENV)/.installed
	@rm -rf build dist
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist .
	@for arch in x86_64 aarch64; do \
	  $(BIN)/python -m bertile.bundle.runtime_wheel --arch $$arch -o dist || exit; \
	done
	@rm -rf build
	@ls -l dist

# Times of candidates into the log (make pack-cuda then packs the next ones), the table into RESULTS.
ingest-cuda: $(VENV)/.installed
	@$(BIN)/bertile tune --ingest $(wildcard $(CUDA)/results/round-*.jsonl) --log-dir tuning_logs
	@$(BIN)/python -m bertile.studies.cuda_package --table $(CUDA)/results/compiled.json \
	  --into $(RESULTS)

clean:
	@rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
