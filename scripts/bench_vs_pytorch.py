#!/usr/bin/env python3
"""Compares `dtr-fused bench` with PyTorch (scripts/bench_pytorch.py, eager and compiled) on this machine's CPU or GPU.

Usage: scripts/bench_vs_pytorch.py [--dtr-fused target/release/dtr-fused] [--threads 2] [--rounds 3] [--models DiT-S/2,..]
                                   [--no-compile] [--device cpu|cuda] [--precision f32|bf16]

First both must compute the output and loss of a golden parity case from its weights (PyTorch on the CPU, and for bf16 in f32 too).
Then the programs take turns, `--rounds` times each, and medians are compared. On a CPU a run counts only when other processes had
less than 3 % of the processors during it (/proc/stat), else it is repeated. On a GPU both are timed by the clock of the host. In
bf16 PyTorch runs under autocast, and a CPU needs AMX for dtr-fused. Needs Linux, torch, numpy and safetensors, and a C++ compiler
for torch.compile.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).resolve().parent
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # hidden size, depth, heads


def dit(size, patch, batch):
    """Name: (flags of dtr-fused, flags of bench_pytorch.py)."""
    hidden, depth, heads = SIZES[size]
    name, batch = f"DiT-{size}/{patch}", f"--batch-size {batch}"
    return {name: (f"--model {name} {batch}", f"--hidden-size {hidden} --depth {depth} --heads {heads} --patch {patch} {batch}")}


TINY = (
    "--model digits --batch-size 64",
    "--hidden-size 128 --depth 4 --heads 4 --patch 2 --size 8 --channels 1 --classes 10 --batch-size 64",
)
MODELS = {
    "cpu": dit("S", 2, 8) | dit("S", 4, 8) | dit("B", 4, 8) | {"tiny": TINY},
    "cuda": dit("S", 2, 32) | dit("B", 2, 32) | dit("L", 2, 32) | dit("XL", 2, 32),
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


def undisturbed(command, attempts, allowed):
    for attempt in range(attempts):
        output, others = run(command)
        if others < allowed:
            report = json.loads(output)
            # Ours tells the device's time and the host's: PyTorch is timed by the host's.
            report["step_seconds"] = report.get("host_seconds", report["step_seconds"])
            print(f"  {' '.join(command[1:])}: step {report['step_seconds']:.4f} s", file=sys.stderr)
            return report
        print(f"  repeated: others had {others:.0%} of the processors", file=sys.stderr)
    sys.exit("this machine is too busy to measure on")


def check_losses(program, where, precision):
    """Both must give the output and loss of the dense golden case from its weights; ours, of the routed ones too."""
    golden = SCRIPTS.parent / "tests/golden"
    # What f32 would show, the rounding of bf16 may hide.
    for of_pytorch in dict.fromkeys(["f32", precision]):
        command = [sys.executable, str(SCRIPTS / "bench_pytorch.py"), "--check", str(golden / "c"), "--precision", of_pytorch]
        print(run(command)[0].strip())
    print(run([program, "parity", *where, str(golden / "a"), str(golden / "c")])[0].strip().splitlines()[-1])


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
    parser.add_argument("--models", help="default: all")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    a = parser.parse_args()
    known, on_gpu = MODELS[a.device], a.device == "cuda"
    models = a.models.split(",") if a.models else list(known)
    unknown = [model for model in models if model not in known]
    if unknown:
        parser.error(f"--models has {unknown[0]!r}; known are {', '.join(known)}")
    sys.stdout.reconfigure(line_buffering=True)
    import torch

    device = torch.cuda.get_device_name() if on_gpu else f"{processor()}, {os.cpu_count()} processors; {a.threads} threads"
    print(f"{device}; {a.precision}; PyTorch {torch.__version__}; {datetime.date.today()}")
    where = ["--device", a.device, "--precision", a.precision]
    check_losses(a.dtr_fused, where, a.precision)
    common = [*where, "--threads", str(a.threads), "--runs", str(a.runs)]
    # Neither program measures the processor of a machine with a GPU.
    allowed = math.inf if on_gpu else OTHERS
    peers = {"eager": []} | ({} if a.no_compile else {"compiled": ["--compile"]})
    rows = []
    for model in models:
        ours, theirs = known[model]
        found = {name: [] for name in [*peers, *ROUTES]}
        for _ in range(a.rounds):
            for name, flags in peers.items():
                command = [sys.executable, str(SCRIPTS / "bench_pytorch.py"), *theirs.split(), *common, *flags, "--json"]
                found[name].append(undisturbed(command, a.attempts, allowed))
            for name, flags in ROUTES.items():
                command = [a.dtr_fused, "bench", *ours.split(), *flags.split(), *common, "--json"]
                found[name].append(undisturbed(command, a.attempts, allowed))
        median = lambda name, key: statistics.median(run[key] for run in found[name])
        on_cpu_only = [("forward", "forward_seconds"), ("DDIM step", "sampling_seconds")]
        for what, key in [("step", "step_seconds")] + ([] if on_gpu else on_cpu_only):
            best = min(median(name, key) for name in peers)
            cells = [f"{median(name, key):.4f}" for name in peers]
            cells += [f"{median(name, key):.4f} ({best / median(name, key):.2f}x)" for name in ROUTES]
            rows.append(f"| {model}, {what} | " + " | ".join(cells) + " |")
        if on_gpu:
            continue
        memory = min(median(name, "peak_memory_mb") - median(name, "import_memory_mb") for name in peers)
        rows.append(f"| {model}, peak MB | {memory:.0f} |" + " |" * (len(peers) - 1) + "".join(f" {median(n, 'peak_memory_mb'):.0f} |" for n in ROUTES))
    names = [f"PyTorch {name}" for name in peers] + list(ROUTES)
    print(f"| seconds{', bf16' * (a.precision == 'bf16')} | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
