//! Traces that tests make or keep.

#![allow(dead_code)]

use pregate_predictor::Shape;
use pregate_traces::replay::MemoryTrace;
use pregate_traces::{Header, Row};
use std::path::{Path, PathBuf};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % limit as u64) as usize
    }

    /// `count` distinct ones of `0..limit`, in any order.
    pub fn distinct(&mut self, count: usize, limit: usize) -> Vec<u16> {
        let mut all: Vec<u16> = (0..limit as u16).collect();
        (0..count).for_each(|at| all.swap(at, at + self.below(limit - at)));
        all.truncate(count);
        all
    }
}

/// Decoded tokens, `[tokens][layers]`.
pub fn decoded(shape: &Shape, tokens: Vec<Vec<Vec<u16>>>) -> MemoryTrace {
    let row = |(index, layers): (usize, Vec<Vec<u16>>)| {
        let mut row = Row::default();
        (row.pass_tokens, row.starts_sequence) = (1, index == 0);
        (row.position, row.token) = (index as u32, Some(index as u32 % 7));
        layers.iter().for_each(|experts| row.push_layer(experts, &[]));
        row
    };
    let header = Header { shape: shape.clone(), ..Header::default() };
    MemoryTrace::new(header, tokens.into_iter().enumerate().map(row).collect())
}

/// The cut of a real trace that is in the repository.
pub fn cut() -> PathBuf {
    data().join("gptoss20b/cut.json")
}

pub fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../predictor/tests/data")
}
