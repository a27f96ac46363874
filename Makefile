# make serve   a server with the sentiment posterior on 127.0.0.1:8000 (makes the environment first)
# make test    the same environment: all checks and tests
# make check   ruff and mypy only          make fit     refit the posterior that examples/ ships
# make bench   the numbers in the README   make clean   remove the environment
.PHONY: serve test check fit bench setup clean
.DEFAULT_GOAL := serve

BIN := .venv/bin
SHIPPED := examples/sentiment

setup:
	@tools/setup

serve: setup
	@$(BIN)/posterior serve $(SERVE)

test: check
	@command -v promtool >/dev/null || { echo "make test: promtool is missing (Debian: apt install prometheus); the dashboard's queries are tested with it" >&2; exit 1; }
	$(BIN)/python -m pytest $(TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv
