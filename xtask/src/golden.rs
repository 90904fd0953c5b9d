//! Which golden files the repository carries: every architecture and every
//! file layout once. The full set is checked where it lies beside the
//! checkout.

use std::{fs, io, path::Path};

/// Folders with their model: architectures or layouts without a GGUF twin
/// below.
const FOLDERS: [&str; 10] = [
    "deepseek_v2_group",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "granitemoeshared",
    "phimoe",
    "phimoe_longrope",
    "qwen3_5_moe_text",
    "qwen3_moe_yarn_tied",
];

/// GGUF twins of folders: their golden file comes along.
const TWINS: [&str; 5] = ["deepseek_v2_lite", "granitemoe", "mixtral", "olmoe", "qwen2_moe"];

/// Quantised GGUF files with their golden files.
const QUANTISED: [&str; 12] = [
    "deepseek_v3.Q8_0",
    "gpt_oss_mxfp4.MXFP4",
    "mixtral.Q8_0",
    "qwen3_moe.IQ4_NL",
    "qwen3_moe.Q4_0",
    "qwen3_moe.Q4_1",
    "qwen3_moe.Q5_0",
    "qwen3_moe.Q5_1",
    "qwen3_moe.Q8_0",
    "qwen3_moe_k256.IQ4_XS",
    "qwen3_moe_k256.Q2_K",
    "qwen3_moe_k256.Q4_K_M",
];

/// Copies the subset from `shared/golden` to `into` and reports its size.
pub fn copy(shared: &Path, into: &Path) -> io::Result<String> {
    let from = shared.join("golden");
    let mut copier = Copier { files: 0, bytes: 0 };
    for case in FOLDERS {
        for file in ["config.json", "config.legacy.json", "config.hub.json"] {
            copier.optional(&from, into, &format!("hf/{case}/{file}"))?;
        }
        for file in ["model.safetensors", "golden.safetensors"] {
            copier.required(&from, into, &format!("hf/{case}/{file}"))?;
        }
    }
    for case in TWINS {
        copier.required(&from, into, &format!("gguf/{case}.f32.gguf"))?;
        copier.required(&from, into, &format!("hf/{case}/golden.safetensors"))?;
    }
    for case in QUANTISED {
        copier.required(&from, into, &format!("gguf/{case}.gguf"))?;
        copier.required(&from, into, &format!("gguf/{case}.golden.safetensors"))?;
    }
    for file in ["golden_encodings.json", "tokenizer.json", "tokenizer_config.json"] {
        copier.required(&from, into, &format!("tokenizers/tiny_bpe/{file}"))?;
    }
    let megabytes = copier.bytes as f64 / 1e6;
    Ok(format!("{} files, {megabytes:.1} MB in {}", copier.files, into.display()))
}

struct Copier {
    files: u64,
    bytes: u64,
}

impl Copier {
    fn required(&mut self, from: &Path, to: &Path, file: &str) -> io::Result<()> {
        let target = to.join(file);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        let source = from.join(file);
        let bytes = fs::copy(&source, &target).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", source.display()))
        })?;
        self.files += 1;
        self.bytes += bytes;
        Ok(())
    }

    fn optional(&mut self, from: &Path, to: &Path, file: &str) -> io::Result<()> {
        match from.join(file).exists() {
            true => self.required(from, to, file),
            false => Ok(()),
        }
    }
}
