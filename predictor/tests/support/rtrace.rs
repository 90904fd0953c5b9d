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
    #[allow(dead_code)]
    pub starts: Vec<usize>,
    /// Of each sequence: the source calls it a degenerate loop.
    #[allow(dead_code)]
    pub repetitive: Vec<bool>,
    ids: Vec<u8>,
    /// Little-endian halves in the layout of `ids`; empty if not recorded.
    weights: Vec<u8>,
    /// `[tokens]`, anonymous but consistent; empty if not recorded.
    #[allow(dead_code)]
    pub token_ids: Vec<u32>,
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
        let repetitive =
            sequences.iter().map(|s| s["repetition"].as_bool().unwrap_or(false)).collect();
        let weights = std::fs::read(manifest.with_extension("w.f16")).unwrap_or_default();
        assert!(weights.is_empty() || weights.len() == 2 * ids.len(), "{what}: weights");
        let token_ids = std::fs::read(manifest.with_extension("tok.u32")).unwrap_or_default();
        assert!(token_ids.is_empty() || token_ids.len() == 4 * tokens, "{what}: token ids");
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let token_ids = token_ids.chunks_exact(4).map(number).collect();
        Self { tokens, layers, top_k, experts, starts, repetitive, ids, weights, token_ids }
    }

    /// The gate weights of [`Self::experts`]; equal ones if not recorded.
    #[allow(dead_code)]
    pub fn weights(&self, token: usize, layer: usize) -> impl Iterator<Item = f32> + '_ {
        let at = (token * self.layers + layer) * self.top_k;
        let recorded = (at..at + self.top_k).filter(|&at| self.ids[at] != 255);
        recorded.map(|at| match self.weights.get(2 * at..2 * at + 2) {
            Some(bytes) => half(u16::from_le_bytes([bytes[0], bytes[1]])),
            None => 1.0,
        })
    }

    /// The experts of `token` at `layer` in rank order; those that were not
    /// recorded are left out.
    pub fn experts(&self, token: usize, layer: usize) -> impl Iterator<Item = u32> + '_ {
        let at = (token * self.layers + layer) * self.top_k;
        self.ids[at..at + self.top_k].iter().filter(|&&id| id != 255).map(|&id| u32::from(id))
    }
}

/// A positive half-precision number.
fn half(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023) / 1024.0);
    match exponent {
        0 => fraction * 2f32.powi(-14),
        _ => (1.0 + fraction) * 2f32.powi(exponent - 15),
    }
}

/// The repository's own traces and, where it lies beside the checkout, the
/// team's full set (with `PREGATE_SHARED=0` not even then: what users have).
#[allow(dead_code)]
pub fn find(name: &str) -> Option<PathBuf> {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let roots = [crate_root.join("tests/data"), crate_root.join("../../shared/traces")];
    let is_wanted = std::env::var_os("PREGATE_SHARED").is_none_or(|value| value != "0");
    roots[..if is_wanted { 2 } else { 1 }]
        .iter()
        .map(|root| root.join(name))
        .find(|path| path.exists())
}
