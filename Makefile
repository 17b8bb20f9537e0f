# make train   digits, from nothing to samples (about ten minutes on two cores)
# make test    every test, on the CPU
# make lint    ruff
# Everything runs in .venv, which `make setup` builds once from requirements.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train test lint clean
.DELETE_ON_ERROR:

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install -q -r requirements.txt
	touch $@

train: setup
	$(BIN)/torchrun train_min.py --resume

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf .venv out data/digits/*.npy data/digits/meta.json
