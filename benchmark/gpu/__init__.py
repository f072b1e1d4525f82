"""All GPU evidence in one command, ``run.sh``; see docs/gpu_benchmark.md."""
