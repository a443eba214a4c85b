#!/usr/bin/env python3
"""A DiT with Denoising Task Routing in plain PyTorch, for weights that dtr-fused trained.

    from dit_dtr import load, sample
    model = load("runs/digits-paper-0001/checkpoints/0000600/ema.safetensors")
    out = model(x, t, y)        # images [B, C, S, S], timesteps from 0 to 999 and classes, whole numbers [B]
    images = sample(model, [3, 7], cfg=2, seed=1)       # [2, C, S, S]: what dtr-fused sample makes of these classes, but for rounding

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
LEAST_HALF_LOG_SNR = -5.1  # that of the linear schedule's end: in more noise images are all alike


def windows(c, beta, alpha):
    """Masks of 0 and 1, [TASKS, c]: each timestep has its own window of channels, the same in every block."""
    width = math.floor(c * beta)
    start = torch.tensor([round((t / (TASKS - 1)) ** alpha * (c - width)) for t in range(TASKS)])[:, None]
    channel = torch.arange(c)
    return ((start <= channel) & (channel < start + width)).float()


def philox(counter, seed):
    """Four random words of 32 bits: Philox4x32-10 (Salmon et al. 2011), as src/rng.rs counts: the place, what has it (a block or an image),
    the timestep or step, and what it is for."""
    low = 0xFFFFFFFF
    key = [seed & low, seed >> 32]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(second >> 32 & low) ^ counter[1] ^ key[0], second & low, (first >> 32 & low) ^ counter[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter


def subset(c, beta, seed, block):
    """Masks of 0 and 1, [TASKS, c], of random routing: each timestep has its own channels in every block."""
    width = math.floor(c * beta)
    place = torch.arange(width)[:, None].expand(width, TASKS)
    words = philox([place, torch.full_like(place, block), torch.arange(TASKS).expand(width, TASKS), torch.full_like(place, 8 << 28)], seed)
    # Of the channels that are left, this one: floor(left * (64 random bits) / 2^64).
    left = c - place
    chosen = place + (words[0] * left + (words[1] * left >> 32) >> 32)
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
        prediction="noise",
        schedule="linear",
        data_kind="auto",
        label_dropout=0.1,
    ):
        """`seed` is that of random routing; what follows it only `sample` asks for."""
        super().__init__()
        if routing not in ("dense", "paper", "sublayer", "random"):
            raise ValueError(f"routing is {routing}, but it may be dense, paper, sublayer or random")
        c, outputs = hidden_size, in_channels * (2 if learn_sigma else 1)
        self.prediction, self.schedule, self.label_dropout, self.channels = prediction, schedule, label_dropout, in_channels
        self.images = data_kind == "images" or data_kind == "auto" and in_channels in (1, 3)
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
    kinds = {"num_heads": int, "routing": str, "beta": float, "alpha": float, "seed": int}
    kinds |= {"prediction": str, "schedule": str, "data_kind": str, "label_dropout": float}
    config |= {key: kind(metadata[key]) for key, kind in kinds.items() if key in metadata}
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
    `pos_embed` the `input_size`, and any argument of `DiT`. Where neither tells the routing it is dense, and for `sample` the prediction is
    noise and the schedule linear, as of DiT's own weights."""
    return read(path, said)[0]


def alphas_cumprod(prediction, schedule):
    """The share of the image in the variance of x_t, for every timestep."""
    if prediction == "flow":
        s = (torch.arange(TASKS, dtype=torch.float64) + 0.5) / TASKS
        return ((1 - s) ** 2 / ((1 - s) ** 2 + s**2)).tolist()
    if prediction not in ("noise", "v") or schedule not in ("linear", "cosine"):
        raise ValueError(f"prediction is {prediction} and schedule {schedule}, but they may be noise or v and linear or cosine, or flow")
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, TASKS, dtype=torch.float64)
    else:
        signal = ((torch.arange(TASKS + 1, dtype=torch.float64) / TASKS + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0).tolist()


def spaced(sampler, steps, half_log_snr):
    """So many timesteps from 0 to 999: evenly spread, for dpm++ over the logarithm of the signal-to-noise ratio."""
    if not 1 <= steps <= TASKS:
        raise ValueError(f"steps is {steps}, but it may be from 1 to {TASKS}")
    kept = []
    if sampler == "dpm++":
        places = [max(place, LEAST_HALF_LOG_SNR) for place in half_log_snr]
        for i in range(steps - 1):
            wanted = places[0] + (places[-1] - places[0]) * i / (steps - 1)
            free = range(kept[-1] + 1 if kept else 0, TASKS - steps + i + 1)
            kept.append(min(free, key=lambda t: abs(places[t] - wanted)))
    else:
        place = 0.0
        for _ in range(steps - 1):
            kept.append(round(place))
            place += (TASKS - 1) / (steps - 1)
    return kept + [TASKS - 1]


def normals(seed, purpose, step, first, shape):
    """Standard normal numbers for images from number `first` on, as src/rng.rs draws them, but for rounding."""
    numbers = math.prod(shape[1:])
    place = torch.arange(-(-numbers // 4)).expand(shape[0], -1)
    image = torch.arange(first, first + shape[0])[:, None].expand_as(place)
    words = philox([place, image, torch.full_like(place, step), torch.full_like(place, purpose << 28)], seed)
    drawn = []
    for a, turn in (words[:2], words[2:]):
        radius = (-2 * (((a >> 9).double() + 0.5) / 2**23).log()).sqrt()
        angle = turn.double() * (2 * math.pi / 2**32)
        drawn += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(drawn, -1).flatten(1)[:, :numbers].reshape(shape).float()


@torch.no_grad()
def sample(model, labels, *, sampler="ddim", steps=None, eta=0.0, cfg=None, cfg_channels=None, cfg_interval=None, seed=0, first=0):
    """Images or latents [B, C, S, S] of the classes `labels` [B] (`model.no_class` is none): those that `dtr-fused sample` makes.

    Arguments are as its flags, `sampler` ddim, dpm++ or ddpm; `steps` may be increasing timesteps too, and `cfg_interval` is a range of
    them. `first` is the number of the first image among all of this seed: without it every call has the same noise. Images lie from -1 to
    1, in bytes `(127.5 * images + 128).clamp(0, 255).byte()`.
    """
    usual = {"ddim": 50, "dpm++": 20, "ddpm": 250}
    if sampler not in usual:
        raise ValueError(f"sampler is {sampler}, but it may be {', '.join(usual)}")
    guidable = 0 < model.label_dropout < 1
    cfg = (1.5 if guidable else 1) if cfg is None else cfg
    if cfg != 1 and not guidable:
        raise ValueError(f"cfg is {cfg}, but a model that was trained with label_dropout {model.label_dropout:g} cannot be guided: give 1")
    bars = alphas_cumprod(model.prediction, model.schedule)
    half_log_snr = [0.5 * math.log(bar / (1 - bar)) for bar in bars]
    steps = usual[sampler] if steps is None else steps
    timesteps = spaced(sampler, steps, half_log_snr) if isinstance(steps, int) else steps
    last = TASKS - 1
    if model.prediction == "noise" and not model.images:
        # In more noise an estimate that is not clipped is lost.
        last = max(t for t in range(TASKS) if half_log_snr[t] >= LEAST_HALF_LOG_SNR)
    timesteps = sorted({min(t, last) for t in timesteps}, reverse=True)
    c, side, device = model.channels, model.side * model.patch, model.pos_embed.device
    labels, shape = torch.as_tensor(labels, device=device), (len(labels), c, side, side)
    x, x_0 = normals(seed, 6, 0, first, shape).to(device), None
    for k, t in enumerate(timesteps):
        signal, spread = math.sqrt(bars[t]), math.sqrt(1 - bars[t])
        # A flow is given (1 - s) x_0 + s noise.
        scale = 1 / (signal + spread) if model.prediction == "flow" else 1
        guided = cfg != 1 and (cfg_interval is None or t in cfg_interval)
        y = torch.cat([labels, torch.full_like(labels, model.no_class)]) if guided else labels
        given = (scale * x).to(model.pos_embed.dtype).repeat(2 if guided else 1, 1, 1, 1)
        out = model(given, torch.full_like(y, t), y).float()
        answer, v = out[: len(x), :c], out[: len(x), c:]
        if guided:
            n, without = c if cfg_channels is None else cfg_channels, out[len(x) :]
            answer = torch.cat([without[:, :n] + cfg * (answer[:, :n] - without[:, :n]), answer[:, n:]], 1)
        before = x_0
        if model.prediction == "noise":
            x_0 = (x - spread * answer) / signal
        else:
            x_0 = (signal if model.prediction == "v" else scale) * x - scale * spread * answer
        if model.images:
            x_0 = x_0.clamp(-1, 1)
        if t == timesteps[-1]:
            return x_0
        bar, prev = bars[t], bars[timesteps[k + 1]]
        beta = 1 - bar / prev
        posterior = beta * (1 - prev) / (1 - bar)
        if sampler == "ddpm":
            # Ho et al. 2020, equation 7; the variance is learned (Nichol and Dhariwal 2021, equation 15) or the larger of the fixed ones.
            x = (beta * math.sqrt(prev) * x_0 + (1 - prev) * math.sqrt(bar / prev) * x) / (1 - bar)
            sigma = (((1 + v) * math.log(beta) + (1 - v) * math.log(posterior)) / 4).exp() if v.shape[1] else math.sqrt(beta)
        else:
            # Song et al. 2021, equation 12. DPM-Solver++(2M), Lu et al. 2022, algorithm 2, carries x_0 on as it changed.
            estimate, sigma = x_0, eta * math.sqrt(posterior) if sampler == "ddim" else 0
            if sampler == "dpm++" and k:
                later, now, sooner = (half_log_snr[timesteps[j]] for j in (k + 1, k, k - 1))
                estimate = x_0 + (later - now) / (2 * (now - sooner)) * (x_0 - before)
            epsilon = (x - signal * estimate) / spread
            x = math.sqrt(prev) * estimate + math.sqrt(max(0, 1 - prev - sigma**2)) * epsilon
        if sampler == "ddpm" or sigma:
            x = x + sigma * normals(seed, 7, k, first, shape).to(device)


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
