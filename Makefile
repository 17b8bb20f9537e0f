# make train   digits, from nothing to samples (about ten minutes on two cores)
# make test    every test, on the CPU
# make bench   speed of the attention and of a training step on this machine
# make ablate  every rung of the ablations on the digits, three seeds: a table and the paper's figures (30 to 40 minutes)
# make gpu     where there is a GPU: build with CUDA, every CUDA test, the sanitizers, the benchmark; out/gpu-*.md
#              (make gpu PYTHON=python3 takes that interpreter's torch and no .venv, where nothing can be installed)
# make lint    ruff
# Everything runs in .venv, which `make setup` builds once from requirements.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup ext train test bench ablate gpu lint clean
.DELETE_ON_ERROR:

setup: .venv/ready

# .venv/inception is for the tests alone: torch-fidelity would pull in a CUDA torch, and its torchvision, which lacks its
# operators next to a CPU torch, would break diffusers if it could be imported from .venv itself
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps --target .venv/inception torch-fidelity==0.4.0 torchvision==0.28.0
	touch $@

# the fused op; without a compiler everything else still runs, on the Python path
ext: .venv/ext

.venv/ext: .venv/ready setup.py $(wildcard csrc/*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace > .venv/ext.log 2>&1 \
	  && tail -n 1 .venv/ext.log || echo "the fused op was not built (.venv/ext.log says why): the Python path it is"
	touch $@

train: setup ext
	$(BIN)/torchrun train_min.py --resume

test: setup ext lint
	$(BIN)/python -m pytest

bench: setup ext
	$(BIN)/python bench.py
	$(BIN)/python bench.py --step

ablate: setup ext
	$(BIN)/python ablate.py --steps 400 --ema-decay 0.98 --sampling-steps 25 --eval-every 50

GIVEN := $(filter command%,$(origin PYTHON))

gpu: $(if $(GIVEN),,setup)
	$(if $(GIVEN),$(PYTHON),$(BIN)/python) gpu.py

lint: setup
	$(BIN)/ruff check .

# all that make has made but out/, which holds trained models
clean:
	rm -rf .venv build *.so data/digits/*.npy data/digits/meta.json data/photos/*.npy data/photos/meta.json
