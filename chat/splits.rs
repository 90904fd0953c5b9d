//! Who brought the experts that a GPU missed, layer by layer, and why.

use pregate_runtime::Model;
use serde::Serialize;

/// One layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    pub layer: usize,
    pub misses: u64,
    /// Of the misses, 0..=1; the others were copied for the layer.
    pub cpu_share: f64,
    pub already_under_way_share: f64,
    /// Of the misses, those that the CPU computed and that were copied for
    /// later tokens.
    pub kept_share: f64,
    /// One expert, alone.
    pub copy_ms: f64,
    pub cpu_ms: f64,
    /// Of the last decision, in words.
    pub why: String,
}

/// `None` where nothing comes to a GPU and goes, or `--misses` decided.
pub fn report(model: &Model) -> Option<Vec<LayerReport>> {
    let layers = model.gpu()?.splits()?.into_iter();
    let report = layers.map(|layer| LayerReport {
        layer: layer.layer,
        misses: layer.misses,
        cpu_share: layer.cpu_share,
        already_under_way_share: layer.wait_share,
        kept_share: layer.kept_share,
        copy_ms: layer.copy_ns / 1e6,
        cpu_ms: layer.cpu_ns / 1e6,
        why: layer.reason.to_string(),
    });
    Some(report.collect())
}

/// The same in words, for the layers that missed something.
pub fn lines(model: &Model) -> Vec<String> {
    let layers = model.gpu().and_then(|gpu| gpu.splits()).unwrap_or_default();
    layers.iter().filter(|layer| layer.misses > 0).map(ToString::to_string).collect()
}
