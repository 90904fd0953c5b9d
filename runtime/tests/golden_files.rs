//! Every golden file opens: written by llama.cpp's tools, gguf-py and
//! transformers, not by us.

#[path = "support/gguf_builder.rs"]
mod gguf_builder;

use gguf_builder::Gguf;
use pregate_kernels::Format;
use pregate_runtime::files::{Container, ElementType, ModelFiles, TensorTable, gguf};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What lies in a folder of the test data, which every checkout has.
fn entries(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(folder);
    let list = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("test data {}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = list.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Tensors fill the file but for the header and padding.
fn check_ranges(opened: &ModelFiles, path: &Path) {
    let sum: usize = opened.tensors().iter().map(|tensor| opened.bytes(tensor).len()).sum();
    let stated: usize = opened.tensors().iter().map(|tensor| tensor.bytes).sum();
    assert_eq!(sum, stated, "{}", path.display());
    assert!(sum as u64 > opened.total_bytes() / 2, "{}", path.display());
    assert!(opened.notes().is_empty(), "{:?}", opened.notes());
}

#[test]
fn every_golden_gguf_file_opens() {
    let paths: Vec<PathBuf> = entries("gguf")
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .collect();
    assert!(paths.len() >= 10, "{} golden GGUF files", paths.len());
    let (mut architectures, mut formats) = (BTreeSet::new(), BTreeSet::new());
    for path in &paths {
        let opened = ModelFiles::open(path).unwrap_or_else(|error| panic!("{error}"));
        check_ranges(&opened, path);
        let Container::Gguf(keys) = opened.container() else { panic!("not GGUF") };
        architectures.insert(keys.string("general.architecture").unwrap().unwrap().to_string());
        let embedding = opened.tensor("token_embd.weight").unwrap();
        let tokens = keys.strings("tokenizer.ggml.tokens").unwrap().unwrap();
        assert_eq!(embedding.shape[0], tokens.len(), "outermost first in {}", path.display());
        for tensor in opened.tensors() {
            let ElementType::Format(format) = tensor.element else { panic!("{tensor:?}") };
            formats.insert(format);
        }
    }
    assert!(architectures.len() >= 5, "{architectures:?}");
    assert!(formats.len() >= Format::ALL.len() - 1, "only {formats:?}");
}

/// What the tests' writer takes apart and writes again reads the same: so the
/// files that it makes by changing golden ones differ in that change only.
#[test]
fn the_writer_of_the_tests_keeps_everything() {
    let path = entries("gguf").into_iter().find(|path| path.ends_with("qwen3_moe.Q8_0.gguf"));
    let original = fs::read(path.expect("a golden Q8_0 file")).unwrap();
    let written = Gguf::from_bytes(&original).build();
    let parse = |bytes: &[u8]| {
        let mut tensors = TensorTable::new();
        let header = gguf::parse(Path::new("f"), 0, bytes, &mut tensors).unwrap();
        (header, tensors)
    };
    let ((header, tensors), (header_again, tensors_again)) = (parse(&original), parse(&written));
    let keys = |header: &gguf::Header| -> Vec<_> {
        header.metadata.iter().map(|(key, value)| (key.to_string(), value.clone())).collect()
    };
    assert_eq!(keys(&header), keys(&header_again));
    assert_eq!(tensors.all().len(), tensors_again.all().len());
    for (one, two) in tensors.all().iter().zip(tensors_again.all()) {
        assert_eq!((&one.name, &one.shape, one.element), (&two.name, &two.shape, two.element));
        let data = |bytes: &[u8], at: u64| bytes[at as usize..][..one.bytes].to_vec();
        assert_eq!(data(&original, one.offset), data(&written, two.offset));
    }
}

#[test]
fn every_golden_folder_opens() {
    let (folders, expectations): (Vec<PathBuf>, Vec<PathBuf>) =
        entries("hf").into_iter().partition(|folder| folder.join("config.json").exists());
    assert!(folders.len() >= 8, "{} golden folders", folders.len());
    // Folders that hold what a model computes, and no model.
    for folder in &expectations {
        let message = ModelFiles::open(folder).unwrap_err().to_string();
        assert!(message.contains("safetensors files without config.json"), "{message}");
    }
    let mut bytes_blocks = 0;
    for folder in &folders {
        let opened = ModelFiles::open(folder).unwrap_or_else(|error| panic!("{error}"));
        check_ranges(&opened, folder);
        let Container::HuggingFace { config, .. } = opened.container() else { panic!("not HF") };
        assert!(config["model_type"].is_string());
        // Beside it lies golden.safetensors, which is no part of the model.
        assert_eq!(opened.paths().len(), 1);
        let embedding = opened.tensor("model.embed_tokens.weight").unwrap();
        assert_eq!(embedding.shape[0] as u64, config["vocab_size"].as_u64().unwrap());
        assert_eq!(embedding.shape[1] as u64, config["hidden_size"].as_u64().unwrap());
        bytes_blocks += opened.tensors().iter().filter(|t| t.element == ElementType::U8).count();
    }
    assert!(bytes_blocks > 0, "no MXFP4 blocks in any golden folder");
}
