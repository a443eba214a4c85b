#!/usr/bin/env python3
"""Turns images into latents to train on, and sampled latents into images, with the autoencoder of Stable Diffusion, as DiT does.

    scripts/latents.py encode photos latents.npy --size 256 --mirror     a folder of class folders -> latents.npy, latents.labels.npy
    dtr-fused train --data latents.npy --model DiT-XL/2
    dtr-fused sample --checkpoint RUN --num 50000 --npz latents.npz
    scripts/latents.py decode latents.npz samples.npz --png samples      uint8 [N, H, W, 3] and labels, for evaluation suites

Needs torch, diffusers and pillow. --vae is a name that diffusers can load or a folder; the first use of a name downloads it.
Latents are drawn from the encoder's distribution and multiplied by its scaling factor (0.18215). Of each image that --mirror adds
mirrored, latents are encoded anew: mirrored latents do not decode to mirrored images.
"""

import argparse
import pathlib
import sys
import time
import zipfile

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


def center_crop(image, size):
    """Halves by boxes while it can, scales the shorter side to `size`, and crops the centre: that of ADM and DiT."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read(path, size):
    """An image as [3, size, size] in [-1, 1], or None, told, if it is damaged."""
    try:
        image = center_crop(Image.open(path).convert("RGB"), size)
    except Exception as error:  # decoders fail in many ways
        print(f"{path} is left out: {error}", file=sys.stderr)
        return None
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def images_of(root):
    """Paths and labels: the place of the class folder in alphabetical order, as for `dtr-fused train`."""
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for label, folder in enumerate(classes):
        yield from ((path, label) for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS)


def progress(began, done, total):
    left = (time.time() - began) / done * (total - done)
    print(f"\r{done}/{total}  {left / 60:.0f} min left ", end="\n" if done == total else "", file=sys.stderr, flush=True)


def load(args):
    torch.manual_seed(args.seed)
    return AutoencoderKL.from_pretrained(args.vae).to(args.device).eval()


def encode(args):
    found = list(images_of(args.source))
    if not found:
        sys.exit(f"{args.source} has no class folders with images")
    vae = load(args)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side, channels = args.size // factor, vae.config.latent_channels
    copies = 2 if args.mirror else 1
    shape = (copies * len(found), channels, side, side)
    temporary = args.target.with_suffix(".partial.npy")
    latents = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
    labels, began = [], time.time()
    for first in range(0, len(found), args.batch_size):
        batch = [(read(path, args.size), label) for path, label in found[first : first + args.batch_size]]
        batch = [(image, label) for image, label in batch if image is not None]
        if batch:
            x = torch.stack([image for image, _ in batch])
            x = torch.cat([x, x.flip(-1)]) if args.mirror else x
            z = vae.encode(x.to(args.device)).latent_dist.sample() * vae.config.scaling_factor
            latents[len(labels) : len(labels) + len(z)] = z.cpu().numpy()
            labels += copies * [label for _, label in batch]
        progress(began, min(first + args.batch_size, len(found)), len(found))
    if not labels:
        sys.exit(f"no image of {args.source} could be read")
    latents.flush()
    if len(labels) < len(latents):
        shorter = np.lib.format.open_memmap(
            args.target, mode="w+", dtype=np.float16, shape=(len(labels), channels, side, side)
        )
        shorter[:] = latents[: len(labels)]
        shorter.flush()
        temporary.unlink()
    else:
        temporary.replace(args.target)
    np.save(args.target.with_suffix(".labels.npy"), np.array(labels, dtype=np.int64))
    sample = latents[: len(labels) : max(1, len(labels) // 1000)].astype(np.float32)
    print(f"{len(labels)} latents of {channels} x {side} x {side} are in {args.target}; standard deviation {sample.std():.2f}")


def decode(args):
    with np.load(args.source) as archive:
        latents, labels = archive["arr_0"], archive["arr_1"]
    vae = load(args)
    began = time.time()
    if args.png:
        args.png.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(args.target, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as out:
            for first in range(0, len(latents), args.batch_size):
                z = torch.from_numpy(latents[first : first + args.batch_size]).float().to(args.device)
                x = vae.decode(z / vae.config.scaling_factor).sample
                x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                if first == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(latents), *x.shape[1:])}
                    np.lib.format.write_array_header_1_0(out, header)
                out.write(x.tobytes())
                if args.png:
                    for i, image in enumerate(x):
                        Image.fromarray(image).save(args.png / f"{first + i:06}-class{labels[first + i]}.png")
                progress(began, min(first + args.batch_size, len(latents)), len(latents))
        with archive.open("arr_1.npy", "w") as out:
            np.lib.format.write_array(out, labels)
    print(f"{len(latents)} images are in {args.target}" + (f" and {args.png}" if args.png else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command, source, target in [(encode, "FOLDER", "OUT.npy"), (decode, "LATENTS.npz", "OUT.npz")]:
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(command=command)
        sub.add_argument("source", metavar=source, type=pathlib.Path)
        sub.add_argument("target", metavar=target, type=pathlib.Path)
        sub.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="name or folder [default: %(default)s]")
        sub.add_argument("--batch-size", type=int, default=16)
        sub.add_argument("--seed", type=int, default=0, help="of the draws from the encoder's distribution")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if command is encode:
            sub.add_argument("--size", type=int, default=256, help="side of the images in pixels [default: 256]")
            sub.add_argument("--mirror", action="store_true", help="add every image mirrored")
        else:
            sub.add_argument("--png", type=pathlib.Path, metavar="FOLDER", help="write every image there too")
    args = parser.parse_args()
    with torch.no_grad():
        args.command(args)


if __name__ == "__main__":
    main()
