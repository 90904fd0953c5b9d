//! Golden cases: where they are and how to read them.

use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The folders that hold golden files: the repository's own, which must be
/// there, and the team's full set where it lies beside the checkout (with
/// `PREGATE_SHARED=0` not even then: what users have).
pub fn roots() -> Vec<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let own = workspace.join("tests/data");
    assert!(own.is_dir(), "{} is missing", own.display());
    let full = workspace.join("../shared/golden");
    let is_wanted = std::env::var_os("PREGATE_SHARED").is_none_or(|value| value != "0");
    if is_wanted && full.is_dir() { vec![own, full] } else { vec![own] }
}

/// Entries of `folder` below every root, by file name, the full set first.
pub fn entries(folder: &str) -> Vec<PathBuf> {
    let mut found: HashMap<String, PathBuf> = HashMap::new();
    for root in roots() {
        let Ok(list) = std::fs::read_dir(root.join(folder)) else { continue };
        for entry in list {
            let path = entry.expect("a readable folder").path();
            found.insert(path.file_name().unwrap().to_string_lossy().into_owned(), path);
        }
    }
    let mut paths: Vec<PathBuf> = found.into_values().collect();
    paths.sort();
    paths
}

/// Every model that can be loaded: GGUF files and folders. Of some folders the
/// repository has the answers alone; IQ3_S is refused.
pub fn models() -> Vec<PathBuf> {
    let is_model = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "gguf")
            || path.join("config.json").is_file()
    };
    let supported = |path: &PathBuf| !path.to_string_lossy().contains("IQ3_S");
    let all = entries("gguf").into_iter().chain(entries("hf"));
    let models: Vec<PathBuf> = all.filter(is_model).filter(supported).collect();
    assert!(models.len() > 20, "only {} models", models.len());
    models
}

/// A file of the golden set, wherever it is.
pub fn find(relative: &str) -> Option<PathBuf> {
    roots().iter().map(|root| root.join(relative)).find(|path| path.exists())
}

/// The tensors of a safetensors file of F32 and I32, as f32 and i64.
pub struct Golden {
    floats: HashMap<String, (Vec<usize>, Vec<f32>)>,
    integers: HashMap<String, (Vec<usize>, Vec<i64>)>,
}

impl Golden {
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: HashMap<String, Value> = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let data = &bytes[8 + header..];
        let (mut floats, mut integers) = (HashMap::new(), HashMap::new());
        for (name, entry) in json {
            if name == "__metadata__" {
                continue;
            }
            let numbers = |key: &str| -> Vec<usize> {
                entry[key]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|n| n.as_u64().unwrap() as usize)
                    .collect()
            };
            let (shape, range) = (numbers("shape"), numbers("data_offsets"));
            let words = data[range[0]..range[1]].chunks_exact(4).map(|b| b.try_into().unwrap());
            match entry["dtype"].as_str().unwrap() {
                "F32" => {
                    floats.insert(name, (shape, words.map(f32::from_le_bytes).collect()));
                }
                "I32" => {
                    let values = words.map(|b| i64::from(i32::from_le_bytes(b))).collect();
                    integers.insert(name, (shape, values));
                }
                other => panic!("{}: {name} is {other}", path.display()),
            }
        }
        Self { floats, integers }
    }

    pub fn floats(&self, name: &str) -> &[f32] {
        &self.floats[name].1
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.integers[name].1.iter().map(|&id| id as u32).collect()
    }

    /// Rows of an integer tensor, if the file has it.
    pub fn id_rows(&self, name: &str) -> Option<Vec<Vec<u32>>> {
        let (shape, values) = self.integers.get(name)?;
        Some(values.chunks(shape[1]).map(|row| row.iter().map(|&id| id as u32).collect()).collect())
    }

    pub fn float_rows(&self, name: &str) -> Vec<Vec<f32>> {
        let (shape, values) = &self.floats[name];
        values.chunks(shape[1]).map(<[f32]>::to_vec).collect()
    }
}

/// The largest difference, in standard deviations of `want`.
pub fn worst_deviation(found: &[f32], want: &[f32]) -> f64 {
    assert_eq!(found.len(), want.len());
    let mean = want.iter().map(|&v| f64::from(v)).sum::<f64>() / want.len() as f64;
    let variance =
        want.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / want.len() as f64;
    let worst = found
        .iter()
        .zip(want)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs())
        .fold(0.0, |worst: f64, d| if d.is_nan() { f64::INFINITY } else { worst.max(d) });
    worst / variance.sqrt()
}

pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}
