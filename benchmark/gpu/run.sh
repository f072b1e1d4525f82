#!/usr/bin/env bash
# Step times, kernels and time between them of an 8B-shaped model, against the floor of the
# machine it runs on. Without a GPU: a tiny shape on the CPU, to check the script itself.
#
#   benchmark/gpu/run.sh --out DIR/gpu.json [--quick] [--layers N] [--hidden N] [--cpu-shadow]
#
# PYTHON chooses the interpreter; the checkout's .venv comes first, then python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
exec "$python" "$root/benchmark/gpu/main.py" "$@"
