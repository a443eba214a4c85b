#!/usr/bin/env python3
"""Turns images into latents to train on, and sampled latents into images, with the autoencoder of Stable Diffusion.

    scripts/latents.py encode photos latents.npy --size 256 --mirror     a folder of class folders -> latents.npy and its labels
    scripts/latents.py encode photos latents.safetensors --mirror        distributions, from which training draws latents each time
    dtr-fused train --data latents.npy --model DiT-XL/2
    dtr-fused sample --checkpoint RUN --num 50000 --npz latents.npz
    scripts/latents.py decode latents.npz samples.npz --png samples      uint8 [N, H, W, 3] and labels, for evaluation suites
    scripts/latents.py decode part-0.npz part-1.npz samples.npz          one such file of what sample made in parts (--only)

Needs torch, diffusers and pillow. --vae is a name that diffusers can load or a folder; the first use of a name downloads it.
Images are cropped as DiT does; the latents of each are drawn once from the encoder's distribution, less its shift factor (of Stable
Diffusion 3 and FLUX; others have none), and multiplied by its scaling factor (0.18215). For a .safetensors file they are not drawn: it
holds the mean, shifted and multiplied likewise, and the standard deviation, multiplied, in twice the space.
Mirrored images are encoded anew: mirrored latents do not decode to mirrored images. Labels are the places of the folders in alphabetical
order; their names are a JSON list in latents.classes.json beside latents.npy and latents.labels.npy, or `classes` in the metadata of a
.safetensors file.
"""

import argparse
import concurrent.futures
import json
import math
import os
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
    """Paths with labels, the place of the class folder in alphabetical order as for `dtr-fused train`, and the names of these folders."""

    def inside(path):
        return not path.name.startswith(".") and path.resolve().is_relative_to(root.resolve())

    classes = sorted(path for path in root.glob("*") if path.is_dir() and inside(path))
    if not classes:
        sys.exit(f"{root} has no class folders")
    found = []
    for label, folder in enumerate(classes):
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and inside(path))
        if not images:
            sys.exit(f"{folder} is a class folder without PNG, JPEG or WebP images; fill or remove it")
        found += ((path, label) for path in images)
    # A name may be no text.
    return found, [os.fsencode(folder.name).decode(errors="replace") for folder in classes]


def progress(began, done, total):
    left = (time.time() - began) / done * (total - done)
    print(f"\r{done}/{total}  {left / 60:.0f} min left ", end="\n" if done == total else "", file=sys.stderr, flush=True)


def load(args):
    """The autoencoder, and its numbers for latents (z - shift) * scale."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae).to(args.device).eval()
    return vae, getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


def new_arrays(path, count, shape, classes):
    """The arrays of a file by name: latents [count, *shape], and of a .safetensors file latents_std, as many, and labels [count].

    That file has the names of `classes` in its metadata. All space is taken now: a full disk is an error here and not hours later.
    """
    if path.suffix == ".npy":
        arrays = {"latents": np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, *shape))}
    else:
        # The labels first: every array then begins at a multiple of the size of its numbers.
        arrays, tensors, end = {"labels": np.int64, "latents": np.float16, "latents_std": np.float16}, {}, 0
        for name, dtype in arrays.items():
            sizes = (count,) if name == "labels" else (count, *shape)
            begin, end = end, end + math.prod(sizes) * np.dtype(dtype).itemsize
            tensors[name] = {"dtype": "I64" if dtype is np.int64 else "F16", "shape": sizes, "data_offsets": (begin, end)}
        text = json.dumps({"__metadata__": {"classes": json.dumps(classes)}} | tensors).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            file.truncate(start + end)
        for name, of in tensors.items():
            arrays[name] = np.memmap(path, arrays[name], "r+", start + of["data_offsets"][0], of["shape"])
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return arrays


def beside(target):
    """The files beside a .npy file: the labels, and the names of their classes."""
    return [target.with_suffix(ending) for ending in (".labels.npy", ".classes.json")]


def encode(args):
    if args.target.suffix not in (".npy", ".safetensors"):
        sys.exit(f"{args.target} is neither a .npy nor a .safetensors file: latents are saved as one of these")
    found, classes = images_of(args.source)
    vae, shift, scale = load(args)
    side = args.size // 2 ** (len(vae.config.block_out_channels) - 1)
    copies = 2 if args.mirror else 1
    # Under the final names there is only what is whole.
    partial, shorter = (args.target.with_suffix(f".{what}{args.target.suffix}") for what in ("partial", "shorter"))
    labels, began = [], time.time()
    try:
        arrays = new_arrays(partial, copies * len(found), (vae.config.latent_channels, side, side), classes)
        latents, deviations = arrays["latents"], arrays.get("latents_std")
        with concurrent.futures.ThreadPoolExecutor() as readers:
            for first in range(0, len(found), args.batch_size):
                some = found[first : first + args.batch_size]
                images = readers.map(lambda image: read(image[0], args.size), some)
                batch = [(image, label) for image, (_, label) in zip(images, some) if image is not None]
                if batch:
                    x = torch.stack([image for image, _ in batch])
                    x = torch.cat([x, x.flip(-1)]) if args.mirror else x
                    of = vae.encode(x.to(args.device)).latent_dist
                    place = slice(len(labels), len(labels) + len(x))
                    if deviations is None:
                        latents[place] = ((of.sample() - shift) * scale).cpu().numpy()
                    else:
                        latents[place] = ((of.mean - shift) * scale).cpu().numpy()
                        deviations[place] = (of.std * scale).cpu().numpy()
                    labels += copies * [label for _, label in batch]
                progress(began, min(first + args.batch_size, len(found)), len(found))
        if not labels:
            sys.exit(f"no image of {args.source} could be read")
        if len(labels) < len(latents):
            whole = new_arrays(shorter, len(labels), latents.shape[1:], classes)
            for name in arrays.keys() - {"labels"}:
                for first in range(0, len(labels), 4096):
                    whole[name][first : first + 4096] = arrays[name][first : min(first + 4096, len(labels))]
            arrays = whole
            shorter.replace(partial)
        if args.target.suffix == ".npy":
            arrays["latents"].flush()
            labels_path, classes_path = beside(args.target)
            labels_path.unlink(missing_ok=True)
            classes_path.unlink(missing_ok=True)
            classes_path.write_text(json.dumps(classes) + "\n")
            partial.replace(args.target)
            # Last: latents without labels are not taken for whole.
            np.save(labels_path, np.array(labels, dtype=np.int64))
        else:
            arrays["labels"][:] = labels
            for array in arrays.values():
                array.flush()
            partial.replace(args.target)
    finally:
        partial.unlink(missing_ok=True)
        shorter.unlink(missing_ok=True)
    shape = " x ".join(str(size) for size in latents.shape[1:])
    some = slice(None, None, max(1, len(labels) // 1000))
    variances = [arrays["latents"][some].astype(np.float32).var()]
    if deviations is not None:
        variances.append(np.square(arrays["latents_std"][some].astype(np.float32)).mean())
    what = "latents" if deviations is None else "distributions of latents"
    print(f"{len(labels)} {what} of {shape} are in {args.target}; standard deviation {sum(variances) ** 0.5:.2f}")


def header(archive):
    """Shape and format of the first array of an .npz file, and the file of its numbers, which need not be read at once."""
    file = archive.open("arr_0.npy")
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is of another version")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if by_columns or dtype.kind != "f" or len(shape) != 4:
        raise ValueError(f"arr_0 is {dtype} of shape {list(shape)}")
    return shape, dtype, file


def look_at(path):
    """Shape of the latents of an .npz file, and their labels."""
    try:
        with zipfile.ZipFile(path) as archive:
            shape, _, _ = header(archive)
            labels = np.lib.format.read_array(archive.open("arr_1.npy"))
        if labels.shape != shape[:1]:
            raise ValueError(f"there are {shape[0]} latents and labels of shape {list(labels.shape)}")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"{path} holds no latents with labels, as sample --npz writes them: {error}")
    return shape, labels


def holds_latents(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return header(archive) is not None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return False


def batches(paths, size):
    """The latents of .npz files in this order, `size` at a time or what is left of a file."""
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            (total, *shape), dtype, file = header(archive)
            for first in range(0, total, size):
                count = min(size, total - first)
                numbers = file.read(count * math.prod(shape) * dtype.itemsize)
                if len(numbers) < count * math.prod(shape) * dtype.itemsize:
                    sys.exit(f"{path} holds fewer latents than it says: it was cut short")
                yield torch.from_numpy(np.frombuffer(numbers, dtype).reshape(count, *shape).astype(np.float32))


def decode(args):
    shapes, labels = zip(*map(look_at, args.source))
    for path, shape in zip(args.source, shapes):
        if shape[1:] != shapes[0][1:]:
            first, other = (" x ".join(str(size) for size in some[1:]) for some in (shapes[0], shape))
            sys.exit(f"{args.source[0]} holds latents of {first}, and {path} of {other}: decode them into a file each")
    if holds_latents(args.target):
        sys.exit(f"{args.target} holds latents, which images would replace: give the file for images last")
    labels = np.concatenate(labels)
    vae, shift, scale = load(args)
    done, began = 0, time.time()
    if args.png:
        args.png.mkdir(parents=True, exist_ok=True)
    partial = args.target.with_suffix(".partial.npz")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as out:
                for z in batches(args.source, args.batch_size):
                    x = vae.decode(z.to(args.device) / scale + shift).sample
                    x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                    if done == 0:
                        of_all = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *x.shape[1:])}
                        np.lib.format.write_array_header_1_0(out, of_all)
                    out.write(x.tobytes())
                    if args.png:
                        for i, image in enumerate(x, done):
                            Image.fromarray(image).save(args.png / f"{i:06}-class{labels[i]}.png")
                    done += len(x)
                    progress(began, done, len(labels))
            with archive.open("arr_1.npy", "w") as out:
                np.lib.format.write_array(out, labels)
        partial.replace(args.target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{len(labels)} images are in {args.target}" + (f" and {args.png}" if args.png else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command, source, many, target in [(encode, "FOLDER", None, "OUT.{npy,safetensors}"), (decode, "LATENTS.npz", "+", "OUT.npz")]:
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(command=command)
        sub.add_argument("source", metavar=source, nargs=many, type=pathlib.Path)
        sub.add_argument("target", metavar=target, type=pathlib.Path)
        sub.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="name or folder [default: %(default)s]")
        sub.add_argument("--batch-size", type=int, default=16)
        sub.add_argument("--seed", type=int, default=0, help="of the draws from the encoder's distribution (for a .npy file)")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
        if command is encode:
            sub.add_argument("--size", type=int, default=256, help="side of the images in pixels [default: 256]")
            sub.add_argument("--mirror", action="store_true", help="add every image mirrored")
        else:
            sub.add_argument("--png", type=pathlib.Path, metavar="FOLDER", help="write every image there too")
    args = parser.parse_args()
    written = [args.target, *(beside(args.target) if args.target.suffix == ".npy" else [])]
    if there := next((path for path in written if path.exists() and not args.overwrite), None):
        sys.exit(f"{there} is there already: give another file (the one to write is the last), or --overwrite to replace it")
    with torch.no_grad():
        args.command(args)


if __name__ == "__main__":
    main()
