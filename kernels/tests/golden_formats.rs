//! Dequantisation equals the `gguf` package's, bit for bit, on the random
//! blocks that `tools/golden-formats/make.py` wrote. Its folder can be
//! replaced by a larger one: `PREGATE_GOLDEN_FORMATS=/tmp/many`.

use pregate_kernels::{Format, dequantize_row};
use std::path::PathBuf;

#[test]
fn every_format_equals_the_golden_values() {
    let folder = std::env::var_os("PREGATE_GOLDEN_FORMATS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data"),
        PathBuf::from,
    );
    for format in Format::ALL {
        let path = folder.join(format!("{format}.bin"));
        let file = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let per_block = format.block_bytes() + 4 * format.block_len();
        let blocks = file.len() / per_block;
        assert!(
            blocks >= 4 && file.len().is_multiple_of(per_block),
            "{} is damaged",
            path.display()
        );
        let (bytes, values) = file.split_at(blocks * format.block_bytes());

        let mut found = vec![0.0; blocks * format.block_len()];
        dequantize_row(format, bytes, &mut found);

        let mut finite = 0;
        for (i, (value, found)) in values.chunks_exact(4).zip(&found).enumerate() {
            let expected = f32::from_le_bytes(value.try_into().unwrap());
            let same = expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan();
            assert!(same, "{format} element {i}: {found:e}, golden {expected:e}");
            finite += usize::from(expected.is_finite() && expected != 0.0);
        }
        assert!(finite * 4 > found.len(), "{format}: the golden values say little");
    }
}
