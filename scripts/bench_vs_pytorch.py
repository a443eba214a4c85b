#!/usr/bin/env python3
"""Compares `dtr-fused bench` with PyTorch (scripts/bench_pytorch.py, eager and compiled) on this machine's CPU.

Usage: scripts/bench_vs_pytorch.py [--dtr-fused target/release/dtr-fused] [--threads 2] [--rounds 3] [--models DiT-S/2,..]
                                   [--no-compile]

First both must compute the output and loss of a golden parity case from its weights. Then the programs take turns, `--rounds`
times each, and medians are compared. A run counts only when other processes had less than 3 % of the processors during it
(/proc/stat), else it is repeated. Needs Linux, torch, numpy and safetensors, and a C++ compiler for torch.compile.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).resolve().parent
MODELS = {
    # name: (flags of dtr-fused, flags of bench_pytorch.py)
    "DiT-S/2": ("--model DiT-S/2 --batch-size 8", "--hidden-size 384 --depth 12 --heads 6 --patch 2 --batch-size 8"),
    "DiT-S/4": ("--model DiT-S/4 --batch-size 8", "--hidden-size 384 --depth 12 --heads 6 --patch 4 --batch-size 8"),
    "DiT-B/4": ("--model DiT-B/4 --batch-size 8", "--hidden-size 768 --depth 12 --heads 12 --patch 4 --batch-size 8"),
    "tiny": (
        "--model digits --batch-size 64",
        "--hidden-size 128 --depth 4 --heads 4 --patch 2 --size 8 --channels 1 --classes 10 --batch-size 64",
    ),
}
ROUTES = {
    "dense": "--routing dense",
    "paper 0.8": "--routing paper --beta 0.8",
    "sublayer 0.8": "--routing sublayer --beta 0.8",
    "sublayer 0.5": "--routing sublayer --beta 0.5",
}
OTHERS = 0.03  # largest share of the processors that other processes may have during a run
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}


def busy_seconds():
    """Processor time of everything on this machine, stolen time included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, open("/proc/stat").readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def run(command):
    """Output of `command`, and the share of the processors that others had meanwhile."""
    before, wall = busy_seconds(), os.times()
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    after, now = busy_seconds(), os.times()
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    own = now.children_user + now.children_system - wall.children_user - wall.children_system
    return result.stdout, max(0.0, after - before - own) / (now.elapsed - wall.elapsed) / os.cpu_count()


def undisturbed(command, attempts):
    for attempt in range(attempts):
        output, others = run(command)
        if others < OTHERS:
            report = json.loads(output)
            print(f"  {' '.join(command[1:])}: step {report['step_seconds']:.4f} s", file=sys.stderr)
            return report
        print(f"  repeated: others had {others:.0%} of the processors", file=sys.stderr)
    sys.exit("this machine is too busy to measure on")


def check_losses(program):
    """Both must give the output and loss of the dense golden case from its weights; ours, of the routed ones too."""
    golden = SCRIPTS.parent / "tests/golden"
    print(run([sys.executable, str(SCRIPTS / "bench_pytorch.py"), "--check", str(golden / "c")])[0].strip())
    print(run([program, "parity", str(golden / "a"), str(golden / "c")])[0].strip().splitlines()[-1])


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtr-fused", default=str(SCRIPTS.parent / "target/release/dtr-fused"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3, help="steps in a round")
    parser.add_argument("--attempts", type=int, default=20, help="how often a disturbed run is repeated")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    a = parser.parse_args()
    models = a.models.split(",")
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        parser.error(f"--models has {unknown[0]!r}; known are {', '.join(MODELS)}")
    sys.stdout.reconfigure(line_buffering=True)
    import torch

    check_losses(a.dtr_fused)
    print(f"{processor()}, {os.cpu_count()} processors; {a.threads} threads; PyTorch {torch.__version__}; {datetime.date.today()}")
    common = ["--threads", str(a.threads), "--runs", str(a.runs)]
    peers = {"eager": []} | ({} if a.no_compile else {"compiled": ["--compile"]})
    rows = []
    for model in models:
        ours, theirs = MODELS[model]
        found = {name: [] for name in [*peers, *ROUTES]}
        for _ in range(a.rounds):
            for name, flags in peers.items():
                command = [sys.executable, str(SCRIPTS / "bench_pytorch.py"), *theirs.split(), *common, *flags, "--json"]
                found[name].append(undisturbed(command, a.attempts))
            for name, flags in ROUTES.items():
                command = [a.dtr_fused, "bench", *ours.split(), *flags.split(), *common, "--json"]
                found[name].append(undisturbed(command, a.attempts))
        median = lambda name, key: statistics.median(run[key] for run in found[name])
        memory = min(median(name, "peak_memory_mb") - median(name, "import_memory_mb") for name in peers)
        for what, key in [("step", "step_seconds"), ("forward", "forward_seconds")]:
            best = min(median(name, key) for name in peers)
            cells = [f"{median(name, key):.4f}" for name in peers]
            cells += [f"{median(name, key):.4f} ({best / median(name, key):.2f}x)" for name in ROUTES]
            rows.append(f"| {model}, {what} | " + " | ".join(cells) + " |")
        rows.append(f"| {model}, peak MB | {memory:.0f} |" + " |" * (len(peers) - 1) + "".join(f" {median(n, 'peak_memory_mb'):.0f} |" for n in ROUTES))
    names = [f"PyTorch {name}" for name in peers] + list(ROUTES)
    print("| seconds | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
