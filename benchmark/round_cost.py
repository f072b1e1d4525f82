"""The server against the plain reference loop: same checkpoint, prompts, algorithm.

    python benchmark/round_cost.py [--model-path DIR] [--json OUT]

Starts a server, asks the same held-out problems one at a time and 16 at once, and runs
the reference (batch 1, transformers' modules, one forward at a time) in the same run.
Prints problems per second as ratios to the reference, medians of 5 rounds. The tokens
of all three are compared first: a fast wrong answer is no result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "test"))

from transformers import AutoTokenizer  # noqa: E402

from reference.decoding import first_eos, multi_block  # noqa: E402
from reference.models import load  # noqa: E402
from serving_harness import Server  # noqa: E402
from sglang_dllm.demo import demo_path  # noqa: E402
from sglang_dllm.demo.evaluate import heldout  # noqa: E402

NUM_PROBLEMS, CANVAS, ROUNDS = 16, 64, 5


def measure(run: Callable[[], object]) -> float:
    """Median problems per second."""
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        rates.append(NUM_PROBLEMS / (time.perf_counter() - began))
    return median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=demo_path())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for problem in heldout(NUM_PROBLEMS, seed=7)
    ]
    model = load(args.model_path)

    @torch.no_grad()
    def reference(prompt: list[int]) -> list[int]:
        result = multi_block(
            model,
            prompt,
            CANVAS,
            block_size=32,
            threshold=0.5,
            block_add_threshold=0.1,
            decoded_token_threshold=0.95,
            early_stop=True,
        )
        return result.ids[: first_eos(result.ids, model.eos_id)]

    flags = ["--dllm-algorithm", "FullAttnMultiBlock"]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.model_path, flags, Path(folder) / "log")
        try:
            server.wait_until_ready()

            def ask(prompt: list[int]) -> list[int]:
                answer = server.generate(prompt, max_new_tokens=CANVAS, temperature=0)
                return list(answer["output_ids"])

            def at_once() -> list[list[int]]:
                with ThreadPoolExecutor(NUM_PROBLEMS) as pool:
                    return list(pool.map(ask, prompts))

            expected = [reference(prompt) for prompt in prompts]
            assert [ask(prompt) for prompt in prompts] == expected
            assert at_once() == expected
            plain = measure(lambda: [reference(prompt) for prompt in prompts])
            alone = measure(lambda: [ask(prompt) for prompt in prompts])
            crowd = measure(at_once)
        finally:
            server.stop()
    figures = {
        "reference_problems_per_second": plain,
        "server_one_at_a_time_ratio": alone / plain,
        "server_16_at_once_ratio": crowd / plain,
        "threads": torch.get_num_threads(),
    }
    for name, value in figures.items():
        print(f"{name:<32}{value:.2f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
