# make serve   a server with the sentiment posterior on 127.0.0.1:8000 (makes the environment first)
# make test    the same environment: all checks and tests
# make check   ruff and mypy only          make bench   the numbers in the README
# make fit     refit the shipped posterior make clean   remove the environment
.PHONY: serve test check bench fit setup clean
.DEFAULT_GOAL := serve

BIN := .venv/bin

setup:
	@tools/setup

serve: setup
	@$(BIN)/posterior serve $(SERVE)

test: check
	$(BIN)/python -m pytest $(TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fit: setup
	$(BIN)/posterior fit benchmarks/data/yelp.train.jsonl --out posterior/shipped/sentiment --template '{text}\nSentiment:' \
	    --answers ' negative' ' positive' --epochs 3 --curvature-rank 16

bench: setup
	for question in calibration fit predictive; do $(BIN)/python -m benchmarks.$$question || exit 1; done

clean:
	rm -rf .venv
