#!/usr/bin/env python3
"""Makes a case for `dtr-fused parity` with PyTorch: a small DiT with Denoising Task Routing, in float64.

A second, independent implementation in the plainest form: masks are multiplied, gradients come from autograd. Needs torch
and safetensors. The format of what it writes: docs/parity-format.md.

    scripts/make_parity_case.py OUT --hidden-size 72 --heads 3 --patch 4 --size 12 --channels 3 --beta 0.35 --batch 5
    scripts/make_parity_case.py --check CASE     compares this implementation with the tensors of a case instead
    dtr-fused parity OUT
"""

import argparse
import json
import math
import pathlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

TASKS = 1000
CLUSTERS = 8
torch.set_default_dtype(torch.float64)


# The model. Parameters are a dictionary by their official names.


def windows(config):
    """0/1 masks [TASKS, C] of the paper's routing."""
    c = config["hidden_size"]
    width = math.floor(c * config["beta"])
    masks = torch.zeros(TASKS, c)
    for t in range(TASKS):
        start = round((t / (TASKS - 1)) ** config["alpha"] * (c - width))
        masks[t, start : start + width] = 1
    return masks


def random_masks(config, generator):
    """A random subset of channels for each task and block: depth times [TASKS, C]."""
    c = config["hidden_size"]
    order = torch.rand(config["depth"], TASKS, c, generator=generator).argsort(-1)
    return list((order.argsort(-1) < math.floor(c * config["beta"])).to(torch.float64))


def position_embedding(config):
    side, quarter = config["input_size"] // config["patch_size"], config["hidden_size"] // 4
    omega = 1 / 10000 ** (torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [f(p.reshape(-1, 1) * omega) for p in (column, row) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, 1)[None].float()


def shapes(config):
    c, p, ch = config["hidden_size"], config["patch_size"], config["in_channels"]
    out = ch * (2 if config["learn_sigma"] else 1)
    hidden = int(c * config["mlp_ratio"])
    linear = {"t_embedder.mlp.0": (c, 256), "t_embedder.mlp.2": (c, c), "final_layer.linear": (p * p * out, c)}
    linear["final_layer.adaLN_modulation.1"] = (2 * c, c)
    for i in range(config["depth"]):
        layers = {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (hidden, c), "mlp.fc2": (c, hidden)}
        layers["adaLN_modulation.1"] = (6 * c, c)
        linear |= {f"blocks.{i}.{name}": shape for name, shape in layers.items()}
    all_shapes = {"x_embedder.proj.weight": (c, ch, p, p), "x_embedder.proj.bias": (c,)}
    all_shapes["y_embedder.embedding_table.weight"] = (config["num_classes"] + 1, c)
    for name, shape in linear.items():
        all_shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return all_shapes


def forward(params, config, masks, sublayer, x, t, y, acts=None):
    """Output [B, OC, S, S]. `masks`: one [TASKS, C] for each block."""
    acts = {} if acts is None else acts

    def linear(name, v):
        return F.linear(v, params[name + ".weight"], params[name + ".bias"])

    def modulated(v, shift, scale):
        return F.layer_norm(v, v.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    b, c, p, heads = len(x), config["hidden_size"], config["patch_size"], config["num_heads"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    acts["t_freq"] = torch.cat([angles.cos(), angles.sin()], 1)
    acts["t_emb"] = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", acts["t_freq"])))
    acts["y_emb"] = params["y_embedder.embedding_table.weight"][y]
    condition = acts["c"] = acts["t_emb"] + acts["y_emb"]
    patches = F.conv2d(x, params["x_embedder.proj.weight"], params["x_embedder.proj.bias"], stride=p)
    stream = acts["x_embed"] = patches.flatten(2).transpose(1, 2) + params["pos_embed"]
    for i in range(config["depth"]):
        block = f"blocks.{i}."
        mask = masks[i][t][:, None]
        after = mask if sublayer else 1
        modulation = linear(block + "adaLN_modulation.1", F.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 1)
        inside = mask * stream
        qkv = linear(block + "attn.qkv", modulated(inside, shift1, scale1))
        q, k, v = qkv.reshape(b, -1, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(c // heads)).softmax(-1)
        attended = (weights @ v).transpose(1, 2).reshape(b, -1, c)
        inside = after * (inside + gate1[:, None] * linear(block + "attn.proj", attended))
        hidden = F.gelu(linear(block + "mlp.fc1", modulated(inside, shift2, scale2)), approximate="tanh")
        inside = after * (inside + gate2[:, None] * linear(block + "mlp.fc2", hidden))
        stream = acts[f"block{i}"] = inside + (1 - mask) * stream
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(condition)).chunk(2, 1)
    out = linear("final_layer.linear", modulated(stream, shift, scale))
    side = config["input_size"] // p
    out = out.reshape(b, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(b, -1, side * p, side * p)


def guided(model, config, x, t, y, scale):
    """Classifier-free guidance: `x` repeats its first half, the second half of `y` is the null class."""
    half, channels = len(x) // 2, config["in_channels"]
    out = model(torch.cat([x[:half]] * 2), t, y)
    conditional, unconditional = out[:half, :channels], out[half:, :channels]
    epsilon = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([epsilon] * 2), out[:, channels:]], 1)


# The diffusion process.


def betas(schedule):
    if schedule == "linear":
        return torch.linspace(1e-4, 2e-2, TASKS)
    bar = lambda i: math.cos((i / TASKS + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.tensor([min(1 - bar(i + 1) / bar(i), 0.999) for i in range(TASKS)])


class Diffusion:
    def __init__(self, beta):
        self.log_beta = beta.log()
        self.bar = (1 - beta).cumprod(0)
        self.prev = torch.cat([torch.ones(1), self.bar[:-1]])
        variance = beta * (1 - self.prev) / (1 - self.bar)
        self.min_log = torch.cat([variance[1:2], variance[1:]]).log()
        self.coef1 = beta * self.prev.sqrt() / (1 - self.bar)
        self.coef2 = (1 - self.prev) * (1 - beta).sqrt() / (1 - self.bar)

    @staticmethod
    def respaced(schedule, steps):
        """`steps` timesteps spread over all, and which they are."""
        bar = (1 - betas(schedule)).cumprod(0)
        kept = [round(i * (TASKS - 1) / (steps - 1)) for i in range(steps)]
        bar = bar[kept]
        return Diffusion(1 - bar / torch.cat([torch.ones(1), bar[:-1]])), torch.tensor(kept)

    def x_0(self, x_t, epsilon, t):
        at = lambda a: a[t].reshape(-1, 1, 1, 1)
        return (x_t - (1 - at(self.bar)).sqrt() * epsilon) / at(self.bar).sqrt()

    def terms(self, out, x_start, noise, t, weight):
        """Per-sample mse (weighted) and bound in bits; 0 without a variance half."""
        at = lambda a: a[t].reshape(-1, 1, 1, 1)
        mean = lambda v: v.flatten(1).mean(1)
        x_t = at(self.bar).sqrt() * x_start + (1 - at(self.bar)).sqrt() * noise
        channels = x_start.shape[1]
        epsilon = out[:, :channels]
        mse = mean((epsilon - noise) ** 2) * weight
        if out.shape[1] == channels:
            return mse, torch.zeros_like(mse)
        share = (out[:, channels:] + 1) / 2
        log_variance = share * at(self.log_beta) + (1 - share) * at(self.min_log)
        predicted = at(self.coef1) * self.x_0(x_t, epsilon.detach(), t) + at(self.coef2) * x_t
        true = at(self.coef1) * x_start + at(self.coef2) * x_t
        kl = log_variance - at(self.min_log) - 1 + (at(self.min_log) - log_variance).exp()
        kl = (kl + (true - predicted) ** 2 * (-log_variance).exp()) / 2
        likelihood = log_likelihood(x_start, predicted, log_variance / 2)
        return mse, torch.where(t == 0, mean(-likelihood), mean(kl)) / math.log(2)


def log_likelihood(x, mean, log_scale):
    cdf = lambda z: (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    upper, lower = (cdf((x - mean + step) * (-log_scale).exp()) for step in (1 / 255, -1 / 255))
    log = lambda v: v.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))


def loss_weight(name, diffusion, t):
    snr = diffusion.bar[t] / (1 - diffusion.bar[t])
    if name.startswith("min_snr_"):
        return (float(name.split("_")[2]) / snr).clamp(max=1)
    if name.startswith("p2weight_"):
        gamma, k = map(float, name.split("_")[1:3])
        return 1 / (k + snr) ** gamma
    return torch.ones_like(snr)


def total_loss(loss, log_variances):
    """Mean, or the uncertainty-weighted sum over the eighths of the batch."""
    if log_variances is None:
        return loss.mean()
    eighths = loss.reshape(CLUSTERS, -1).mean(1) / CLUSTERS
    return (0.5 * ((-log_variances).exp() * eighths + log_variances)).sum()


def sample(model, config, schedule, method, clip, eta, z, y, step_noise, scale):
    """State after every step."""
    steps = len(step_noise)
    d, kept = Diffusion.respaced(schedule, steps)
    x, states, channels = z, [], config["in_channels"]
    for k in range(steps):
        i = torch.full((len(z),), steps - 1 - k)
        out = guided(model, config, x, kept[i], y, scale)
        x_0 = d.x_0(x, out[:, :channels], i)
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        bar, prev = d.bar[i[0]], d.prev[i[0]]
        if method == "ddpm":
            mean = d.coef1[i[0]] * x_0 + d.coef2[i[0]] * x
            log_variance = d.log_beta[i[0]] if i[0] > 0 else d.min_log[0]
            if config["learn_sigma"]:
                share = (out[:, channels:] + 1) / 2
                log_variance = share * d.log_beta[i[0]] + (1 - share) * d.min_log[i[0]]
            sigma = torch.as_tensor(log_variance / 2).exp()
        else:
            epsilon = (x - bar.sqrt() * x_0) / (1 - bar).sqrt()
            sigma = eta * ((1 - prev) / (1 - bar)).sqrt() * (1 - bar / prev).sqrt()
            mean = prev.sqrt() * x_0 + (1 - prev - sigma**2).sqrt() * epsilon
        x = mean + sigma * step_noise[k] if i[0] > 0 else mean
        states.append(x)
    return torch.stack(states)


# The files.


def save(path, tensors, meaning=""):
    tensors = {name: v.detach().clone().contiguous() for name, v in tensors.items()}
    save_file(tensors, path, metadata={"meaning": meaning})


def load(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def f32(v):
    return v.detach().float()


def make(args):
    config = {name: getattr(args, name) for name in ("hidden_size", "depth", "num_heads", "patch_size", "input_size")}
    config |= {name: getattr(args, name) for name in ("in_channels", "num_classes", "beta", "alpha", "mlp_ratio")}
    config |= {"learn_sigma": not args.no_learn_sigma, "seed": args.seed, "taskcount": TASKS, "ln_eps": 1e-6}
    config["init_method"] = "random" if args.random_routing else "DTR"
    g = torch.Generator().manual_seed(args.seed)
    normal = lambda *shape: torch.randn(*shape, generator=g).float().double()
    index = lambda high, *shape: torch.randint(high, shape, generator=g)
    params = {name: 0.1 * normal(*shape) for name, shape in shapes(config).items()}
    params = {name: v.float().double() for name, v in params.items()}
    params["pos_embed"] = position_embedding(config).double()
    names = [name for name in params if name != "pos_embed"]
    out = pathlib.Path(args.out)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save(out / "params.safetensors", {name: f32(v) for name, v in params.items()})
    masks = [windows(config)] * config["depth"]
    if args.random_routing:
        masks = random_masks(config, g)
        masks_u8 = {f"blocks.{i}.mask": m.to(torch.uint8) for i, m in enumerate(masks)}
        save(out / "routing.safetensors", masks_u8)
    images = (config["in_channels"], config["input_size"], config["input_size"])
    b, half, null = args.batch, max(args.batch - 1, 1), config["num_classes"]
    x, x_start, noise = normal(b, *images), normal(b, *images).clamp(-1, 1), normal(b, *images)
    t, y = index(TASKS, b), index(config["num_classes"] + 1, b)
    t[0], t[-1] = 0, TASKS - 1
    shared = {"x": f32(x), "t": t, "y": y, "x_start": f32(x_start), "noise": f32(noise)}

    for routing in ["own"] + ([] if args.random_routing else ["sublayer"]):
        sublayer, suffix = routing == "sublayer", "_sublayer" if routing == "sublayer" else ""
        model = lambda x, t, y, params=params, acts=None: forward(params, config, masks, sublayer, x, t, y, acts)
        acts, x_in = {}, x.clone().requires_grad_()
        result = model(x_in, t, y, acts=acts)
        upstream = normal(*result.shape)
        (grad_x,) = torch.autograd.grad((result * upstream).sum(), x_in)
        doubled = [torch.cat([v[:half]] * 2) for v in (x, t, y)]
        doubled[2][half:] = null
        tensors = shared | {"upstream": f32(upstream), "out.f64": result, "grad_x": f32(grad_x)}
        tensors["out_cfg1.5.f64"] = guided(model, config, *doubled, 1.5)
        tensors |= {f"act.{name}": f32(v) for name, v in acts.items()}
        save(out / f"{'sublayer_' if sublayer else ''}forward.safetensors", tensors)

        weights = ["constant"] if sublayer else ["constant", "min_snr_5", "p2weight_1_1_persample"] + ["uw"] * (not args.small)
        for schedule in ["cosine"] if sublayer else ["linear", "cosine"]:
            for weight in weights:
                d = Diffusion(betas(schedule))
                inputs, own = (x_start, noise, t, y), {}
                s = None
                if weight == "uw":
                    n = 2 * CLUSTERS
                    t_uw = index(TASKS // CLUSTERS, n) + torch.arange(n) // 2 * (TASKS // CLUSTERS)
                    inputs = (normal(n, *images).clamp(-1, 1), normal(n, *images), t_uw, index(null + 1, n))
                    own = dict(zip(("x_start", "noise", "t", "y"), [f32(v) if v.is_floating_point() else v for v in inputs]))
                    s = (0.3 * normal(CLUSTERS)).float().double().requires_grad_()
                x0, e, ts, ys = inputs
                leaves = {name: v.clone().requires_grad_(name in names) for name, v in params.items()}
                bar = d.bar[ts].reshape(-1, 1, 1, 1)
                x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * e
                result = model(x_t, ts, ys, params=leaves)
                result.retain_grad()
                mse, vb = d.terms(result, x0, e, ts, loss_weight(weight, d, ts))
                total = total_loss(mse + vb, s)
                total.backward()
                loss = mse + vb if s is None else total[None]
                tensors = own | {"mse.f64": mse, "loss.f64": loss, "loss_mean.f64": total[None]}
                tensors |= {"x_t": f32(x_t), "model_out": f32(result), "d_model_out": f32(result.grad)}
                if config["learn_sigma"]:
                    tensors["vb.f64"] = vb
                if s is not None:
                    tensors |= {"loss_scale": f32(s), "grad.loss_scale.f64": s.grad}
                if weight.startswith("p2"):
                    tensors["weight.f64"] = loss_weight(weight, d, ts)
                tensors |= {f"gradnorm.{name}": leaves[name].grad.norm()[None] for name in names}
                save(out / f"loss_{schedule}_{weight}{suffix}.safetensors", tensors)
                if schedule == "cosine" and weight in ("constant", "uw") and not args.small:
                    gradients = {f"grad.{name}": f32(leaves[name].grad) for name in names}
                    save(out / f"grads_{schedule}_{weight}{suffix}.safetensors", gradients)

    model = lambda x, t, y, params=params: forward(params, config, masks, False, x, t, y)
    if args.train_steps:
        train(args, config, params, names, model, out, normal, index, images)
    if args.sampling_steps:
        z = normal(2, *images).repeat(2, 1, 1, 1)
        labels = torch.tensor([0, config["num_classes"] - 1, null, null])
        step_noise = normal(args.sampling_steps, 4, *images)
        tensors = {"z": f32(z), "y": labels, "step_noise": f32(step_noise)}
        tensors["timestep_map"] = Diffusion.respaced("linear", args.sampling_steps)[1]
        variants = [("ddpm", "cosine", False, None), ("ddpm", "linear", True, None), ("ddim", "cosine", True, 0.5)]
        for method, schedule, clip, eta in variants + [("ddim", "linear", False, 0.0)]:
            name = f"{method}_{schedule}_{'clip' if clip else 'noclip'}" + ("" if eta is None else f"_eta{eta}")
            with torch.no_grad():
                states = sample(model, config, schedule, method, clip, eta, z, labels, step_noise, 1.5)
            tensors |= {f"{name}.traj": f32(states), f"{name}.final.f64": states[-1].clone()}
        meaning = f"respacing '{args.sampling_steps}', guidance scale 1.5"
        save(out / "sampling.safetensors", tensors, meaning)


def train(args, config, params, names, model, out, normal, index, images):
    n, b, wd = args.train_steps, args.batch, args.weight_decay
    x_start, noise = normal(n, b, *images).clamp(-1, 1), normal(n, b, *images)
    t, y = index(TASKS, n, b), index(config["num_classes"] + 1, n, b)
    leaves = {name: v.clone().requires_grad_(name in names) for name, v in params.items()}
    ema = {name: params[name].clone() for name in names}
    optimizer = torch.optim.AdamW([leaves[name] for name in names], lr=1e-4, weight_decay=wd)
    d, losses = Diffusion(betas("cosine")), []
    for k in range(n):
        bar = d.bar[t[k]].reshape(-1, 1, 1, 1)
        result = model(bar.sqrt() * x_start[k] + (1 - bar).sqrt() * noise[k], t[k], y[k], params=leaves)
        loss = sum(d.terms(result, x_start[k], noise[k], t[k], 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for name in names:
            ema[name] += 1e-4 * (leaves[name].detach() - ema[name])
    probe_x, probe_t, probe_y = normal(b, *images), index(TASKS, b), index(config["num_classes"] + 1, b)
    averaged = ema | {"pos_embed": params["pos_embed"]}
    tensors = {"x_start": f32(x_start), "noise": f32(noise), "t": t, "y": y, "loss_per_step.f64": torch.stack(losses)}
    tensors |= {"probe_x": f32(probe_x), "probe_t": probe_t, "probe_y": probe_y}
    tensors["probe_out.f64"] = model(probe_x, probe_t, probe_y, params=leaves)
    tensors["probe_out_ema.f64"] = model(probe_x, probe_t, probe_y, params=averaged)
    for name in names:
        tensors[f"updnorm.{name}"] = (leaves[name] - params[name]).norm()[None]
        if not args.small:
            tensors |= {f"final.{name}": f32(leaves[name]), f"ema.{name}": f32(ema[name])}
    meaning = f"{n} AdamW steps (lr 1e-4, betas .9/.999, eps 1e-8, wd {wd}), cosine/constant, EMA 0.9999"
    save(out / f"train{n}.safetensors", tensors, meaning)


def check(case):
    """Compares this implementation with a case made elsewhere; prints the relative differences."""
    case = pathlib.Path(case)
    config = {"alpha": 4, "mlp_ratio": 4.0, "learn_sigma": True} | json.loads((case / "config.json").read_text())
    params = {name: v.double() for name, v in load(case / "params.safetensors").items()}
    masks = [windows(config)] * config["depth"]
    if (case / "routing.safetensors").exists():
        routing = load(case / "routing.safetensors")
        masks = [routing[f"blocks.{i}.mask"].double() for i in range(config["depth"])]
    worst = 0.0

    def compare(name, found, reference):
        nonlocal worst
        difference = ((found - reference).abs().max() / reference.abs().max()).item()
        worst = max(worst, difference if difference == difference else math.inf)
        print(f"{name:60} {difference:.1e}")

    inputs = load(case / "forward.safetensors")
    for prefix, sublayer in [("", False), ("sublayer_", True)]:
        path = case / f"{prefix}forward.safetensors"
        if not path.exists():
            continue
        f, acts = load(path), {}
        x = f["x"].double().requires_grad_()
        model = lambda x, t, y, params=params, acts=None: forward(params, config, masks, sublayer, x, t, y, acts)
        out = model(x, f["t"], f["y"], acts=acts)
        compare(prefix + "out", out, f["out.f64"])
        (grad_x,) = torch.autograd.grad((out * f["upstream"]).sum(), x)
        compare(prefix + "grad_x", grad_x, f["grad_x"].double())
        half = len(f["out_cfg1.5.f64"]) // 2
        doubled = [torch.cat([f[name][:half]] * 2) for name in ("x", "t", "y")]
        doubled[2][half:] = config["num_classes"]
        doubled[0] = doubled[0].double()
        compare(prefix + "out_cfg1.5", guided(model, config, *doubled, 1.5), f["out_cfg1.5.f64"])
        for name, value in acts.items():
            if f"act.{name}" in f:
                compare(f"{prefix}act.{name}", value, f[f"act.{name}"].double())
        for path in sorted(case.glob("loss_*.safetensors")):
            name = path.stem.removeprefix("loss_")
            if name.endswith("_official") or name.endswith("_sublayer") != sublayer:
                continue
            schedule, weight = name.removesuffix("_sublayer").split("_", 1)
            loss, d = load(path), Diffusion(betas(schedule))
            source = loss if "x_start" in loss else inputs
            x0, e, t, y = (source[k].double() if k in ("x_start", "noise") else source[k] for k in ("x_start", "noise", "t", "y"))
            bar = d.bar[t].reshape(-1, 1, 1, 1)
            leaves = {k: v.clone().requires_grad_(k != "pos_embed") for k, v in params.items()}
            out = model(bar.sqrt() * x0 + (1 - bar).sqrt() * e, t, y, params=leaves)
            mse, vb = d.terms(out, x0, e, t, loss_weight(weight, d, t))
            s = loss["loss_scale"].double() if weight == "uw" else None
            total_loss(mse + vb, s).backward()
            compare(f"loss_{name} mse", mse, loss["mse.f64"])
            if "vb.f64" in loss:
                compare(f"loss_{name} vb", vb, loss["vb.f64"])
            compare(f"loss_{name} loss_mean", total_loss(mse + vb, s)[None], loss["loss_mean.f64"])
            grads = case / f"grads_{name}.safetensors"
            for k, value in load(grads).items() if grads.exists() else ():
                compare(f"grads_{name} {k}", leaves[k.removeprefix("grad.")].grad, value.double())
    path = case / "sampling.safetensors"
    model = lambda x, t, y: forward(params, config, masks, False, x, t, y)
    f = load(path) if path.exists() else {}
    for name in sorted(n.removesuffix(".final.f64") for n in f if n.endswith(".final.f64")):
        method, schedule, clip, *eta = name.split("_")
        eta = float(eta[0].removeprefix("eta")) if eta else None
        with torch.no_grad():
            z, noise = f["z"].double(), f["step_noise"].double()
            states = sample(model, config, schedule, method, clip == "clip", eta, z, f["y"], noise, 1.5)
        compare(f"sampling {name}", states[-1], f[f"{name}.final.f64"])
    print(f"largest difference: {worst:.1e}")
    return worst <= 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="directory to make, or with --check the case to compare with")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--hidden-size", type=int, default=48)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", dest="num_heads", type=int, default=2)
    parser.add_argument("--patch", dest="patch_size", type=int, default=2)
    parser.add_argument("--size", dest="input_size", type=int, default=8)
    parser.add_argument("--channels", dest="in_channels", type=int, default=4)
    parser.add_argument("--classes", dest="num_classes", type=int, default=10)
    parser.add_argument("--beta", type=float, default=0.8)
    parser.add_argument("--alpha", type=float, default=4)
    parser.add_argument("--mlp-ratio", type=float, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--random-routing", action="store_true")
    parser.add_argument("--no-learn-sigma", action="store_true")
    parser.add_argument("--train-steps", type=int, default=20)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--sampling-steps", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="leave out uncertainty weighting, full gradients and trained weights")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.check:
        raise SystemExit(0 if check(args.out) else 1)
    make(args)


if __name__ == "__main__":
    main()
