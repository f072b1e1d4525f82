"""``python -m benchmark.gsm8k``."""

import sys

from benchmark.gsm8k.cli import main

sys.exit(main())
