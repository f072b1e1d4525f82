"""The engines of ``benchmark.peers``, each of which decodes the same prompts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import urllib3

from benchmark.command import BenchmarkError
from benchmark.server import START_SECONDS, Server, free_port

ANSWER_LEN = 128
BLOCK_LEN = 32
STEPS = 16
PROMPT_LEN = 88

DLMSERVE = ("dlmserve==0.1.1", "transformers>=4.57,<5", "huggingface-hub<1")
DLMSERVE += ("tokenizers>=0.22,<=0.23", "kernels>=0.6.1,<=0.9", "prometheus-client")
"""dlmserve, and the transformers that it wants. Torch is that of this environment."""

Answer = Callable[[Sequence[str]], float]
"""Answers prompts, all at once, and returns the seconds until the last answer."""


@dataclass(frozen=True)
class Engine:
    """A running engine.

    Attributes:
        peak_memory: bytes, the sum of the peaks of its processes.
    """

    name: str
    answer: Answer
    peak_memory: Callable[[], int]
    stop: Callable[[], None]


def prompts(num: int) -> list[str]:
    """Texts of ``PROMPT_LEN`` tokens, BOS included: each byte is a token."""
    return [f"{index:04d} ".ljust(PROMPT_LEN - 1, "x") for index in range(num)]


def our_server(folder: Path, log: Path, caches: Sequence[str]) -> list[Engine]:
    """``sglang serve`` without a flag that makes it faster, asked for some caches."""
    server = Server(folder, ["--dllm-algorithm", "LLaDA"], log).wait_until_ready()

    def engine(cache: str) -> Engine:
        dllm = {"steps": STEPS, "block_size": BLOCK_LEN, "cache": cache}
        body = {
            "model": str(folder),
            "max_tokens": ANSWER_LEN,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"dllm": dllm},
        }
        name = "ours" if cache == "none" else f"ours, {cache}"
        pid = server.process.pid
        return _http_engine(name, server.base_url, body, pid, server.stop)

    return [engine(cache) for cache in caches]


def install_dlmserve(folder: Path) -> None:
    """Install dlmserve and its transformers into a folder, unless they are there.

    Raises:
        BenchmarkError: the registry has not given them.
    """
    if (folder / "dlmserve").is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(folder), *DLMSERVE], capture_output=True, text=True
    )
    if done.returncode:
        raise BenchmarkError(f"pip cannot install dlmserve: {done.stderr[-300:]}")


def dlmserve(folder: Path, packages: Path, log: Path) -> Engine:
    """dlmserve's own HTTP server in bf16, with its own batching."""
    port = free_port()
    env = {
        **os.environ,
        "PYTHONPATH": str(packages),
        "DLMSERVE_MODEL": str(folder),
        "DLMSERVE_DTYPE": "bf16",
        "DLMSERVE_DEVICE": "cpu",
        "DLMSERVE_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", "from dlmserve.api.server import main; main()"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )

    def stop() -> None:
        process.kill()
        process.wait()

    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    while not _is_ready(f"{url}/ready"):
        if process.poll() is not None or time.monotonic() > deadline:
            stop()
            raise BenchmarkError(f"dlmserve: {log.read_text(errors='replace')[-300:]}")
        time.sleep(0.5)
    body = {
        "model": str(folder),
        "max_tokens": ANSWER_LEN,
        "num_denoising_steps": STEPS,
        "block_length": BLOCK_LEN,
    }
    return _http_engine("dlmserve", url, body, process.pid, stop)


def _is_ready(url: str) -> bool:
    try:
        return urllib3.request("GET", url, retries=False, timeout=5).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def _http_engine(
    name: str, url: str, body: dict[str, Any], pid: int, stop: Callable[[], None]
) -> Engine:
    """An engine that is asked by ``/v1/chat/completions``."""
    pool = urllib3.PoolManager(maxsize=64, retries=False, timeout=600)

    def ask(prompt: str) -> None:
        messages = [{"role": "user", "content": prompt}]
        response = pool.request(
            "POST", f"{url}/v1/chat/completions", json={**body, "messages": messages}
        )
        if response.status != 200:
            raise BenchmarkError(f"{name} answered {response.data[:300]!r}")
        found = response.json()["usage"]["completion_tokens"]
        if found != ANSWER_LEN:
            raise BenchmarkError(f"{name} answered {found} tokens, not {ANSWER_LEN}")

    def answer(texts: Sequence[str]) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(len(texts)) as threads:
            list(threads.map(ask, texts))
        return time.perf_counter() - began

    return Engine(name, answer, lambda: peak_of(pid), stop)


def peak_of(pid: int) -> int:
    """Bytes: the peaks of the resident memory of a process and its children."""
    root = psutil.Process(pid)
    return sum(_peak(p.pid) for p in (root, *root.children(recursive=True)))


def _peak(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


class PlainLoop:
    """The published generate loop on the checkpoint's own code, one text at a time."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.bfloat16
        ).eval()

    def answer(self, texts: Sequence[str]) -> float:
        began = time.perf_counter()
        for text in texts:
            self._decode(text)
        return time.perf_counter() - began

    def _decode(self, text: str) -> None:
        import torch

        mask = self.tokenizer.mask_token_id
        ids = self.tokenizer(f"{self.tokenizer.bos_token}{text}")["input_ids"]
        start, per_block = len(ids), STEPS * BLOCK_LEN // ANSWER_LEN
        canvas = torch.tensor([ids + [mask] * ANSWER_LEN])
        for end in range(start + BLOCK_LEN, start + ANSWER_LEN + 1, BLOCK_LEN):
            for _ in range(per_block):
                with torch.no_grad():
                    logits = self.model(canvas).logits[0]
                best = logits.argmax(-1)
                p = logits.softmax(-1).gather(1, best[:, None])[:, 0]
                p[canvas[0] != mask] = -torch.inf
                p[end:] = -torch.inf
                chosen = p.topk(BLOCK_LEN // per_block).indices
                canvas[0, chosen] = best[chosen]

    def peak_memory(self) -> int:
        return _peak(os.getpid())


LLAMA_CPP = "llama-diffusion-cli"
LLAMA_CPP_CANVAS = 256


def llama_cpp_step(gguf: Path) -> float:
    """Milliseconds of a step by ``llama-diffusion-cli``, at its canvas.

    Raises:
        BenchmarkError: it failed, or printed no time of a step.
    """
    command = [str(shutil.which(LLAMA_CPP)), "-m", str(gguf), "-p", prompts(1)[0]]
    command += ["-ub", str(LLAMA_CPP_CANVAS), "--diffusion-steps", str(STEPS)]
    command += ["--diffusion-algorithm", "4", "--diffusion-block-length", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r"time per step: ([\d.]+)\s*ms", done.stdout + done.stderr)
    if done.returncode or not found:
        raise BenchmarkError(f"{LLAMA_CPP}: {(done.stderr or done.stdout)[-200:]}")
    return float(found[1])
