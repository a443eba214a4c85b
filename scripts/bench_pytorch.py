#!/usr/bin/env python3
"""Times a DiT training step, a forward pass and a DDIM step in plain, idiomatic PyTorch: what `dtr-fused bench` is compared with.

Usage: scripts/bench_pytorch.py [--hidden-size 384] [--depth 12] [--heads 6] [--patch 2] [--size 32] [--channels 4]
                                [--classes 1000] [--batch-size 8] [--threads 2] [--runs 5] [--compile] [--json]
                                [--device cpu|cuda] [--precision f32|bf16]
       scripts/bench_pytorch.py --check CASE [--precision f32|bf16]      runs the dense parity case CASE instead, on the CPU

The model of scripts/dit_dtr.py with scaled_dot_product_attention, fused AdamW and a foreach moving average; bf16 is autocast over
weights in f32. Routing saves nothing in PyTorch (masking computes everything), so the model is dense. `--compile` compiles the model;
on a GPU block by block, since there that runs as fast and starts in seconds. The loss is the squared error of both halves of the
output: the variational bound of the real loss, a small part of the time, is left out in PyTorch's favour. Needs torch and safetensors.
"""

import argparse
import json
import math
import pathlib
import resource
import sys
import time

import torch
from safetensors.torch import load_file

from dit_dtr import DiT, load


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    defaults = {"hidden_size": 384, "depth": 12, "heads": 6, "patch": 2, "size": 32, "channels": 4, "classes": 1000, "batch_size": 8, "threads": 2, "runs": 5}
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--check", metavar="CASE", help="compare the output with that of a dense parity case, and exit")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--compile", action="store_true", help="compile the model with inductor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    a = parser.parse_args()
    imported = peak_memory_mb()
    torch.set_num_threads(a.threads)
    if a.check:
        sys.exit(check(pathlib.Path(a.check), a.precision))
    on_gpu = a.device == "cuda"
    sizes = {"hidden_size": a.hidden_size, "depth": a.depth, "num_heads": a.heads, "patch_size": a.patch, "input_size": a.size}
    model = DiT(**sizes, in_channels=a.channels, num_classes=a.classes).to(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True, weight_decay=0)
    average = [p.detach().clone() for p in model.parameters()]
    if a.compile and on_gpu:
        for block in model.blocks:
            block.compile()
    run_model = torch.compile(model) if a.compile and not on_gpu else model
    autocast = torch.autocast(a.device, torch.bfloat16, enabled=a.precision == "bf16")
    x_start = torch.randn(a.batch_size, a.channels, a.size, a.size, device=a.device)
    t = torch.randint(0, 1000, (a.batch_size,), device=a.device)
    y = torch.randint(0, a.classes, (a.batch_size,), device=a.device)

    def step():
        noise = torch.randn_like(x_start)
        with autocast:
            out = run_model(0.6 * x_start + 0.8 * noise, t, y).float()
        loss = ((out[:, : a.channels] - noise) ** 2).mean() + (out[:, a.channels :] ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1e-4)

    @torch.inference_mode()
    def forward():
        with autocast:
            run_model(x_start, t, y)

    # Two DDIM steps of the linear schedule, without guidance: as `dtr-fused bench` times them.
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()

    @torch.inference_mode()
    def sampling():
        x = torch.randn_like(x_start)
        for now, bar, before in [(666, bars[666], bars[333]), (333, bars[333], 1.0)]:
            with autocast:
                epsilon = run_model(x, torch.full_like(t, now), y).float()[:, : a.channels]
            x_0 = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
            x = math.sqrt(before) * x_0 + math.sqrt(1 - before) * epsilon

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    step_seconds, step_cpu = median(step, a.runs, wait)
    forward_seconds, _ = median(forward, a.runs, wait)
    sampling_seconds = median(sampling, a.runs, wait)[0] / 2
    report = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": a.precision,
        "threads": a.threads,
        "compiled": a.compile,
        "step_seconds": step_seconds,
        "step_cpu_seconds": step_cpu,
        "forward_seconds": forward_seconds,
        "sampling_seconds": sampling_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "import_memory_mb": imported,
        "peak_device_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None,
    }
    if a.json:
        print(json.dumps(report))
    else:
        step, forward, sampling_step = step_seconds * 1e3, forward_seconds * 1e3, sampling_seconds * 1e3
        print(
            f"PyTorch {torch.__version__}, {report['device']}, {a.threads} threads: training step {step:.1f} ms, "
            f"forward pass {forward:.1f} ms, DDIM step {sampling_step:.1f} ms"
        )


def check(case, precision):
    """Exit status: whether the weights of a dense case give its output and its squared error here."""
    config = json.loads((case / "config.json").read_text())
    assert config["beta"] == 1, "what is timed is the dense model: give a dense case"
    model = load(case / "params.safetensors", num_heads=config["num_heads"])
    given = load_file(case / "forward.safetensors")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = model(given["x"].float(), given["t"].long(), given["y"].long()).double()
    error = (out - given["out.f64"]).abs().max().item() / given["out.f64"].abs().max().item()
    loss, expected = (((o[:, : config["in_channels"]] - given["noise"]) ** 2).mean().item() for o in (out, given["out.f64"]))
    print(f"{case.name}{', bf16' * (precision == 'bf16')}: squared error {loss:.7f}, expected {expected:.7f}; output off by {error:.1e} of its largest number")
    # In bf16 three times what PyTorch 2.15 was off by (6.8e-3), and of the loss what `dtr-fused parity` tolerates of the mean.
    of_output, of_loss = (2e-2, 1e-3) if precision == "bf16" else (1e-5, 1e-5)
    return 0 if error <= of_output and abs(loss - expected) <= of_loss * expected else 1


def median(work, runs, wait):
    """Median seconds of `work`, after two that are not timed, and the mean processor time. `wait` waits for the device."""
    for _ in range(2):
        work()
    wait()
    seconds, cpu = [], time.process_time()
    for _ in range(runs):
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[runs // 2], (time.process_time() - cpu) / runs


def peak_memory_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
