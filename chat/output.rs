//! Standard output: a closed one is a quiet end.

use crate::{exit::Failure, tui};
use pregate_predictor::Shape;
use serde::Serialize;
use std::io::{self, Write};

pub fn line(text: &str) -> Result<(), Failure> {
    writeln!(io::stdout(), "{text}").map_err(Failure::output)
}

pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::Internal(error.to_string()))?;
    line(&text)
}

/// "13.0 MB", powers of ten.
pub fn bytes(count: u64) -> String {
    let units = ["bytes", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} bytes") } else { format!("{value:.1} {}", units[unit]) }
}

/// "24 MoE layers, top-4 of 32 experts": every kind of layer, up to three.
pub fn shape_words(shape: &Shape) -> String {
    const TOLD: usize = 3;
    let mut kinds: Vec<(usize, usize)> = Vec::new();
    for (_, layer) in shape.moe() {
        let kind = (layer.top_k, layer.experts);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let told = kinds.iter().take(TOLD).map(|(top_k, experts)| format!("top-{top_k} of {experts}"));
    let told = told.collect::<Vec<_>>().join(", ");
    let more = match kinds.len() - kinds.len().min(TOLD) {
        0 => String::new(),
        others => format!(" and {others} other kinds"),
    };
    match shape.moe().count() {
        0 => "no MoE layer".to_string(),
        1 => format!("1 MoE layer, {told} experts"),
        layers => format!("{layers} MoE layers, {told} experts{more}"),
    }
}

/// Text from a file on one line, without what would move the cursor.
pub fn printable(text: &str) -> String {
    tui::clean(text).replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use pregate_predictor::{LayerShape, Shape};

    #[test]
    fn text_of_others_moves_no_cursor() {
        let text = "a\x1b[2J\nb\u{9b}31m é\u{202e}";
        assert_eq!(super::printable(text), "a\u{fffd}[2J b\u{fffd}31m é\u{fffd}");
    }

    #[test]
    fn every_kind_of_layer_is_told() {
        let layer = |top_k, experts| Some(LayerShape { experts, top_k, expert_bytes: 1, class: 0 });
        let words = |layers: &[_]| super::shape_words(&Shape { layers: layers.to_vec() });
        assert_eq!(words(&[None]), "no MoE layer");
        assert_eq!(words(&[None, layer(4, 32)]), "1 MoE layer, top-4 of 32 experts");
        let two = [layer(4, 32), layer(2, 8), layer(4, 32)];
        assert_eq!(words(&two), "3 MoE layers, top-4 of 32, top-2 of 8 experts");
        let many: Vec<_> = (1..=5).map(|top_k| layer(top_k, 8)).collect();
        assert!(words(&many).ends_with("top-3 of 8 experts and 2 other kinds"));
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(super::bytes(0), "0 bytes");
        assert_eq!(super::bytes(12_950_000), "12.9 MB");
        assert_eq!(super::bytes(u64::MAX), "18446744.1 TB");
    }
}
