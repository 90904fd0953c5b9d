//! A model small enough for hundreds of runs.

use super::gguf_builder::{Gguf, u32 as number};
use super::golden;
use pregate_kernels::{Format, dequantize_row};

/// 3 layers with 16 experts, of which a token takes 2; the middle layer's
/// experts are larger than the others', so there are two classes of frames.
pub fn tiny() -> Vec<u8> {
    let path = golden::find("gguf/qwen3_moe.Q8_0.gguf").expect("in the repository");
    let mut file = Gguf::from_bytes(&std::fs::read(path).unwrap());
    file = file.replace("qwen3moe.expert_used_count", number(2));
    for name in ["gate", "up", "down"] {
        let tensor = file.tensor_mut(&format!("blk.1.ffn_{name}_exps.weight"));
        let elements = tensor.dims.iter().product::<u64>() as usize;
        let mut values = vec![0.0; elements];
        dequantize_row(Format::Q8_0, &tensor.data, &mut values);
        tensor.data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensor.kind = Format::F32.ggml_type();
    }
    file.build()
}
