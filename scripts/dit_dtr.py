#!/usr/bin/env python3
"""A DiT with Denoising Task Routing in plain PyTorch, for weights that dtr-fused trained.

    from dit_dtr import load
    model = load("runs/digits-paper-0001/checkpoints/0000600/ema.safetensors")
    out = model(x, t, y)        # images [B, C, S, S], timesteps from 0 to 999 and classes, whole numbers [B]

The first C channels of `out` are what the model predicts: the noise, unless the file's metadata have another `prediction`. Where
variances are learned there are C more, v: the logarithm of the variance is (1 + v) / 2 of the way from that of the posterior to that of
beta. Masks are multiplied and everything is computed, so routing saves no time here. The tensors have the names of the official
state_dict.

    scripts/dit_dtr.py ema.safetensors CASE     makes a parity case of the output and its gradient with these weights
    dtr-fused parity CASE                       tells whether dtr-fused computes the same

Needs torch and safetensors, and nothing of this repository: it may be copied.
"""

import argparse
import json
import math
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

TASKS = 1000  # timesteps of the diffusion, each a task of DTR


def windows(c, beta, alpha):
    """Masks of 0 and 1, [TASKS, c]: each timestep has its own window of channels, the same in every block."""
    width = math.floor(c * beta)
    start = torch.tensor([round((t / (TASKS - 1)) ** alpha * (c - width)) for t in range(TASKS)])[:, None]
    channel = torch.arange(c)
    return ((start <= channel) & (channel < start + width)).float()


def subset(c, beta, seed, block):
    """Masks of 0 and 1, [TASKS, c], of random routing: each timestep has its own channels in every block."""
    width, low = math.floor(c * beta), 0xFFFFFFFF
    # Philox4x32-10 (Salmon et al. 2011), as src/rng.rs: the place in the shuffle, the block, the timestep, and what it is for.
    place = torch.arange(width)[:, None].expand(width, TASKS)
    counter = [place, torch.full_like(place, block), torch.arange(TASKS).expand(width, TASKS), torch.full_like(place, 8 << 28)]
    key = [seed & low, seed >> 32]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(second >> 32 & low) ^ counter[1] ^ key[0], second & low, (first >> 32 & low) ^ counter[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    # Of the channels that are left, this one: floor(left * (64 random bits) / 2^64).
    left = c - place
    chosen = place + (counter[0] * left + (counter[1] * left >> 32) >> 32)
    order, channels = torch.arange(c).expand(TASKS, c).contiguous(), []
    for i in range(width):
        channels.append(order.gather(1, chosen[i][:, None]))
        order.scatter_(1, chosen[i][:, None], order[:, i : i + 1].clone())
    return torch.zeros(TASKS, c).scatter_(1, torch.cat(channels, 1), 1)


def positions(side, c):
    """[1, side * side, c]: sines and cosines of the column and then of the row, as DiT has them."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequencies = 1 / 10000 ** (torch.arange(c // 4, dtype=torch.float64) / (c / 4))
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()[None]


class Block(nn.Module):
    def __init__(self, c, heads, mlp, routing):
        super().__init__()
        self.heads, self.routing = heads, routing
        self.norm = nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(c, 3 * c), "proj": nn.Linear(c, c)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c, mlp), "fc2": nn.Linear(mlp, c)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))

    def attention(self, x):
        b, t, c = x.shape
        q, k, v = self.attn["qkv"](x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))

    def forward(self, x, condition, mask=None):
        """`condition` [B, C] comes out of the SiLU already, as it is the same in all blocks; `mask` [B, 1, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation[1](condition)[:, None].chunk(6, -1)
        bypass = x
        if self.routing != "dense":
            x = mask * x
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        if self.routing == "sublayer":
            x = mask * x
        hidden = F.gelu(self.mlp["fc1"](self.norm(x) * (1 + scale2) + shift2), approximate="tanh")
        x = x + gate2 * self.mlp["fc2"](hidden)
        if self.routing == "sublayer":
            x = mask * x
        return x if self.routing == "dense" else x + (1 - mask) * bypass


class DiT(nn.Module):
    def __init__(
        self,
        *,
        hidden_size,
        depth,
        num_heads,
        patch_size,
        input_size,
        in_channels,
        num_classes,
        mlp_size=None,
        learn_sigma=True,
        routing="dense",
        beta=0.8,
        alpha=4.0,
        seed=0,
    ):
        """`seed` is that of random routing."""
        super().__init__()
        if routing not in ("dense", "paper", "sublayer", "random"):
            raise ValueError(f"routing is {routing}, but it may be dense, paper, sublayer or random")
        c, outputs = hidden_size, in_channels * (2 if learn_sigma else 1)
        self.patch, self.side, self.no_class = patch_size, input_size // patch_size, num_classes
        self.register_buffer("pos_embed", positions(self.side, c))
        if routing == "dense":
            masks = None
        elif routing == "random":
            masks = torch.stack([subset(c, beta, seed, block) for block in range(depth)], 1)
        else:
            masks = windows(c, beta, alpha)[:, None].expand(-1, depth, -1)
        self.register_buffer("masks", masks, persistent=False)  # [TASKS, depth, C]
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, c, patch_size, patch_size)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, c), nn.SiLU(), nn.Linear(c, c))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, c)})
        self.blocks = nn.ModuleList(Block(c, num_heads, mlp_size or 4 * c, routing) for _ in range(depth))
        self.norm = nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        last = {"adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(c, 2 * c)), "linear": nn.Linear(c, patch_size**2 * outputs)}
        self.final_layer = nn.ModuleDict(last)

    def forward(self, x, t, y=None):
        """Without `y` the images are of no class, as for guidance."""
        y = torch.full_like(t, self.no_class) if y is None else y
        # Half precision cannot tell timesteps apart.
        exact = torch.promote_types(self.pos_embed.dtype, torch.float32)
        angles = t[:, None].to(exact) * torch.exp(-math.log(10000) * torch.arange(128, dtype=exact, device=t.device) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(self.pos_embed.dtype)
        condition = F.silu(self.t_embedder["mlp"](waves) + self.y_embedder["embedding_table"](y))
        masks = [None] * len(self.blocks) if self.masks is None else self.masks[t][:, :, None].unbind(1)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block, mask in zip(self.blocks, masks):
            x = block(x, condition, mask)
        shift, scale = self.final_layer["adaLN_modulation"][1](condition)[:, None].chunk(2, -1)
        x = self.final_layer["linear"](self.norm(x) * (1 + scale) + shift)
        s, p = self.side, self.patch
        return torch.einsum("nhwpqc->nchpwq", x.view(len(x), s, s, p, p, -1)).reshape(len(x), -1, s * p, s * p)


def read(path, said):
    """A model in f32, its tensors, and the arguments of `DiT`: those in `said`, and the others as the file tells them."""
    with safe_open(path, "pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    try:
        c, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        config = {"hidden_size": c, "patch_size": patch, "in_channels": channels}
        config["depth"] = sum(name.endswith(".attn.qkv.weight") for name in weights)
        config["num_classes"] = len(weights["y_embedder.embedding_table.weight"]) - 1
        config["mlp_size"] = len(weights["blocks.0.mlp.fc1.weight"])
        config["learn_sigma"] = len(weights["final_layer.linear.weight"]) == 2 * channels * patch**2
    except KeyError as error:
        raise ValueError(f"{path} holds no tensor {error}, which a DiT has") from None
    if "pos_embed" in weights:
        config["input_size"] = math.isqrt(weights["pos_embed"].shape[1]) * patch
    for key, kind in [("num_heads", int), ("routing", str), ("beta", float), ("alpha", float), ("seed", int)]:
        if key in metadata:
            config[key] = kind(metadata[key])
    config |= said
    if missing := next((key for key in ("num_heads", "input_size") if key not in config), None):
        raise ValueError(f"{path} does not tell {missing}, which load takes as {missing}=X")
    if "input_size" in said or "pos_embed" not in weights:
        weights["pos_embed"] = positions(config["input_size"] // patch, c)
    model = DiT(**config)
    model.load_state_dict(weights)
    return model.eval(), weights, config


def load(path, **said):
    """The model of a file of weights. Those of dtr-fused tell all of it; of others `said` gives what they do not: `num_heads`, without
    `pos_embed` the `input_size`, and any argument of `DiT`. Where neither tells the routing it is dense."""
    return read(path, said)[0]


def make_case(path, folder):
    """Writes the weights, and on random images the output and a gradient in float64, as `dtr-fused parity` reads them."""
    model, weights, config = read(path, {})
    routing = config.setdefault("routing", "dense")
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 250, 500, 750, 998, 999])
    y = torch.randint(config["num_classes"] + 1, t.shape, generator=generator)
    x = torch.randn(len(t), config["in_channels"], *[config["input_size"]] * 2, generator=generator).requires_grad_()
    out = model.double()(x.double(), t, y)
    upstream = torch.randn(out.shape, generator=generator)
    (gradient,) = torch.autograd.grad((out * upstream).sum(), x)
    # The whole part of so many hidden sizes.
    config["mlp_ratio"] = (config.pop("mlp_size") + 0.5) / config["hidden_size"]
    config |= {"beta": 1.0} if routing == "dense" else {}
    folder.mkdir()
    if routing == "random":
        config["init_method"] = "random"
        masks = {f"blocks.{i}.mask": model.masks[:, i].float().contiguous() for i in range(config["depth"])}
        save_file(masks, folder / "routing.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, folder / "params.safetensors")
    tensors = {"x": x, "t": t, "y": y, "upstream": upstream, "out.f64": out, "grad_x": gradient}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"{'sublayer_' * (routing == 'sublayer')}forward.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="WEIGHTS", type=pathlib.Path)
    parser.add_argument("case", metavar="CASE", type=pathlib.Path, help="folder to make")
    args = parser.parse_args()
    try:
        make_case(args.weights, args.case)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"no case is made of {args.weights}: {error}")


if __name__ == "__main__":
    main()
