#!/usr/bin/env bash
# Everything that needs a GPU to be seen, in one JSON: bash benchmarks/gpu_check.sh [--json FILE], after `make setup`.
# Small version, on any machine: bash benchmarks/gpu_check.sh --device cpu --profile cpu-smoke --steps 4
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python benchmarks/gpu_check.py "$@"
