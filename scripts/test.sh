#!/usr/bin/env bash
# Lint, types and the default tests, in .venv, two test files at a time. Further arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
