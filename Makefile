# `make pretrain` trains a small model on this machine; `make test` runs the
# tests. Both install what they need into .venv first.
# PYTHON=python3.12 make ... chooses the interpreter.

SHELL := /bin/bash

# An environment that exists is kept unless another interpreter is named.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
VERSION := $(shell $(PYTHON) -c \
  'import sys; print("%d.%d" % sys.version_info[:2])')
# Compiling every module takes longer than all else of the installation; Python
# compiles those that it imports.
PIP := .venv/bin/pip --disable-pip-version-check install --quiet --no-compile \
  --constraint constraints.txt
CODET5P := .venv/bin/codet5p

RUN_DIR ?= runs/pretrain
STAGE_2_DIR ?= runs/stage_2
CORPUS_DIR ?= runs/corpus
TRAIN_STEPS ?= 2000
STAGE_2_STEPS ?= 400

# Without compiled modules, importing TensorFlow takes three times as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: pretrain test chaos lint install precompile-all benchmark clean

pretrain: .venv/installed-$(VERSION)
	$(CODET5P) prepare_corpus --corpus_dir=$(CORPUS_DIR) \
	  --sources=standard_library,installed_packages --languages=python --pairs
	$(CODET5P) train --gin_file=models/tiny.gin \
	  --gin_file=objectives/stage_1.gin --gin_file=runs/pretrain.gin \
	  DATA_DIR=$(CORPUS_DIR) RUN_DIR=$(RUN_DIR) TRAIN_STEPS=$(TRAIN_STEPS) \
	  BATCH_SIZE=8 LEARNING_RATE=2e-3 WARMUP_STEPS=50 DTYPE=float32 \
	  REMAT_POLICY=none EVALUATE_EVERY=500 CHECKPOINT_EVERY=500 \
	  CAUSAL_LM_FIRST_STEP=200 DENOISING_BATCH_SCALE=2 \
	  DENOISING_SOURCE_LENGTH=256 DENOISING_TARGET_LENGTH=80 \
	  SEQ2SEQ_ROW_LENGTH=130 SEQ2SEQ_SOURCE_LENGTH=128 \
	  SEQ2SEQ_TARGET_LENGTH=128 CAUSAL_LM_TARGET_LENGTH=128 \
	  LOSS_TILE_LENGTH=16
	$(CODET5P) evaluate --gin_file=runs/evaluate.gin RUN_DIR=$(RUN_DIR) \
	  SPLIT=test
	$(CODET5P) generate --gin_file=runs/generate.gin RUN_DIR=$(RUN_DIR) \
	  NUM_SAMPLES=3 TEMPERATURE=0.4 TOP_P=0.95 MAX_NEW_TOKENS=40 \
	  'def fibonacci(n):' \
	  $$'class OrderedDict(dict):\n    def __init__(self' \
	  $$'import os\nimport sys\n'
	$(CODET5P) generate --gin_file=runs/generate.gin RUN_DIR=$(RUN_DIR) \
	  MODE=infill MAX_NEW_TOKENS=16 \
	  $$'def area(width, height):\n    return <extra_id_0> * height\n' \
	  $$'class Stack:\n    def <extra_id_0>(self):\n        self.items = []\n'
	$(CODET5P) report --run_dir=$(RUN_DIR)
	# Of so short a stage 1 the encoder is of no use here, see ARCHITECTURE.md.
	$(CODET5P) train --gin_file=models/bimodal_tiny.gin \
	  --gin_file=objectives/stage_2.gin --gin_file=runs/pretrain.gin \
	  DATA_DIR=$(CORPUS_DIR) RUN_DIR=$(STAGE_2_DIR) \
	  "INIT_FROM=[('$(RUN_DIR)','token_embedder|decoder',None),\
	  ('fresh','encoder|projection|matching_head|temperature',None)]" \
	  TRAIN_STEPS=$(STAGE_2_STEPS) BATCH_SIZE=64 LEARNING_RATE=1e-3 \
	  WARMUP_STEPS=20 DTYPE=float32 REMAT_POLICY=none EVALUATE_EVERY=100 \
	  CHECKPOINT_EVERY=100 TEXT_LENGTH=32 CODE_LENGTH=64 QUEUE_SIZE=512 \
	  MOMENTUM=0.98 LOSS_TILE_LENGTH=16
	$(CODET5P) evaluate --gin_file=runs/evaluate.gin RUN_DIR=$(STAGE_2_DIR) \
	  SPLIT=validation POOL_SIZE=400 RERANK=8
	$(CODET5P) evaluate --gin_file=runs/evaluate.gin RUN_DIR=$(STAGE_2_DIR) \
	  SPLIT=test POOL_SIZE=1000 RERANK=8
	$(CODET5P) generate --gin_file=runs/generate.gin RUN_DIR=$(STAGE_2_DIR) \
	  MODE=text_to_code MAX_NEW_TOKENS=40 \
	  'Return the number of items.' 'Read a file and return its lines.'
	$(CODET5P) generate --gin_file=runs/generate.gin RUN_DIR=$(STAGE_2_DIR) \
	  MODE=code_to_text MAX_NEW_TOKENS=16 \
	  $$'def area(width, height):\n    return width * height\n' \
	  $$'def is_empty(self):\n    return len(self.items) == 0\n'
	$(CODET5P) report --run_dir=$(STAGE_2_DIR)

test: .venv/tests-installed-$(VERSION)
	# Compiling takes most of the time, and uses one core; other tests wait for
	# processes or for time, so there is one worker more than cores, up to four.
	# On Python 3.11 coverage.py would make this a third slower.
	PYTEST_XDIST_AUTO_NUM_WORKERS=$$(($$(getconf _NPROCESSORS_ONLN) + 1)) \
	JAX_PLATFORMS=cpu .venv/bin/python -m slipcover --source codet5p_jax \
	  --omit 'codet5p_jax/conversion/huggingface/*' --json \
	  --out .coverage.json -m pytest --numprocesses=auto \
	  --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
	.venv/bin/python -m slipcover --merge .coverage.json \
	  --out .coverage.json --skip-covered --fail-under 90
	.venv/bin/lint-imports

# Runs that are killed, told to end, and moved to other devices, against runs
# that are left alone; half an hour.
chaos: .venv/tests-installed-$(VERSION)
	.venv/bin/python -m tests.chaos --kills=100
	.venv/bin/python -m tests.chaos --kills=20 --signal=TERM --only='2 processes'
	.venv/bin/python -m tests.elasticity

lint: .venv/tests-installed-$(VERSION)
	.venv/bin/flake8
	.venv/bin/lint-imports

# Every shipped step for the TPU topologies it is meant for; no TPU needed.
# Those of the composite also keep a bound of memory: topology, model, batch,
# dtype of the frozen part, and GB a chip; what generates without the dtype, and
# stage 2 of the 220M model with the paper's batch without these.
COMPOSITE_PEAKS := \
  v5e:1x1,deep_2b,4,bfloat16,11.5 \
  v6e:1x1,deep_6b,4,bfloat16,20.6 \
  v5e:2x4,deep_16b,16,bfloat16,6.1 \
  v6e:1x1,deep_16b,2,int8,24.0 \
  v5e:1x1,deep_6b,4,int8,13.9
STAGE_2_PEAKS := v5e:2x4,7.4 v5e:16x16,1.2
GENERATION_PEAKS := \
  v5e:2x4,deep_2b,32,4.4 \
  v5e:2x4,deep_6b,32,7.0 \
  v5e:2x4,deep_16b,32,12.2 \
  v6e:2x4,deep_16b,32,12.3 \
  v5e:2x4,deep_16b,1,5.5

precompile-all: .venv/tests-installed-$(VERSION)
	for model in t5_60m t5_220m t5_770m; do \
	  for topology in v5e:1x1 v5e:4x4 v6e:1x1 v5p:2x2x1; do \
	    JAX_PLATFORMS=cpu $(CODET5P) precompile \
	      --gin_file=models/$$model.gin --gin_file=runs/finetune.gin \
	      TOPOLOGY=$$topology BATCH_SIZE=16 || exit 1; \
	  done; \
	done
	for peak in $(COMPOSITE_PEAKS); do \
	  IFS=, read topology model batch dtype gigabytes <<< $$peak; \
	  JAX_PLATFORMS=cpu $(CODET5P) precompile \
	    --gin_file=models/$$model.gin --gin_file=runs/finetune.gin \
	    TOPOLOGY=$$topology BATCH_SIZE=$$batch FROZEN_DTYPE=$$dtype \
	    MAX_PEAK_HBM_GB=$$gigabytes || exit 1; \
	done
	for peak in $(STAGE_2_PEAKS); do \
	  IFS=, read topology gigabytes <<< $$peak; \
	  JAX_PLATFORMS=cpu $(CODET5P) precompile \
	    --gin_file=models/bimodal_220m.gin --gin_file=objectives/stage_2.gin \
	    --gin_file=runs/pretrain.gin TOPOLOGY=$$topology BATCH_SIZE=256 \
	    MAX_PEAK_HBM_GB=$$gigabytes || exit 1; \
	done
	for peak in $(GENERATION_PEAKS); do \
	  IFS=, read topology model batch gigabytes <<< $$peak; \
	  JAX_PLATFORMS=cpu $(CODET5P) precompile \
	    --gin_file=models/$$model.gin \
	    --gin_file=runs/precompile_generation.gin TOPOLOGY=$$topology \
	    BATCH_SIZE=$$batch MAX_PEAK_HBM_GB=$$gigabytes || exit 1; \
	done

benchmark: .venv/tests-installed-$(VERSION)
	JAX_PLATFORMS=cpu .venv/bin/python benchmarks/train_step.py

install: .venv/installed-$(VERSION)

.venv/installed-$(VERSION): setup.cfg constraints.txt
	if [ "$$(.venv/bin/python -c 'import sys; print("%d.%d" % \
	    sys.version_info[:2])' 2>/dev/null)" != $(VERSION) ]; then \
	  rm -rf .venv && $(PYTHON) -m venv .venv; \
	fi
	$(PIP) --editable .
	touch $@

.venv/tests-installed-$(VERSION): .venv/installed-$(VERSION)
	# pip keeps one core busy. Another compiles, by importing them, the modules
	# that every worker of the tests would.
	.venv/bin/python -c 'import codet5p_jax.seqio_tasks, \
	  codet5p_jax.runs.train, matplotlib.figure, matplotlib.image' 2> /dev/null & \
	$(PIP) --editable '.[test]'; status=$$?; wait; exit $$status
	# The parity tests compare with PyTorch. Its ordinary Linux wheel brings
	# gigabytes of CUDA, so only a CPU wheel is taken; without it they skip.
	$(PIP) 'torch==2.13.0+cpu' 2>/dev/null || \
	  echo 'No CPU wheel of torch at hand: the parity tests will skip.'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .coverage*
