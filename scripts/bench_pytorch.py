#!/usr/bin/env python3
"""Times a DiT training step in plain, idiomatic PyTorch: what `dtr-fused bench` is compared with.

Usage: scripts/bench_pytorch.py [--hidden-size 384] [--depth 12] [--heads 6] [--patch 2] [--size 32] [--channels 4]
                                [--batch-size 8] [--threads 2] [--runs 5]

scaled_dot_product_attention, fused AdamW and a foreach moving average, f32 on the CPU. Routing changes nothing in PyTorch
(masking computes everything), so the model is dense. The loss is the squared error of both halves of the output: the
variational bound of the real loss, a small part of the time, is left out in PyTorch's favour. Needs torch.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.fc1, self.fc2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.modulation = nn.Linear(c, 6 * c)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x) * (1 + scale1) + shift1).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))
        hidden = F.gelu(self.fc1(self.norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.fc2(hidden)


class DiT(nn.Module):
    def __init__(self, a):
        super().__init__()
        c, self.patch, self.side = a.hidden_size, a.patch, a.size // a.patch
        self.x = nn.Conv2d(a.channels, c, a.patch, a.patch)
        self.register_buffer("positions", torch.randn(1, self.side**2, c) * 0.02)
        self.t = nn.Sequential(nn.Linear(256, c), nn.SiLU(), nn.Linear(c, c))
        self.y = nn.Embedding(1001, c)
        self.blocks = nn.ModuleList(Block(c, a.heads) for _ in range(a.depth))
        self.norm = nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(c, 2 * c)
        self.out = nn.Linear(c, a.patch**2 * 2 * a.channels)

    def forward(self, x, t, y):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t[:, None].float() * frequencies
        condition = F.silu(self.t(torch.cat([angles.cos(), angles.sin()], 1)) + self.y(y))
        x = self.x(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        s, p = self.side, self.patch
        return torch.einsum("nhwpqc->nchpwq", x.view(len(x), s, s, p, p, -1)).reshape(len(x), -1, s * p, s * p)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    defaults = {"hidden_size": 384, "depth": 12, "heads": 6, "patch": 2, "size": 32, "channels": 4, "batch_size": 8, "threads": 2, "runs": 5}
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = DiT(a)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True, weight_decay=0)
    average = [p.detach().clone() for p in model.parameters()]
    x_start = torch.randn(a.batch_size, a.channels, a.size, a.size)
    t, y = torch.randint(0, 1000, (a.batch_size,)), torch.randint(0, 1000, (a.batch_size,))
    steps, forwards = [], []
    cpu = 0
    for run in range(a.runs + 2):
        if run == 2:
            cpu = time.process_time()
        start = time.perf_counter()
        noise = torch.randn_like(x_start)
        out = model(0.6 * x_start + 0.8 * noise, t, y)
        middle = time.perf_counter()
        loss = ((out[:, : a.channels] - noise) ** 2).mean() + (out[:, a.channels :] ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1e-4)
        if run >= 2:
            steps.append(time.perf_counter() - start)
            forwards.append(middle - start)
    median = lambda seconds: sorted(seconds)[len(seconds) // 2]
    print(f"PyTorch {torch.__version__}, {a.threads} threads: training step {median(steps) * 1e3:.1f} ms, of it forward {median(forwards) * 1e3:.1f} ms; cpu {(time.process_time() - cpu) / a.runs:.3f} s")


if __name__ == "__main__":
    main()
