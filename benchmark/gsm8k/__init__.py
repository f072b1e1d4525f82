"""GSM8K-style accuracy, tokens per forward and speed of a running server."""

from benchmark.gsm8k.client import Client
from benchmark.gsm8k.problems import last_number, read_problems
from benchmark.gsm8k.run import Settings, run

__all__ = ["Client", "Settings", "last_number", "read_problems", "run"]
