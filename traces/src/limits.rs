//! Which shapes a trace may have, whatever file it comes from. Tables per
//! expert are made for them before the first token, so a header of a few bytes
//! must not ask for gigabytes.

use pregate_predictor::{LayerShape, Shape};

/// Far above any model.
pub const MAX_LAYERS: usize = 4096;
/// Of a layer. Ids are 16 bits; one of them says "none", and none is as large
/// as the number of experts.
pub const MAX_EXPERTS: usize = u16::MAX as usize - 1;
/// Of all layers: eight times as many as any model has.
pub const MAX_EXPERTS_IN_ALL: usize = 1 << 20;
/// That a token uses in all layers: several times as many as with any model.
/// Policies and forecasts remember them for thousands of tokens.
pub const MAX_TOP_K_IN_ALL: usize = 1 << 14;
/// Several times the largest that was published (Grok-1, 2.4 GB in 32 bits).
/// Replay moves an expert in steps of 2 MiB.
pub const MAX_EXPERT_BYTES: u64 = 16 << 30;
/// Of a trace that names them beforehand: 72 bytes each and their labels, which
/// with the text of a header stay below 64 MiB.
pub const MAX_SEQUENCES: usize = 1 << 18;

/// # Errors
/// The layer and the figure that are too large, and what is allowed.
pub fn check(shape: &Shape) -> Result<(), String> {
    if shape.layers.len() > MAX_LAYERS {
        return Err(format!("{} layers; {MAX_LAYERS} are allowed", shape.layers.len()));
    }
    let mut all = 0;
    for (index, layer) in shape.moe() {
        let LayerShape { experts, top_k, expert_bytes, class } = *layer;
        if !(1..=MAX_EXPERTS).contains(&experts) || !(1..=experts).contains(&top_k) {
            return Err(format!(
                "layer {index} has {experts} experts and top-{top_k}; 1 to {MAX_EXPERTS} experts \
                 are allowed, and as many a token"
            ));
        }
        if expert_bytes > MAX_EXPERT_BYTES {
            return Err(format!(
                "layer {index} has experts of {expert_bytes} bytes; {MAX_EXPERT_BYTES} are allowed"
            ));
        }
        // Classes number groups of layers.
        if class >= MAX_LAYERS {
            return Err(format!("layer {index} is of class {class}; {MAX_LAYERS} are allowed"));
        }
        all += experts;
        if all > MAX_EXPERTS_IN_ALL {
            return Err(format!(
                "layers up to {index} have {all} experts; {MAX_EXPERTS_IN_ALL} are allowed"
            ));
        }
    }
    Ok(())
}

/// Which shapes policies and forecasts take: they remember thousands of tokens.
///
/// # Errors
/// How many experts a token uses, and what is allowed.
pub fn check_remembered(shape: &Shape) -> Result<(), String> {
    let chosen: usize = shape.moe().map(|(_, layer)| layer.top_k).sum();
    match chosen {
        ..=MAX_TOP_K_IN_ALL => Ok(()),
        _ => Err(format!(
            "a token uses {chosen} experts of the model; {MAX_TOP_K_IN_ALL} are allowed here"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_bytes_ask_for_no_gigabytes() {
        assert!(check(&Shape::uniform(94, 512, 22, 1 << 20)).is_ok());
        for (layers, experts, top_k, word) in
            [(MAX_LAYERS + 1, 8, 2, "layers"), (20, 65_534, 2, "experts"), (1, 8, 9, "top-9")]
        {
            let problem = check(&Shape::uniform(layers, experts, top_k, 1)).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
        assert!(check_remembered(&Shape::uniform(94, 512, 22, 1)).is_ok());
        assert!(check_remembered(&Shape::uniform(15, 65_534, 65_534, 1)).is_err());
    }
}
