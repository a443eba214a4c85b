#!/usr/bin/env python3
"""Runs case directories (tests/cases/README.md) on the GPU of this machine: are the expected values what hardware gives?

Usage: simulator/run-cases-on-gpu.py DIR...     each DIR is a case or a folder of cases

Faulty cases are left out, and so are those of another architecture than the GPU's and of newer PTX than its driver's. Exit status
1 when a case fails or none ran.
Needs numpy and cupy.
"""

import json
import pathlib
import struct
import sys

import cupy as cp
import numpy as np

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}


def tensors(path):
    """Name: (type, bytes) of a .safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {name: (t["dtype"], body[slice(*t["data_offsets"])]) for name, t in header.items()}


def numbers(dtype, data):
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype in ("F16", "F32", "F64"):
        return np.frombuffer(data, f"<f{SIZES[dtype]}").astype(np.float64)
    if dtype == "BOOL":
        return np.frombuffer(data, "u1").astype(np.int64)
    return np.frombuffer(data, f"<{dtype[0].lower()}{SIZES[dtype]}")


def run(case, manifest):
    """None, or what is wrong."""
    inputs, expected = tensors(case / "inputs.safetensors"), tensors(case / "expected.safetensors")
    buffers = {}
    for name, buffer in manifest["buffers"].items():
        data = inputs[name][1] if buffer["init"] == "inputs.safetensors" else b"\xff" * buffer["bytes"]
        buffers[name] = cp.asarray(np.frombuffer(data, "u1"))
    kept, blocks = [], int(np.prod(manifest["grid"]))
    arguments = []
    for param in manifest["params"]:
        kind = param["kind"]
        if kind == "buffer":
            arguments.append(buffers[param["tensor"]])
        elif kind == "scalar":
            arguments.append({"i32": np.int32, "f32": np.float32}[param["dtype"]](param["value"]))
        elif kind == "bytes":
            data = bytes.fromhex(param["hex"])
            arguments.append(np.frombuffer(data, np.dtype((np.void, len(data))))[0])
        elif kind == "null":
            arguments.append(np.uint64(0))
        else:
            # Memory of its own for every block, with room to align it.
            memory = cp.full(param["bytes_per_block"] * blocks + param["align_required"], 0xFF, cp.uint8)
            kept.append(memory)
            arguments.append(np.uint64(-(-memory.data.ptr // param["align_required"]) * param["align_required"]))
    kernel = cp.RawModule(path=str(case / "kernel.ptx")).get_function(manifest["entry"])
    if manifest["shared_dynamic_bytes"] > 48 << 10:
        kernel.max_dynamic_shared_size_bytes = manifest["shared_dynamic_bytes"]
    kernel(tuple(manifest["grid"]), tuple(manifest["block"]), tuple(arguments), shared_mem=manifest["shared_dynamic_bytes"])
    cp.cuda.Device().synchronize()
    for name, output in manifest["outputs"].items():
        dtype, data = expected[name]
        got, right = numbers(dtype, buffers[name].get().tobytes()), numbers(dtype, data)
        good = np.abs(got - right) <= output["atol"] + output["rtol"] * np.abs(right)
        if not good.all():
            at = int(np.argmin(good))
            return f"{name}[{at}] is {got[at]}, expected {right[at]} ({(~good).sum()} of {good.size} are off)"
    return None


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    given = [pathlib.Path(folder) for folder in sys.argv[1:]]
    cases = sorted(m.parent for folder in given for m in [*folder.glob("manifest.json"), *folder.glob("*/manifest.json")])
    arch, passed, failed, left_out = int(cp.cuda.Device().compute_capability), 0, 0, 0
    for case in cases:
        manifest = json.loads((case / "manifest.json").read_text())
        target = manifest["target"].removeprefix("sm_")
        number = int(target.rstrip("af"))
        if manifest["negative"] or number > arch or target[-1] in "af" and number != arch:
            continue
        try:
            wrong = run(case, manifest)
        except Exception as error:  # a case that cannot be run is a failure, and the next one is still tried
            if "UNSUPPORTED_PTX_VERSION" in str(error):
                left_out += 1
                print(f"left out {case.name}: its PTX is newer than this driver", flush=True)
                continue
            wrong = f"{type(error).__name__}: {error}"
        passed, failed = passed + (wrong is None), failed + (wrong is not None)
        print(f"{'PASS' if wrong is None else 'FAIL'} {case.name}{'' if wrong is None else ': ' + wrong}", flush=True)
    gpu = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{passed} cases passed, {failed} failed and {left_out} were left out for newer PTX than the driver's, on {gpu}")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
