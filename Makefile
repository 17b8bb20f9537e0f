# make train   the digits, from nothing to samples (about ten minutes on two cores)
# make test    every test, on the CPU, a process a core; `.venv/bin/python -m pytest` runs the
#              quick ones alone
# make bench   speed of the attention and of a training step on this machine
# make ablate  the ablations on the digits, three seeds: tables and figures (30 to 40 minutes)
# make gpu     on a machine with a GPU: build with CUDA, CUDA tests, sanitizers, times of the op
#              and of whole models beside DiT and Sana
#              (PYTHON=python3 takes that interpreter's torch instead of .venv's)
# make lint    ruff
# make clean   remove what the others made, except out/, which holds trained models
# All run in .venv, which `make setup` builds from requirements.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup ext train test bench ablate gpu lint clean
.DELETE_ON_ERROR:

setup: .venv/ready

# .venv/inception is for the tests alone. torch-fidelity would pull in a CUDA torch; its torchvision
# lacks its operators next to a CPU torch and would break diffusers in .venv itself.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps --target .venv/inception torch-fidelity==0.4.0 torchvision==0.28.0
	touch $@

# The fused op. Without a compiler everything else still runs, on the Python path.
ext: .venv/ext

.venv/ext: .venv/ready setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh csrc/*/*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace > .venv/ext.log 2>&1 \
	  && tail -n 1 .venv/ext.log \
	  || echo "the fused op was not built (see .venv/ext.log): falling back to the Python path"
	touch $@

train: setup ext
	$(BIN)/torchrun train_min.py --resume

# Four processes at most: each takes half a gigabyte, and the longest tests bound the time.
test: setup ext lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist worksteal

bench: setup ext
	$(BIN)/python -m csrc.bench
	$(BIN)/python -m experiments.costs --step

ablate: setup ext
	$(BIN)/python -m experiments.ablate --steps 400 --ema-decay 0.98 --sampling-steps 25 \
	  --eval-every 50

GIVEN := $(filter command%,$(origin PYTHON))

gpu: $(if $(GIVEN),,setup)
	$(if $(GIVEN),$(PYTHON),$(BIN)/python) -m csrc.check_gpu

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf .venv build *.so $(foreach set,digits mnist photos,data/$(set)/*.npy data/$(set)/meta.json)
