"""``python -m sglang_dllm``: doctor, demo-path, download-model, replay, lm-eval."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang_dllm")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="check the installation or a checkpoint; non-zero if broken"
    )
    _add_checkpoint_flags(doctor)
    commands.add_parser("demo-path", help="print the demo checkpoint's folder")
    fetcher = commands.add_parser(
        "download-model", help="fetch a checkpoint and check its hashes; resumable"
    )
    fetcher.add_argument(
        "source",
        help="a repository of the hub (HF_ENDPOINT names a mirror), or the address of "
        "a folder that has SHA256SUMS",
    )
    fetcher.add_argument("folder", type=Path)
    fetcher.add_argument("--revision", default="main", help="branch, tag or commit")
    player = commands.add_parser("replay", help="show a trace in the terminal")
    player.add_argument("trace", type=Path, help="JSON of dllm.trace, or of an answer")
    player.add_argument(
        "--speed", type=_speed, default=10.0, help="forwards a second; default: 10"
    )
    player.add_argument("--step", action="store_true", help="wait for Enter instead")
    commands.add_parser(
        "lm-eval", help="lm-eval's own command line, with --model sglang_dllm"
    )
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lm-eval"]:
        from sglang_dllm.lm_eval_model import run

        return run(argv[1:])
    args = parser.parse_args(argv)
    if args.command == "demo-path":
        from sglang_dllm.demo import demo_path

        print(demo_path())
        return 0
    if args.command == "replay":
        from sglang_dllm.replay import replay

        return replay(args.trace, sys.stdout, speed=args.speed, by_key=args.step)
    if args.command == "download-model":
        return _download(args)
    if args.model is not None:
        from sglang_dllm.doctor_model import report_checkpoint

        return report_checkpoint(args, sys.stdout)
    from sglang_dllm.doctor import report

    return report(sys.stdout)


def _download(args: argparse.Namespace) -> int:
    from sglang_dllm.download import DownloadError, download

    try:
        download(args.source, args.folder, args.revision, sys.stdout)
    except DownloadError as error:
        print(f"sglang-dllm: error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_checkpoint_flags(doctor: argparse.ArgumentParser) -> None:
    """Flags of ``doctor --model``; those that SGLang has too have its names."""
    doctor.add_argument("--model", help="folder of a checkpoint: would it load here?")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--device", choices=("cpu", "cuda"), help="default: this one's")
    doctor.add_argument(
        "--device-memory", type=float, help="of the device, in GiB; default: this one's"
    )
    doctor.add_argument("--context-length", type=int, help="default: the model's")
    doctor.add_argument("--max-running-requests", type=int, help="canvases at once")
    doctor.add_argument("--dtype", default="auto")
    doctor.add_argument("--attention-backend")
    doctor.add_argument("--json-model-override-args", default="{}")


def _speed(text: str) -> float:
    speed = float(text)
    if not 0 < speed <= 1000:
        raise argparse.ArgumentTypeError("expected a number above 0, up to 1000")
    return speed


if __name__ == "__main__":
    sys.exit(main())
