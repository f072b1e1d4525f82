#!/usr/bin/env bash
# Step times, kernels and the time between them of an 8B-shaped model, against the floor of
# its machine. Without a GPU a tiny shape runs on the CPU, which checks the script itself.
#
#   benchmark/gpu/run.sh --out DIR/gpu.json [--quick] [--layers N] [--hidden N] [--cpu-shadow]
#
# PYTHON names the interpreter. The default is the checkout's .venv, then python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m benchmark.gpu "$@"
