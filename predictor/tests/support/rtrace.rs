//! Reads rtrace-1 files: a manifest `NAME.json` and beside it `NAME.ids.u8`,
//! `NAME.w.f16` and `NAME.tok.u32`.

use serde_json::Value;
use std::path::{Path, PathBuf};

/// Recorded routing of real text.
pub struct Trace {
    pub tokens: usize,
    pub layers: usize,
    pub top_k: usize,
    pub experts: usize,
    /// First token of each sequence.
    pub starts: Vec<usize>,
    ids: Vec<u8>,
}

impl Trace {
    /// Panics on anything that does not fit together.
    pub fn open(manifest: &Path) -> Self {
        let what = manifest.display();
        let text = std::fs::read_to_string(manifest).unwrap_or_else(|e| panic!("{what}: {e}"));
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(json["format"], "rtrace-1", "{what}");
        let number = |key: &str| json[key].as_u64().unwrap_or_else(|| panic!("{what}: {key}"));
        let [tokens, layers, top_k, experts] =
            ["tokens", "layers", "top_k", "experts"].map(|key| number(key) as usize);
        let ids = std::fs::read(manifest.with_extension("ids.u8")).expect("the ids");
        assert_eq!(ids.len(), tokens * layers * top_k, "{what}: ids");
        let sequences = json["sequences"].as_array().expect("sequences");
        let start = |sequence: &Value| match sequence {
            Value::Object(fields) => fields["start"].as_u64(),
            Value::Array(fields) => fields[0].as_u64(),
            _ => None,
        };
        let starts: Vec<usize> =
            sequences.iter().map(|s| start(s).expect("a start") as usize).collect();
        assert!(starts.iter().all(|&start| start < tokens), "{what}: starts");
        Self { tokens, layers, top_k, experts, starts, ids }
    }

    /// The experts of `token` at `layer` in rank order; those that were not
    /// recorded are left out.
    pub fn experts(&self, token: usize, layer: usize) -> impl Iterator<Item = u32> + '_ {
        let at = (token * self.layers + layer) * self.top_k;
        self.ids[at..at + self.top_k].iter().filter(|&&id| id != 255).map(|&id| u32::from(id))
    }
}

/// The repository's own traces and, where it lies beside the checkout, the
/// team's full set.
#[allow(dead_code)]
pub fn find(name: &str) -> Option<PathBuf> {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let roots = [crate_root.join("tests/data"), crate_root.join("../../shared/traces")];
    roots.iter().map(|root| root.join(name)).find(|path| path.exists())
}
