#!/usr/bin/env python3
"""Turns DiT weights of PyTorch or diffusers into a file that dtr-fused reads, and weights into a model of diffusers.

    scripts/convert_weights.py DiT-XL-2-256x256.pt DiT-XL-2.safetensors     a state_dict, or a checkpoint of DiT's train.py
    scripts/convert_weights.py last.ckpt dit.safetensors                    a checkpoint of Lightning; --prefix says which of its models
    scripts/convert_weights.py DiT-XL-2-256 DiT-XL-2.safetensors            a DiTPipeline's folder, its transformer, or that one's file
    scripts/convert_weights.py --to diffusers ema.safetensors transformer   a folder for DiTTransformer2DModel.from_pretrained

Needs torch and safetensors. Of PyTorch's files only tensors and plain values are read, so none can run code here. Numbers keep their
format. Diffusers spaces the frequencies of timesteps otherwise than DiT: there a model computes what it was trained to only after

    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0

and weights that were trained in diffusers without these lines are another model here.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dit_dtr import positions

# Official names and those of diffusers; the embedders are in every block there.
OUTER = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
SHARED = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
LABELS = "y_embedder.embedding_table.weight"
# A tensor that every DiT has, under its official name or that of diffusers: what is before it is before all of them.
FIRST = re.compile(r"((?:.*\.)?)(?:x_embedder|pos_embed)\.(?:(?:module|_orig_mod)\.)*proj\.weight")

HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}  # of the published sizes: channels and blocks
FIXED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}  # of any DiT in diffusers
FILE = "diffusion_pytorch_model"
PARTS = {"ema": "ema", "state_dict": "model", "model": "model"}  # of checkpoints of train.py and Lightning, and what --weights calls them

PUBLISHED = {"routing": "dense", "schedule": "linear", "prediction": "noise"}  # as DiT's own weights
SETTINGS = [*PUBLISHED, "beta", "alpha", "seed"]  # that dtr-fused reads in a file, and no tensor shows


def pairs(depth):
    """Every official name with those of diffusers: one, the three of q, k and v, or equal ones in all blocks."""
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    yield LABELS, [f"{block}.norm1.emb.class_embedder.embedding_table.weight" for block in blocks]
    for kind in ["weight", "bias"]:
        for ours, theirs in OUTER.items():
            yield f"{ours}.{kind}", [f"{theirs}.{kind}"]
        for ours, theirs in SHARED.items():
            yield f"{ours}.{kind}", [f"{block}.norm1.emb.{theirs}.{kind}" for block in blocks]
        for i, block in enumerate(blocks):
            yield f"blocks.{i}.attn.qkv.{kind}", [f"{block}.attn1.to_{part}.{kind}" for part in "qkv"]
            for ours, theirs in BLOCK.items():
                yield f"blocks.{i}.{ours}.{kind}", [f"{block}.{theirs}.{kind}"]


def depth_of(weights, blocks):
    return len({match[1] for name in weights if (match := re.match(rf"{blocks}\.(\d+)\.", name))})


def load(path, choice, prefix):
    """Tensors by their names, without those of wrappers, and metadata."""
    metadata = {}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            sys.exit(f"{path} is damaged or no safetensors file: {error}")
    else:
        try:
            # A checkpoint of train.py holds its arguments.
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except OSError:
            raise
        except Exception:  # damage shows in many ways
            sys.exit(f"{path} is damaged, no file of PyTorch, or holds more than tensors and plain values, which is not read")
    if isinstance(weights, dict) and (parts := {PARTS[key]: weights[key] for key in PARTS if isinstance(weights.get(key), dict)}):
        # What Lightning saves is one model or several, which their names tell apart.
        choice = choice or ("model" if "state_dict" in weights and "ema" not in parts else "ema")
        if choice not in parts:
            sys.exit(f"{path} holds no {choice}: give --weights {next(iter(parts))}")
        weights = parts[choice]
    elif choice:
        sys.exit(f"{path} is no training checkpoint, of which --weights could choose: leave it out")
    if not isinstance(weights, dict) or not weights:
        sys.exit(f"{path} holds no state_dict, which gives tensors names")
    weights = one_model(weights, path, prefix)
    if strange := next((name for name, value in weights.items() if not isinstance(value, torch.Tensor)), None):
        sys.exit(f"{path} holds no state_dict: '{strange}' is no tensor")
    # DistributedDataParallel and torch.compile put these before names, also those of a part.
    plain = {re.sub(r"(?<![^.])(module|_orig_mod)\.", "", name): tensor for name, tensor in weights.items()}
    if len(plain) < len(weights):
        sys.exit(f"{path} holds tensors whose names differ by 'module.' or '_orig_mod.' alone: keep those of one model")
    return plain, metadata


def one_model(weights, path, prefix):
    """The tensors of one DiT, without what all their names begin with."""
    weights = {str(name): tensor for name, tensor in weights.items()}
    prefixes = sorted({match[1] for name in weights if (match := FIRST.fullmatch(name))})
    listed = ", ".join(f"'{one}'" for one in prefixes)
    if prefix is not None:
        prefix = prefix.rstrip(".") + "." * bool(prefix)
        if prefix not in prefixes:
            sys.exit(f"{path} holds no DiT under '{prefix}': " + (f"give --prefix one of {listed}" if prefixes else "leave --prefix out"))
    elif len(prefixes) > 1:
        sys.exit(f"{path} holds several models, under {listed}: say which with --prefix")
    else:
        prefix = "".join(prefixes)
    inner = tuple(one for one in prefixes if one != prefix and one.startswith(prefix))
    own = [name for name in weights if name.startswith(prefix) and not name.startswith(inner)]
    if other := next((name for name in weights if name not in own), None):
        print(f"tensors left out, as they are not of the model under '{prefix}': {len(weights) - len(own)}, such as '{other}'")
    return {name.removeprefix(prefix): weights[name] for name in own}


def from_diffusers(weights, path):
    weights.pop("pos_embed.pos_embed", None)  # never another than `positions`
    official = {}
    for ours, theirs in pairs(depth_of(weights, "transformer_blocks")):
        if missing := next((name for name in theirs if name not in weights), None):
            sys.exit(f"{path} lacks tensor '{missing}', which a DiTTransformer2DModel has")
        tensors = [weights.pop(name) for name in theirs]
        first, fused = tensors[0], "qkv" in ours
        for name, tensor in zip(theirs, tensors):
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype) or fused and tensor.ndim == 0:
                sys.exit(f"{path}: tensors '{theirs[0]}' and '{name}' do not go together: they have other shapes or formats than in a DiT")
            if not fused and not torch.equal(tensor, first):
                sys.exit(f"{path}: tensors '{theirs[0]}' and '{name}' differ, but the blocks of a DiT share one")
        official[ours] = torch.cat(tensors) if fused else first
    return official | weights  # what is left has no place in a DiT, as `check` says


def check(weights, path):
    """The sizes of a DiT with exactly these tensors."""

    def shape(name, rank):
        if name not in weights:
            sys.exit(f"{path} lacks tensor '{name}', which a DiT has")
        if weights[name].ndim != rank or 0 in weights[name].shape:
            sys.exit(f"{path}: tensor '{name}' has shape {list(weights[name].shape)}, as in no DiT")
        return weights[name].shape

    c, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    if c % 4:
        sys.exit(f"{path} has {c} channels, but those of a DiT are a multiple of 4, as its positions are")
    rows, mlp, out = (shape(name, 2)[0] for name in (LABELS, "blocks.0.mlp.fc1.weight", "final_layer.linear.weight"))
    depth, side = depth_of(weights, "blocks"), math.isqrt(shape("pos_embed", 3)[1]) if "pos_embed" in weights else 0
    layers = {"x_embedder.proj": (c, channels, patch, patch), "t_embedder.mlp.0": (c, 256), "t_embedder.mlp.2": (c, c)}
    layers |= {"final_layer.linear": (out // patch**2 * patch**2, c), "final_layer.adaLN_modulation.1": (2 * c, c)}
    block = {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (mlp, c), "mlp.fc2": (c, mlp), "adaLN_modulation.1": (6 * c, c)}
    layers |= {f"blocks.{i}.{name}": size for i in range(depth) for name, size in block.items()}
    expected = {LABELS: (rows, c)} | ({"pos_embed": (1, side**2, c)} if side else {})
    for name, size in layers.items():
        expected |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    for name, size in expected.items():
        if tuple(shape(name, len(size))) != size or not weights[name].is_floating_point():
            found = f"{str(weights[name].dtype).removeprefix('torch.')} of shape {list(weights[name].shape)}"
            sys.exit(f"{path}: tensor '{name}' is {found}, where a DiT of {c} channels has floats of shape {list(size)}")
    if strange := next((name for name in weights if name not in expected), None):
        sys.exit(f"{path} holds tensor '{strange}', which a DiT of {depth} blocks does not have")
    return argparse.Namespace(c=c, channels=channels, patch=patch, rows=rows, mlp=mlp, out=out, depth=depth, side=side)


def to_diffusers(weights, size, heads):
    tensors = {}
    for ours, theirs in pairs(size.depth):
        parts = weights[ours].chunk(3) if "qkv" in ours else [weights[ours]] * len(theirs)
        tensors |= zip(theirs, parts)
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": heads, "attention_head_dim": size.c // heads}
    config |= {"in_channels": size.channels, "out_channels": size.out // size.patch**2, "num_layers": size.depth}
    config |= {"sample_size": size.side * size.patch, "patch_size": size.patch, "num_embeds_ada_norm": size.rows - 1}
    return tensors, config | FIXED | {"attention_bias": True, "norm_eps": 1e-6}


def write_tensors(path, tensors, metadata):
    def save(partial):
        # The format wants memory of its own for each, and safetensors makes files that nobody else may read.
        save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, partial, metadata)
        os.umask(umask := os.umask(0))
        partial.chmod(0o666 & ~umask)

    write(path, save)


def write(path, save):
    """Under its name there is only what is whole."""
    if not path.name:
        sys.exit(f"{path} is no name of a file: give one")
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        try:
            save(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")


def config_beside(path):
    place = path.with_name("config.json")
    if not place.exists():
        return {}
    try:
        config = json.loads(place.read_text())
        if wrong := next((key for key, value in FIXED.items() if config.get(key, value) != value), None):
            sys.exit(f"{place} has {wrong} {config[wrong]}, where a DiT has {FIXED[wrong]}")
        return {key: int(config[key]) for key in ("sample_size", "num_attention_heads") if config.get(key)}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        sys.exit(f"{place} is no configuration of a model: {error}")


def convert(args):
    path = args.source
    if path.is_dir():
        files = [folder / (FILE + ending) for folder in (path, path / "transformer") for ending in (".safetensors", ".bin")]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            sys.exit(f"{args.source} holds no {FILE}.safetensors or .bin, nor does its transformer: give the file of weights itself")
    weights, metadata = load(path, args.weights, args.prefix)
    config = {}
    if depth_of(weights, "transformer_blocks"):
        config = config_beside(path)
        weights = from_diffusers(weights, path)
    size = check(weights, path)
    pixels = args.image_size or config.get("sample_size", 0)
    if pixels and (pixels % size.patch or not 0 < pixels // size.patch <= 1024 or size.side not in (0, pixels // size.patch)):
        sys.exit(f"{path} holds no weights for images of {pixels} x {pixels} with patches of {size.patch} x {size.patch}")
    if pixels:
        size.side = pixels // size.patch
        weights.setdefault("pos_embed", positions(size.side, size.c))
    usual = HEADS.get((size.c, size.depth)) if size.patch in (2, 4, 8) else None
    told = str(args.num_heads or metadata.get("num_heads") or config.get("num_attention_heads"))
    heads = int(told[:9]) if told.isdecimal() else usual
    if heads == 0 or heads and size.c % heads:
        sys.exit(f"{path}: {size.c} channels cannot be shared by {heads} heads")

    if args.to == "dtr-fused":
        if told.isdecimal():
            metadata["num_heads"] = told
        if args.set:
            # Then nothing may be left to be assumed.
            if not heads:
                sys.exit(f"{path} does not tell the heads of its model: give --num-heads")
            metadata = PUBLISHED | {"num_heads": str(heads)} | metadata | dict(args.set)
            if metadata["prediction"] == "flow":
                del metadata["schedule"]
            routing = metadata["routing"]
            needs = ["beta", "alpha"] * (routing != "dense") + ["seed"] * (routing == "random")
            if lacks := [key for key in needs if key not in metadata]:
                sys.exit(f"routing {routing} needs more: give --set {' '.join(f'{key}=X' for key in lacks)} too")
        write_tensors(args.target, weights, metadata)
        print(f"{len(weights)} tensors are in {args.target}: a DiT of {size.depth} blocks and {size.c} channels")
        if give := ["num_heads=X"] * (not heads) + ["image_size=X"] * (not size.side):
            print(f"dtr-fused cannot tell all of the model from it: give --set {' '.join(give)} to sample")
        return

    routing = metadata.get("routing", "dense")
    if routing != "dense" and not args.force:
        sys.exit(f"{path} was trained with routing {routing}, and diffusers would compute another model, a dense one (--force writes it)")
    if not size.side:
        sys.exit(f"{path} does not tell the size of its images: give --image-size, for latents that of the latents")
    if not heads:
        sys.exit(f"{path} does not tell the heads of its model: give --num-heads")
    if size.mlp != 4 * size.c:
        sys.exit(f"{path} has an MLP of {size.mlp} channels, but that of diffusers has 4 times {size.c}")
    if not (weights["pos_embed"].float() - positions(size.side, size.c)).abs().max() <= 0.01:
        sys.exit(f"{path} has learned positions, but those of diffusers are the sines and cosines of DiT")
    tensors, config = to_diffusers(weights, size, heads)
    write_tensors(args.target / f"{FILE}.safetensors", tensors, metadata | {"format": "pt"})
    write(args.target / "config.json", lambda partial: partial.write_text(json.dumps(config, indent=2) + "\n"))
    print(f"a DiTTransformer2DModel is in {args.target}; set downscale_freq_shift = 0 in its blocks (--help shows how)")
    if metadata.get("schedule") == "cosine":
        print("it was trained with the cosine schedule: its scheduler needs beta_schedule squaredcos_cap_v2")
    if metadata.get("prediction") == "v":
        print("it predicts v: its scheduler needs prediction_type v_prediction")
    if metadata.get("prediction") == "flow":
        print("it predicts the velocity of a flow: it needs a flow matching scheduler, and timesteps 1000 sigma - 0.5 of it")


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def setting(text):
    key, _, value = text.partition("=")
    if key not in SETTINGS or not value:
        raise argparse.ArgumentTypeError(f"'{text}' is no KEY=VALUE with one of the keys {', '.join(SETTINGS)}")
    return key, value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="WEIGHTS", type=pathlib.Path)
    parser.add_argument("target", metavar="OUT", type=pathlib.Path)
    parser.add_argument("--to", choices=["dtr-fused", "diffusers"], default="dtr-fused", help="[default: %(default)s]")
    parser.add_argument("--weights", choices=["ema", "model"], help="which of a training checkpoint [default: ema; of one of Lightning model]")
    parser.add_argument("--prefix", help="what the names of the model's tensors begin with, where the file holds several models")
    parser.add_argument("--num-heads", type=positive, help="where neither the weights nor their sizes tell")
    parser.add_argument("--image-size", type=positive, help="side of what the model sees, where the weights hold no pos_embed")
    parser.add_argument("--set", metavar="KEY=VALUE", type=setting, nargs="+", default=[], help=f"what the model is: {', '.join(SETTINGS)}")
    parser.add_argument("--force", action="store_true", help="make a dense model of weights that were trained with routing")
    args = parser.parse_args()
    if args.set and args.to != "dtr-fused":
        parser.error("--set is for files of dtr-fused: leave it out")
    try:
        convert(args)
    except OSError as error:
        sys.exit(f"{args.source} cannot be read: {error.strerror or error}")


if __name__ == "__main__":
    main()
