.PHONY: format check test

format:
	ruff check --fix-only --quiet .
	ruff format --quiet .

check:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest
