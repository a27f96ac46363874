# make serve   a server with the shipped posteriors on 127.0.0.1:8000 (makes the environment first)
# make test    the same environment: all checks and tests
# make check   ruff and mypy only          make bench   the numbers in benchmarks/README.md
# make grid    hours: every family of posteriors, cell by cell (GRID='--data FOLDER --sets yelp sst2 --seeds 0 1 2')
# make fit     refit the shipped posteriors                 make fit-check   fit sentiment again elsewhere, and compare both
# make answers fit and calibrate a posterior that answers open questions, into posteriors/answers
# make fuzz    minutes: thousands of made-up requests, valid and not, with and without the key
# make crash   kill -9 at 200 random moments of fit, import, calibrate and serve
# make reload  30 minutes: a soak; posteriors loaded and unloaded every 5 s under 16 clients (RELOAD='--minutes 1')
# make clean   remove the environments     make oracles  compare with laplace-torch, bayesian-lora, ivon-opt, in .venv-oracles
# make clients LangChain and LiteLLM against a real server, in .venv-clients
# make replicas  two servers behind one address, on Ray Serve in .venv-replicas    make replicas-test  kill one, check the Helm chart
# make page-test   the page at / in Chromium: against canned replies, then against a real server
# make typescript-test   the TypeScript client: its types, and against a real server
# make docs    the pages of docs/, into site/    make test-docs   minutes: every command of README.md and docs/, run
# make test-long   minutes: the tests that `make test` leaves out, which keep real engines busy for long
# make soak    hours: many random loads, text under load against the same alone, memory over 10,000 requests
.PHONY: serve test test-long oracles clients replicas replicas-test page-test typescript-test docs test-docs check bench grid soak fuzz reload fit fit-check answers crash setup clean
.DEFAULT_GOAL := serve

BIN := .venv/bin
SETUP ?= tools/setup

setup:
	@$(SETUP)

serve: setup
	@$(BIN)/posterior serve $(SERVE)

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(TESTS)

test-long: setup
	$(BIN)/python -m pytest -m long $(TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

oracles:
	@ORACLES=1 $(SETUP)
	.venv-oracles/bin/python -m pytest tests/oracles/run_*.py

clients: setup # LangChain and LiteLLM leave sockets of their async clients open
	@CLIENTS=1 $(SETUP)
	SERVER_PYTHON=$(BIN)/python .venv-clients/bin/python -m pytest \
	    -W ignore::ResourceWarning tests/clients/run_*.py

replicas: setup
	@REPLICAS=1 $(SETUP)
	PATH=$(CURDIR)/$(BIN):$$PATH RAY_USAGE_STATS_ENABLED=0 .venv-replicas/bin/serve run clients/ray/serve.yaml

replicas-test: setup
	@REPLICAS=1 $(SETUP)
	.venv-replicas/bin/python -m pytest tests/replicas/run_chart.py
	$(BIN)/python -m pytest tests/replicas/run_scaling.py tests/replicas/run_ray.py

page-test: setup # needs node 20, npm, and Debian's package chromium
	cd tests/web && npm ci --no-audit --no-fund
	PYTHON=$(CURDIR)/$(BIN)/python node --test tests/web/*.test.js

typescript-test: setup # needs node 20 and npm
	cd clients/typescript && npm ci --no-audit --no-fund && npm run check
	PYTHON=$(CURDIR)/$(BIN)/python node --test tests/clients/typescript/*.test.mjs

docs:
	@DOCS=1 $(SETUP)
	$(BIN)/mkdocs build --strict

test-docs: setup
	$(BIN)/python -m pytest --exitfirst tests/docs/run_pages.py

SENTIMENT := benchmarks/data/yelp.train.jsonl --template '{text}\nSentiment:' --answers ' negative' ' positive' \
    --epochs 3 --curvature-rank 16
SUPPORT := benchmarks/data/support.train.jsonl --task decision --epochs 6 --curvature-rank 16

ANSWERS := benchmarks/data/answers.train.jsonl --task text --template '{prompt}' --chat --epochs 3 --curvature-rank 16

answers: setup
	$(BIN)/posterior fit $(ANSWERS) --out posteriors/answers
	$(BIN)/posterior calibrate posteriors/answers benchmarks/data/answers.calibration.jsonl --max-tokens 16

fit: setup
	$(BIN)/posterior fit $(SENTIMENT) --out posterior/shipped/sentiment
	$(BIN)/posterior fit $(SUPPORT) --out posterior/shipped/support
	$(BIN)/posterior calibrate posterior/shipped/support benchmarks/data/support.calibration.jsonl
	$(BIN)/posterior probe posterior/shipped/sentiment benchmarks/data/yelp.calibration.jsonl
	$(BIN)/posterior probe posterior/shipped/support benchmarks/data/support.calibration.jsonl

fit-check: setup
	@again=$$(mktemp -d) && trap 'rm -rf "$$again"' EXIT && \
	    $(BIN)/posterior fit $(SENTIMENT) --out "$$again/sentiment" && \
	    $(BIN)/python -m benchmarks.fit_check posterior/shipped/sentiment "$$again/sentiment"

crash: setup
	$(BIN)/python -m tests.crash

bench: setup
	for question in laplace predictive decode cpu_lora; do $(BIN)/python -m benchmarks.$$question || exit 1; done
	@ORACLES=1 $(SETUP)
	.venv-oracles/bin/python -m benchmarks.fit

grid: setup
	$(BIN)/python -m benchmarks.calibration $(GRID)

soak: setup
	$(BIN)/python -m benchmarks.exact
	SEEDS=1000 $(BIN)/python -m pytest tests/server/engine/test_gang.py
	$(BIN)/python -m benchmarks.load --seeds 3
	$(BIN)/python -m benchmarks.soak

reload: setup
	$(BIN)/python -m tests.server.reloading $(RELOAD)

fuzz: setup
	CASES=2000 $(BIN)/python -m pytest tests/server/http/test_fuzz.py

clean:
	rm -rf .venv .venv-oracles .venv-clients .venv-replicas
