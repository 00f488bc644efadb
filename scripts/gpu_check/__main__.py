"""`python -m scripts.gpu_check`: tests, invariance, training and benchmarks on this CUDA device, in under nine minutes.

Needs torch, triton, numpy and a C compiler; without pytest the tests are left out, without Ray or accelerate the
training, and that is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from scripts.gpu_check.report import ROOT, Report, Row, environment

LIMIT_SECONDS = 520.0


def main() -> int:
    """0 if every check passed; 1 if one failed or a section could not run; 2 without a device."""
    options = parse(sys.argv[1:])
    problem = why_not()
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    facts = environment()
    facts["commit"] = options.commit or facts["commit"]
    slug = re.sub(r"[^a-z0-9]+", "_", facts["card"].lower()).strip("_")
    report = Report(
        output=options.output or ROOT / "docs" / "results" / f"gpu_check_{slug}.json", limit_seconds=options.seconds,
        facts=facts,
    )  # fmt: skip
    report.say(", ".join(f"{name} {value}" for name, value in facts.items()))
    run_sections(report, set(options.only or SECTIONS))
    report.facts["total_seconds"] = round(options.seconds - report.seconds_left, 1)
    report.write()
    report.say(f"{'SOME CHECKS FAILED' if report.has_failed else 'all passed'}; wrote {report.output}")
    return int(report.has_failed)


SECTIONS = ("tests", "fingerprint", "invariance", "trainer", "matmul", "attention", "decode", "device-steps")


def run_sections(report: Report, chosen: set[str]) -> None:
    """Checks first, with the tests beside them; then measurements, when nothing else runs."""
    from scripts.gpu_check import engine_bench, invariance, kernel_bench
    from scripts.gpu_check.card import Card, card_of, measured_bandwidth

    tests = start_tests(report) if "tests" in chosen else None
    try:
        if "fingerprint" in chosen:
            report.run("fingerprint", 90, fingerprint_rows)
        if "invariance" in chosen:
            report.run("invariance", 170, invariance.invariance_rows)
        if "trainer" in chosen:
            run_trainer(report)
        if tests is not None:
            report.run("tests", 100, partial(tests.wait, seconds=min(90.0, report.seconds_left)))
    finally:
        if tests is not None:
            tests.close()
    bandwidth = measured_bandwidth()
    card: Card = card_of(report.facts["card"], bandwidth)
    report.facts |= {"copy_bandwidth": bandwidth, "nominal_bandwidth": card.bandwidth, "nominal_flops": card.flops}
    measurements: list[tuple[str, str, float, Callable[[list[Row]], None]]] = [
        ("decode", "decode qwen3-1.7b", 90, partial(engine_bench.throughput_rows, card, "qwen3-1.7b")),
        ("device-steps", "device steps qwen3-1.7b", 70, partial(engine_bench.device_step_rows, card, "qwen3-1.7b")),
        ("attention", "attention", 40, partial(kernel_bench.attention_rows, card)),
        ("matmul", "matmul", 60, partial(kernel_bench.matmul_rows, card)),
        ("matmul", "head", 20, partial(kernel_bench.head_rows, card)),
        ("decode", "decode qwen3-0.6b", 60, partial(engine_bench.throughput_rows, card, "qwen3-0.6b")),
        ("device-steps", "device steps qwen3-0.6b", 50, partial(engine_bench.device_step_rows, card, "qwen3-0.6b")),
    ]
    for section, name, budget, measure in measurements:
        if section in chosen:
            report.run(name, budget, measure)
            engine_bench.collect_memory()


def run_trainer(report: Report) -> None:
    """Rounds of training, where what trainers are made of is installed."""
    missing = [name for name in ("ray", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        report.say(f"{' and '.join(missing)} not installed: the trainer section is left out")
        report.facts["skipped_trainer"] = f"the trainer section: {' and '.join(missing)} not installed"
        return
    from scripts.gpu_check.trainer_check import trainer_rows

    report.run("trainer", 60, trainer_rows)


def start_tests(report: Report):
    """The tests, running beside what follows; None where they cannot."""
    from scripts.gpu_check.gpu_tests import GPUTests

    if importlib.util.find_spec("pytest") is None:
        report.say("pytest is not installed: tests/kernels/gpu is left out; the invariance section checks the same")
        report.facts["skipped"] = "tests/kernels/gpu: pytest is not installed"
        return None
    try:
        return GPUTests()
    except RuntimeError as error:
        report.say(f"the tests did not start: {error}")
        report.sections["tests"] = {"rows": [], "error": str(error), "seconds": 0.0}
        return None


def fingerprint_rows(rows: list[Row]) -> None:
    """The self-test of both profiles, which also says what this device is called."""
    from engine.ops import make_ops

    for numerics in ("bfloat16", "float32"):
        ops = make_ops(numerics, "cuda")
        rows.append({"profile": ops.profile.name, "fingerprint": ops.fingerprint(), "passed": True})


def why_not() -> str | None:
    """What keeps this from running; None if nothing does."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 would run the kernels on the CPU: unset it"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device: run this on a machine with one"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6'"
    return None


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; default: docs/results/gpu_check_CARD.json")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="time for everything (default: 520)")
    parser.add_argument("--commit", help="of the code, where this copy of it is no git checkout")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="some sections; default: all")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
