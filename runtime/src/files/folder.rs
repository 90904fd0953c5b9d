//! Folders with a model: which files of a folder belong to it.

use super::{json, table::TensorTable};
use crate::error::{Error, Result};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_CONFIG_BYTES: u64 = 1 << 20;
const MAX_INDEX_BYTES: u64 = 64 << 20;
pub(super) const MAX_SHARDS: usize = 4096;

/// What a folder holds.
#[derive(Debug)]
pub(super) enum Content {
    /// One GGUF file, or the first shard of one split set.
    Gguf(PathBuf),
    HuggingFace(HuggingFace),
}

#[derive(Debug)]
pub(super) struct HuggingFace {
    pub config: serde_json::Map<String, serde_json::Value>,
    pub config_bytes: Vec<u8>,
    pub files: Vec<PathBuf>,
    pub index: Option<Index>,
}

/// Looks into a folder.
pub(super) fn look(folder: &Path) -> Result<Content> {
    let (mut tensor_files, mut gguf_files) = (Vec::new(), Vec::new());
    let io = |source| Error::Io { file: folder.to_path_buf(), action: "list", source };
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.ends_with(".safetensors") {
            tensor_files.push(name.to_string());
        } else if name.ends_with(".gguf") {
            gguf_files.push(name.to_string());
        }
    }
    let has_index = folder.join(INDEX).exists();
    let config_path = folder.join(CONFIG);
    let has_config = config_path.exists();
    let has_tensors = has_index || !tensor_files.is_empty();
    if !has_tensors || !(has_config || gguf_files.is_empty()) {
        return one_gguf(folder, gguf_files).map(Content::Gguf);
    }
    if !has_config {
        return Err(Error::invalid(
            folder,
            None,
            "folder",
            "safetensors files without config.json",
            "config.json beside them, as in the model's Hugging Face repository",
        ));
    }
    let config_bytes = json::read_file(&config_path, MAX_CONFIG_BYTES)?;
    let config = json::parse(&config_path, 0, CONFIG, &config_bytes)?;
    let (files, index) = tensor_paths(folder, &tensor_files, has_index)?;
    Ok(Content::HuggingFace(HuggingFace { config, config_bytes, files, index }))
}

/// `model.safetensors` before the index before any single file: the order in
/// which transformers looks.
fn tensor_paths(
    folder: &Path,
    names: &[String],
    has_index: bool,
) -> Result<(Vec<PathBuf>, Option<Index>)> {
    if names.iter().any(|name| name == SINGLE) {
        return Ok((vec![folder.join(SINGLE)], None));
    }
    if has_index {
        let index = Index::read(&folder.join(INDEX))?;
        let files = index.files.iter().map(|name| folder.join(name)).collect();
        return Ok((files, Some(index)));
    }
    match names {
        [name] => Ok((vec![folder.join(name)], None)),
        _ => Err(Error::invalid(
            folder,
            None,
            "folder",
            format!("{} safetensors files and no index", names.len()),
            format!("{SINGLE}, or {INDEX} beside the shards"),
        )),
    }
}

fn one_gguf(folder: &Path, mut names: Vec<String>) -> Result<PathBuf> {
    names.sort_unstable();
    // Shards of a set count as their first one.
    names.retain(|name| {
        super::split::ShardName::of(Path::new(name)).is_none_or(|shard| shard.number == 1)
    });
    match names.as_slice() {
        [name] => Ok(folder.join(name)),
        [] => Err(Error::invalid(
            folder,
            None,
            "folder",
            "no model",
            "config.json with *.safetensors, or one *.gguf file or split set",
        )),
        _ => Err(Error::invalid(
            folder,
            None,
            "folder",
            format!("{} GGUF models: {}", names.len(), names.join(", ")),
            "one; name the file instead of the folder",
        )),
    }
}

/// `model.safetensors.index.json`: which file holds which tensor.
#[derive(Debug)]
pub(super) struct Index {
    path: PathBuf,
    /// Plain file names in order.
    files: BTreeSet<String>,
    /// Tensor, file.
    weight_map: Vec<(String, String)>,
}

impl Index {
    fn read(path: &Path) -> Result<Self> {
        let bytes = json::read_file(path, MAX_INDEX_BYTES)?;
        let parsed: IndexJson = json::parse(path, 0, INDEX, &bytes)?;
        let weight_map = parsed.weight_map.0;
        let mut files = BTreeSet::new();
        for (tensor, file) in &weight_map {
            if files.contains(file) {
                continue;
            }
            plain_name(path, tensor, file)?;
            files.insert(file.clone());
        }
        if files.is_empty() || files.len() > MAX_SHARDS {
            return Err(Error::invalid(
                path,
                None,
                "weight_map",
                format!("{} files", files.len()),
                format!("1 to {MAX_SHARDS}"),
            ));
        }
        Ok(Self { path: path.to_path_buf(), files, weight_map })
    }

    /// Checks that each listed tensor is where the index says; answers how
    /// many tensors the index does not list.
    pub fn check(&self, paths: &[PathBuf], tensors: &TensorTable) -> Result<usize> {
        for (name, file) in &self.weight_map {
            let found = match tensors.get(name).and_then(|tensor| paths.get(tensor.file)) {
                Some(path) if path.file_name().is_some_and(|name| name == file.as_str()) => {
                    continue;
                }
                Some(path) => format!("the tensor in {}", path.display()),
                None => "no such tensor in any shard".to_string(),
            };
            return Err(Error::invalid(
                &self.path,
                None,
                format!("weight_map entry {name}"),
                found,
                format!("the tensor in {file}"),
            ));
        }
        Ok(tensors.all().len().saturating_sub(self.weight_map.len()))
    }
}

/// An index names files of its own folder. Their entries may be symbolic
/// links to regular files, as in Hugging Face's cache.
fn plain_name(index: &Path, tensor: &str, file: &str) -> Result<()> {
    let plain = file.ends_with(".safetensors")
        && file.len() <= 255
        && !file.starts_with('.')
        && !file.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control());
    if plain {
        return Ok(());
    }
    Err(Error::invalid(
        index,
        None,
        format!("weight_map entry {tensor}"),
        format!("the file {file:?}"),
        "the plain name of a *.safetensors file in the same folder",
    ))
}

#[derive(Deserialize)]
struct IndexJson {
    weight_map: WeightMap,
}

struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
