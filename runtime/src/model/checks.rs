//! Checks and formulas that both description readers share.

use super::description::{Architecture, RopeScaling};
use super::keys::Keys;
use crate::error::Result;

/// For "not supported" messages.
pub fn supported_architectures() -> String {
    let names: Vec<String> = Architecture::ALL
        .iter()
        .map(|a| format!("{} ({}, {})", a.title(), a.gguf_name(), a.model_types()[0]))
        .collect();
    names.join("; ")
}

pub fn even(keys: &Keys<'_>, key: &str, dim: usize) -> Result<()> {
    if dim == 0 || !dim.is_multiple_of(2) {
        return Err(keys.invalid(key, dim.to_string(), "an even number above 0"));
    }
    Ok(())
}

pub fn rope_fits(keys: &Keys<'_>, key: &str, dim: usize, head_dim: usize) -> Result<()> {
    if dim > head_dim {
        return Err(keys.invalid(
            key,
            dim.to_string(),
            format!("at most the head size {head_dim}"),
        ));
    }
    Ok(())
}

/// Expert groups and how many of them are used; (1, 1) if absent.
pub fn groups(keys: &Keys<'_>, count: &str, used: &str, experts: usize) -> Result<(usize, usize)> {
    let groups = keys.optional_size(count, 0..=experts)?.unwrap_or(1).max(1);
    if !experts.is_multiple_of(groups) {
        return Err(keys.invalid(count, groups.to_string(), format!("a divisor of {experts}")));
    }
    let groups_used = keys.optional_size(used, 0..=groups)?.unwrap_or(groups).max(1);
    Ok((groups, groups_used))
}

/// YaRN's magnitude correction (2309.00071, equation 22, with DeepSeek's
/// multiplier).
pub fn yarn_scale(factor: f64, multiplier: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * multiplier * factor.ln() + 1.0 }
}

/// LongRoPE's magnitude correction (2402.13753).
pub fn long_rope_scale(context: usize, original: usize) -> f64 {
    let factor = context as f64 / original as f64;
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() }
}

/// The logit scale of latent attention: DeepSeek squares YaRN's correction
/// into it.
pub fn latent_scale(key_dim: usize, scaling: &RopeScaling, mscale_all_dim: f64) -> f32 {
    let correction = match scaling {
        RopeScaling::Yarn { factor, .. } if mscale_all_dim > 0.0 => {
            yarn_scale(*factor, mscale_all_dim)
        }
        _ => 1.0,
    };
    ((key_dim as f64).powf(-0.5) * correction * correction) as f32
}
