//! What a sampler can be asked for, and the limits of every number.

use crate::error::{Error, Result};

/// DRY ("don't repeat yourself"): a token that would continue a repetition is
/// penalised by `multiplier * base ^ (length - allowed_length)`, where
/// `length` is how much of the end of the text occurred before, followed by
/// that token. Source: p-e-w, github.com/oobabooga/text-generation-webui/pull/5677.
#[derive(Clone, Debug, PartialEq)]
pub struct Dry {
    /// 0 to 100; 0 switches it off.
    pub multiplier: f32,
    /// 1 to 100.
    pub base: f32,
    /// The longest repetition that costs nothing; 1 to 1,000.
    pub allowed_length: usize,
    /// Tokens that end a repetition, such as new lines and turn markers.
    pub breakers: Vec<u32>,
    /// How many of the last tokens are searched; 0 to 2^20.
    pub window: usize,
}

impl Default for Dry {
    fn default() -> Self {
        Self { multiplier: 0.8, base: 1.75, allowed_length: 2, breakers: Vec::new(), window: 1024 }
    }
}

/// How tokens are chosen. The default is greedy, with every filter off.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// 0 to 100; 0 is greedy.
    pub temperature: f32,
    /// 0 (off) to 2^24: the best k tokens.
    pub top_k: usize,
    /// 0 (one token) to 1 (off).
    pub top_p: f32,
    /// 0 (off) to 1.
    pub min_p: f32,
    /// 0.01 to 100; 1 is off.
    pub repetition_penalty: f32,
    /// -100 to 100; 0 is off.
    pub presence_penalty: f32,
    /// -100 to 100; 0 is off.
    pub frequency_penalty: f32,
    /// How many of the last tokens the three penalties look at; 0 to 2^20.
    pub penalty_window: usize,
    pub dry: Option<Dry>,
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 64,
            dry: None,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Names the first option that is out of its range.
    pub fn check(&self) -> Result<()> {
        within("temperature", self.temperature, 0.0, 100.0)?;
        count("top-k", self.top_k, 0, 1 << 24)?;
        within("top-p", self.top_p, 0.0, 1.0)?;
        within("min-p", self.min_p, 0.0, 1.0)?;
        within("repetition penalty", self.repetition_penalty, 0.01, 100.0)?;
        within("presence penalty", self.presence_penalty, -100.0, 100.0)?;
        within("frequency penalty", self.frequency_penalty, -100.0, 100.0)?;
        count("penalty window", self.penalty_window, 0, 1 << 20)?;
        if let Some(dry) = &self.dry {
            within("DRY multiplier", dry.multiplier, 0.0, 100.0)?;
            within("DRY base", dry.base, 1.0, 100.0)?;
            count("DRY allowed length", dry.allowed_length, 1, 1000)?;
            count("DRY window", dry.window, 0, 1 << 20)?;
        }
        Ok(())
    }
}

fn within(name: &str, found: f32, lowest: f32, highest: f32) -> Result<()> {
    if (lowest..=highest).contains(&found) {
        return Ok(());
    }
    Err(Error::Request(format!("{name} is {found}; allowed: {lowest} to {highest}")))
}

fn count(name: &str, found: usize, lowest: usize, highest: usize) -> Result<()> {
    if (lowest..=highest).contains(&found) {
        return Ok(());
    }
    Err(Error::Request(format!("{name} is {found}; allowed: {lowest} to {highest}")))
}
