"""Golden vectors for kernels/tests/golden_formats.rs.

Random block bytes and the f32 values that the `gguf` package (PyPI) gives
them. One file per format: N blocks of bytes, then N * block_len f32, both
little-endian; N follows from the file's size. Seeded: the same bytes again
with the same numpy.

    pip install gguf==0.19.0 numpy==2.4.6
    python tools/golden-formats/make.py kernels/tests/data [--blocks N]
"""

import argparse
import pathlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

# Offsets of the f16 fields of each block.
F16_FIELDS = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}
PLAIN = ["F32", "F16", "BF16"]


def blocks_of(name, count, rng):
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    data = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    # Half of the blocks have scales as real files do; the others keep random
    # bits, infinities, NaNs and subnormals among them.
    usual = slice(0, (count + 1) // 2)
    n = (count + 1) // 2
    for at in F16_FIELDS.get(name, []):
        scales = rng.uniform(-0.1, 0.1, n).astype(np.float16)
        data[usual, at:at + 2] = scales.view(np.uint8).reshape(n, 2)
    if name == "MXFP4":
        data[usual, 0] = rng.integers(110, 130, n)
        for i, e in enumerate([0, 1, 2, 254, 255][:count - n]):
            data[n + i, 0] = e
    return data


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--blocks", type=int, default=0, help="default: 10 of 32, 4 of 256")
    args = parser.parse_args()
    for name in PLAIN + list(F16_FIELDS):
        rng = np.random.default_rng([20, *name.encode()])
        block_len = GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]
        count = args.blocks or {1: 64, 32: 10, 256: 4}[block_len]
        data = blocks_of(name, count, rng)
        with np.errstate(all="ignore"):
            values = quants.dequantize(data.reshape(1, -1), GGMLQuantizationType[name])
        values = np.ascontiguousarray(values, dtype="<f4")
        assert values.size == count * block_len, (name, values.shape)
        path = args.folder / f"{name}.bin"
        path.write_bytes(data.tobytes() + values.tobytes())
        print(f"{path}: {count} blocks, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
