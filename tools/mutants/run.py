"""Seeded bugs that the kernel tests must find.

Copies the tracked files of the repository to a scratch folder, and for each
bug below replaces one text that occurs exactly once, runs the tests of
`pregate-kernels` and expects them to fail to pass (not to fail to build).
A bug that survives is a hole in the tests; the exit status says so.

    python tools/mutants/run.py [--only TEXT] [--scratch FOLDER]

Needs an x86-64 machine with AVX-512 VNNI for the bugs in `avx512`; the others
need AVX2.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

SRC = "kernels/src/"
# Asked first; all tests only if these pass.
PROPERTIES = ["--test", "contract_bits", "--test", "golden_formats"]
BUGS = [
    # name, file, text, replacement
    # Not `(b + 1)`: the tree is symmetric under that, and gives the same bits.
    ("neighbouring blocks share a lane", "contract.rs",
     "lanes[b % BLOCK_LANES]", "lanes[b / 2 % BLOCK_LANES]"),
    ("rounding half away from zero", "contract.rs",
     "(x * inverse).round_ties_even()", "(x * inverse).round()"),
    ("minimum added instead of subtracted", "cpu/avx2/rows.rs",
     "_ => _mm256_fnmadd_ps(min, t, next)", "_ => _mm256_fmadd_ps(min, t, next)"),
    ("tail of a float row forgotten", "cpu/avx2/floats.rs",
     "if !x.is_empty() {", "if x.len() > 32 {"),
    ("scale of the neighbouring sub-block", "cpu/avx2/blocks.rs",
     "let pair = (2 * j + ((2 * j + 1) << 8)) as i16;",
     "let pair = (2 * (j ^ 1) + ((2 * (j ^ 1) + 1) << 8)) as i16;"),
    ("offset of Q6_K not subtracted", "cpu/avx2/blocks.rs",
     "Format::Q6K => 32,", "Format::Q6K => 0,"),
    ("high bits of the minimums from the scales", "cpu/avx2/blocks.rs",
     "((b >> 6) & two)", "((a >> 6) & two)"),
    ("-128 negated in eight bits", "cpu/avx2/rows.rs",
     "_mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes))",
     "_mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(codes, q))"),
    ("tree adds neighbours first", "cpu/avx2/mod.rs",
     "let two = _mm_add_ps(four, _mm_movehl_ps(four, four));\n"
     "    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))",
     "let two = _mm_add_ps(four, _mm_movehdup_ps(four));\n"
     "    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehl_ps(two, two)))"),
    ("last row dropped", "cpu/avx2/rows.rs",
     "for (r, out) in out.iter_mut().enumerate() {",
     "for (r, out) in out.iter_mut().enumerate().take(rows.rows.max(2) - 1) {"),
    ("tiles after the first overwrite it", "cpu/avx2/rows.rs",
     "out.row(first + t)[r] =", "out.row(t)[r] ="),
    ("infinite group quantised to zero", "cpu/avx2/elementwise.rs",
     "{ f32::NAN } else { 0.0 }", "{ 0.0 } else { 0.0 }"),
    ("exp cut off at -88", "cpu/avx2/elementwise.rs",
     "_mm256_set1_ps(-87.0)", "_mm256_set1_ps(-88.0)"),
    ("softmax lanes counted from the chunk's first query", "cpu/avx2/attention.rs",
     "lanes[(first + i) % 16] += score;", "lanes[i % 16] += score;"),
    ("combine in reverse router order", "cpu/experts.rs",
     "for (n, choice) in routes.of(t).iter().enumerate() {",
     "for (n, choice) in routes.of(t).iter().enumerate().rev() {"),
    ("stale quantised activations", "cpu/linear.rs",
     "        prepared.used = 0;\n", ""),
    ("bias left out after the eighth token", "cpu/linear.rs",
     "            let bias = &bias[first..first + count];\n"
     "            for i in 0..tokens.len() {",
     "            let bias = &bias[first..first + count];\n"
     "            for i in 0..tokens.len().min(8) {"),
    ("gate and up exchanged", "contract.rs",
     "GatedActivation::Silu => silu(gate) * up,", "GatedActivation::Silu => silu(up) * gate,"),
    ("a table entry off by one", "block.rs", "-127, -104, -83,", "-127, -104, -82,"),
    ("subnormal MXFP4 scale", "block.rs", "if e < 2 {", "if e < 1 {"),
    ("element 128 bytes apart in Q6_K", "block.rs",
     "let low = bytes[q6_k::QL + 64 * n + 32 * j + l] >> (4 * h) & 15;",
     "let low = bytes[q6_k::QL + 64 * n + 32 * h + l] >> (4 * j) & 15;"),
    # Not the order of scale and element: an f16, a sub-block scale and an
    # element multiply exactly or round once, whichever comes first.
    ("high bits of a neighbour's scale in Q3_K", "block.rs",
     "let high = bytes[q3_k::SCALES + 8 + j % 4] >> (2 * (j / 4)) & 3;",
     "let high = bytes[q3_k::SCALES + 8 + j / 4] >> (2 * (j % 4)) & 3;"),
    ("AVX-512: minimum added instead of subtracted", "cpu/avx512/decode.rs",
     "_mm256_mask3_fnmadd_ps(factor, _mm256_cvtepi32_ps(t)",
     "_mm256_mask3_fmadd_ps(factor, _mm256_cvtepi32_ps(t)"),
    ("AVX-512: tree of 64 starts with neighbours", "cpu/avx512/float.rs",
     "let low = _mm512_add_ps(lanes[0], lanes[2]);\n"
     "        let high = _mm512_add_ps(lanes[1], lanes[3]);",
     "let low = _mm512_add_ps(lanes[0], lanes[1]);\n"
     "        let high = _mm512_add_ps(lanes[2], lanes[3]);"),
    ("AVX-512: exp cut off at -88", "cpu/avx512/elementwise.rs",
     "_mm512_set1_ps(-87.0)", "_mm512_set1_ps(-88.0)"),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="bugs whose name contains this")
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("/tmp/pregate-mutants"))
    args = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parents[2]
    tree = args.scratch / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (root / name).suffix in {".gguf", ".safetensors"}:
            continue
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, tree / name)

    target = {"CARGO_TARGET_DIR": str(args.scratch / "target"), "CARGO_INCREMENTAL": "1"}
    environment = os.environ | target
    command = ["cargo", "test", "--offline", "-p", "pregate-kernels", "--quiet"]

    def run(extra):
        start = time.monotonic()
        done = subprocess.run(
            command + extra, cwd=tree, env=environment, capture_output=True, text=True)
        return done, time.monotonic() - start

    done, seconds = run([])
    if done.returncode != 0:
        sys.exit(f"the tests fail without any bug:\n{done.stdout}{done.stderr}")
    print(f"no bug: tests pass ({seconds:.0f} s)", flush=True)

    survivors = 0
    for name, file, text, replacement in BUGS:
        if args.only not in name:
            continue
        path = tree / SRC / file
        original = path.read_text()
        if original.count(text) != 1:
            print(f"STALE     {name}: its text occurs {original.count(text)} times in {file}")
            survivors += 1
            continue
        path.write_text(original.replace(text, replacement))
        built, _ = run(["--no-run"])
        if built.returncode != 0:
            print(f"NO BUILD  {name}:\n{built.stderr}")
            survivors += 1
        else:
            done, seconds = run(PROPERTIES)
            if done.returncode == 0:
                done, seconds = run([])
            found = re.findall(r"^    ([\w:]+)$", done.stdout, re.MULTILINE)
            if done.returncode == 0:
                print(f"SURVIVED  {name} ({seconds:.0f} s)", flush=True)
                survivors += 1
            else:
                by = ", ".join(dict.fromkeys(found)) or "a crash"
                print(f"found     {name} ({seconds:.0f} s): {by}", flush=True)
        path.write_text(original)
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
