"""Trains the demo model: LLaDA's SFT objective, Muon and AdamW, on CPU.

The schedule follows the seconds of training and not the steps, so that a run ends as
planned on any machine. A run that was stopped continues from its last saved state.

    python -m tools.demo.train --state-dir DIR --seconds 4500
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_dllm.demo import demo_path
from sglang_dllm.demo.problems import heldout
from sglang_dllm.demo.tokenizer import build_tokenizer
from tools.demo.batches import Batch, BatchSource
from tools.demo.checkpoint_io import MAX_LENGTH, load_checkpoint, save_checkpoint
from tools.demo.evaluate import breakdown, evaluate, rule_for
from tools.demo.model import DemoModel, ModelShape
from tools.demo.muon import Muon

MUON_LR, ADAM_LR = 0.015, 2e-3
WARMUP, EMA_DECAY = 0.01, 0.995


def lr_scale(progress: float) -> float:
    """Warm up, hold, and fall linearly to zero over the last 60 % of the run."""
    return min(1.0, (progress + 1e-3) / WARMUP, max(0.0, (1 - progress) / 0.6))


def masked_loss(model: DemoModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The weighted loss, and the plain mean cross-entropy of the masked tokens."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch.noisy, batch.weight > 0)
    clean, weight = batch.clean[batch.weight > 0], batch.weight[batch.weight > 0]
    entropy = F.cross_entropy(logits.float(), clean, reduction="none")
    return (entropy * weight).sum(), entropy.detach().mean()


class Trainer:
    """Owns model, optimizers, averaged weights and the clock of one run."""

    def __init__(
        self,
        seed: int,
        seconds: float,
        tokens: int,
        state: Path,
        init_from: Path | None = None,
        peak: float = 1.0,
    ) -> None:
        torch.manual_seed(seed)
        self.seconds = seconds
        self.tokenizer = build_tokenizer()
        self.source = BatchSource(self.tokenizer, seed, tokens)
        self.model = DemoModel(ModelShape(self.tokenizer.get_vocab_size()), MAX_LENGTH)
        self.goes_on = init_from is not None
        if init_from is not None:
            self.model.load_state_dict(load_checkpoint(init_from)[0].state_dict())
        hidden: list[Tensor] = []
        other: list[Tensor] = []
        for name, weight in self.model.named_parameters():
            (hidden if "blocks" in name and weight.ndim == 2 else other).append(weight)
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr=MUON_LR, weight_decay=0.01),
            torch.optim.AdamW(other, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_lrs = [peak * MUON_LR, peak * ADAM_LR]
        self.ema = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.began = time.monotonic()
        self.num_steps = 0
        self.sheet_ce = self.problem_ce = 5.0
        self.num_tokens = 0
        self.state_file = state / "state.pt"
        if self.state_file.exists():
            self.resume()

    @property
    def trained(self) -> float:
        """Seconds of this run, over all its restarts."""
        return time.monotonic() - self.began

    @property
    def progress(self) -> float:
        return min(1.0, self.trained / self.seconds)

    @property
    def sheet_share(self) -> float:
        """The share of sheets: high at first, then enough not to forget arithmetic."""
        at_first = not self.goes_on and self.progress < 0.4
        return 0.5 if at_first and self.sheet_ce > 0.15 else 0.15

    @property
    def max_steps(self) -> int:
        """The most reasoning steps of most problems: a curriculum from one to three."""
        if self.goes_on:
            return 3
        return 1 if self.progress < 0.2 else 2 if self.progress < 0.35 else 3

    def step(self, batch: Batch) -> float:
        """One update. Returns the plain cross-entropy of the masked tokens."""
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * lr_scale(self.progress)
        loss, plain = masked_loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, self.num_steps / (self.num_steps + 20))
        for name, value in self.model.state_dict().items():
            self.ema[name].lerp_(value, 1 - decay)
        self.num_steps += 1
        self.num_tokens += batch.clean.numel()
        if batch.is_sheet:
            self.sheet_ce += 0.05 * (float(plain) - self.sheet_ce)
        else:
            self.problem_ce += 0.02 * (float(plain) - self.problem_ce)
        return float(plain)

    def save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "counts": (self.trained, self.num_steps, self.num_tokens),
            "stage": (self.sheet_ce, self.problem_ce),
            "rng": (self.source.rng.getstate(), self.source.generator.get_state()),
        }
        fresh = self.state_file.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, self.state_file)

    def resume(self) -> None:
        state = torch.load(self.state_file, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        trained, self.num_steps, self.num_tokens = state["counts"]
        self.sheet_ce, self.problem_ce = state["stage"]
        self.began = time.monotonic() - trained
        self.source.rng.setstate(state["rng"][0])
        self.source.generator.set_state(state["rng"][1])

    def export(self, folder: Path) -> dict[str, object]:
        """Write the averaged weights and answer the held-out problems with them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.ema, self.model.shape, self.tokenizer, folder)
        averaged = DemoModel(self.model.shape, MAX_LENGTH).eval()
        averaged.load_state_dict(self.ema)

        def logits_of(ids: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return averaged(ids)

        tests = heldout(200, seed=7)
        rule = rule_for(self.tokenizer, canvas_len=64)
        score, _ = evaluate(logits_of, self.tokenizer, tests, rule)
        return {
            "heldout_accuracy": score.accuracy,
            "by_template_and_steps": breakdown(tests, score.right),
        }


def run(trainer: Trainer, out: Path, log_file: Path, eval_every: float) -> None:
    def log(entry: dict[str, object]) -> None:
        head = {
            "minutes": round(trainer.trained / 60, 2),
            "steps": trainer.num_steps,
            "tokens": trainer.num_tokens,
        }
        with log_file.open("a") as file:
            file.write(json.dumps({**head, **entry}) + "\n")

    losses: list[float] = []
    next_log = trainer.trained + 30.0
    # An early first export gives a folder to test with before the run ends.
    next_eval = trainer.trained + min(120.0, eval_every)
    while trainer.progress < 1:
        trainer.save()
        for batch in trainer.source.pool(trainer.max_steps, trainer.sheet_share):
            losses.append(trainer.step(batch))
            if trainer.progress >= 1:
                break
            if trainer.trained >= next_log:
                log(
                    {
                        "masked_ce": round(sum(losses) / len(losses), 4),
                        "sheet_ce": round(trainer.sheet_ce, 4),
                        "problem_ce": round(trainer.problem_ce, 4),
                        "max_steps": trainer.max_steps,
                    }
                )
                losses, next_log = [], trainer.trained + 30.0
            if trainer.trained >= next_eval:
                trainer.save()
                log(trainer.export(out))
                next_eval = trainer.trained + eval_every
    trainer.save()
    log(trainer.export(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=demo_path())
    parser.add_argument("--seconds", type=float, default=4500.0)
    parser.add_argument("--eval-every", type=float, default=540.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--init-from", type=Path, help="weights to go on from")
    parser.add_argument("--peak", type=float, default=1.0, help="times all rates")
    parser.add_argument("--batch-tokens", type=int, default=1536)
    args = parser.parse_args()
    args.state_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        args.seed,
        args.seconds,
        args.batch_tokens,
        args.state_dir,
        args.init_from,
        args.peak,
    )
    run(trainer, args.out, args.state_dir / "train_log.jsonl", args.eval_every)


if __name__ == "__main__":
    main()
