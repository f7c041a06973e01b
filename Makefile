.PHONY: format check test test-all

format:
	ruff check --fix-only --quiet .
	ruff format --quiet .

check:
	ruff check .
	ruff format --check .
	mypy

# What a change needs, in a minute and a half; then all there is.
test:
	pytest -m "not slow and not thorough"

test-all:
	pytest
	pytest -m slow
