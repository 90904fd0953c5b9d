//! When every expert is asked for next, in memory that hardly grows with the
//! trace.
//!
//! The next use is known backwards, and a trace is read forwards. So the first
//! reading notes, at the border of every block of passes, when each expert is
//! used first behind it; the second reading holds one block, and goes back
//! through it from those notes. That is 4 bytes per expert of the model and
//! block, and 2 + 4 bytes per access of one block: gpt-oss-20b (24 layers of
//! 32) has 0.4 byte a token and 10 MB for the block; a 10 GB trace of
//! DeepSeek-V2-Lite 26 MB and 16 MB.

use super::super::passes::{Pass, Passes};
use super::belady::NEVER;
use crate::{Source, TraceError};
use pregate_predictor::Shape;

/// Passes of a block.
const BLOCK: u32 = 16_384;

/// No use in what is known.
const UNKNOWN: u32 = u32::MAX;

/// An event with its future.
pub struct Seen<'a> {
    /// Counted from 0.
    pub pass: u64,
    pub layer: usize,
    pub experts: &'a [u16],
    /// `[experts]`: of each the next use: pass and layer in one number.
    pub next: &'a [u64],
}

/// Places of experts in one list.
struct Places {
    /// `[layers]`: of each layer's first.
    first: Vec<usize>,
    all: usize,
}

impl Places {
    fn new(shape: &Shape) -> Self {
        let mut all = 0;
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        let first = |layer| {
            let first = all;
            all += experts(layer);
            first
        };
        Self { first: (0..shape.layers.len()).map(first).collect(), all }
    }

    fn of(&self, layer: usize, expert: u16) -> usize {
        self.first[layer] + usize::from(expert)
    }
}

/// Calls `see` with every event of `source`, from its start to its end.
///
/// # Errors
/// Those of the source.
pub fn foresee(source: &mut dyn Source, see: &mut dyn FnMut(&Seen<'_>)) -> Result<(), TraceError> {
    foresee_by(source, BLOCK, see)
}

/// [`foresee`] with blocks of so many passes.
fn foresee_by(
    source: &mut dyn Source,
    block: u32,
    see: &mut dyn FnMut(&Seen<'_>),
) -> Result<(), TraceError> {
    let places = Places::new(&source.header().shape);
    let borders = borders(source, &places, block)?;
    source.rewind()?;
    let layers = source.header().shape.layers.len();
    let mut passes = Passes::new(source);
    let mut events = Block::default();
    for (index, mut after) in borders.into_iter().enumerate() {
        let start = index as u64 * u64::from(block);
        events.read(&mut passes, layers, block)?;
        events.look_back(&places, start, &mut after);
        events.tell(start, see);
    }
    Ok(())
}

/// Per block and expert: the first pass behind the block that uses it.
fn borders(
    source: &mut dyn Source,
    places: &Places,
    block: u32,
) -> Result<Vec<Vec<u32>>, TraceError> {
    source.rewind()?;
    let layers = source.header().shape.layers.len();
    let mut borders: Vec<Vec<u32>> = Vec::new();
    // The block of each expert's last use.
    let mut last = vec![0; places.all];
    let mut passes = Passes::new(source);
    let (mut pass, mut at) = (Pass::default(), 0u32);
    while passes.next(&mut pass)? {
        let now = (at / block) as usize;
        if borders.len() <= now {
            borders.push(vec![UNKNOWN; places.all]);
        }
        for layer in 0..layers {
            for &expert in pass.experts(layer) {
                let place = places.of(layer, expert);
                // All blocks since then find it here next.
                for border in &mut borders[last[place]..now] {
                    border[place] = at;
                }
                last[place] = now;
            }
        }
        at += 1;
    }
    Ok(borders)
}

/// The events of one block.
#[derive(Default)]
struct Block {
    /// Pass of the block, layer, and where its experts end.
    events: Vec<(u32, u32, usize)>,
    experts: Vec<u16>,
    /// As `experts`: the pass of the next use.
    next: Vec<u32>,
    pass: Pass,
}

impl Block {
    fn read(
        &mut self,
        passes: &mut Passes<'_>,
        layers: usize,
        block: u32,
    ) -> Result<(), TraceError> {
        self.events.clear();
        self.experts.clear();
        for at in 0..block {
            if !passes.next(&mut self.pass)? {
                break;
            }
            for layer in 0..layers {
                let experts = self.pass.experts(layer);
                if !experts.is_empty() {
                    self.experts.extend_from_slice(experts);
                    self.events.push((at, layer as u32, self.experts.len()));
                }
            }
        }
        Ok(())
    }

    fn look_back(&mut self, places: &Places, start: u64, after: &mut [u32]) {
        self.next.clear();
        self.next.resize(self.experts.len(), UNKNOWN);
        for (index, &(at, layer, end)) in self.events.iter().enumerate().rev() {
            let first = index.checked_sub(1).map_or(0, |before| self.events[before].2);
            for place in first..end {
                let expert = places.of(layer as usize, self.experts[place]);
                self.next[place] = std::mem::replace(&mut after[expert], start as u32 + at);
            }
        }
    }

    fn tell(&self, start: u64, see: &mut dyn FnMut(&Seen<'_>)) {
        let (mut first, mut next) = (0, Vec::new());
        for &(at, layer, end) in &self.events {
            next.clear();
            next.extend(self.next[first..end].iter().map(|&pass| match pass {
                UNKNOWN => NEVER,
                pass => u64::from(pass) << 16 | u64::from(layer),
            }));
            let (pass, layer) = (start + u64::from(at), layer as usize);
            see(&Seen { pass, layer, experts: &self.experts[first..end], next: &next });
            first = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::MemoryTrace;
    use super::*;
    use crate::{Header, Row};

    /// Two layers of five experts, some passes of three tokens, one layer
    /// that was not always recorded.
    fn trace() -> MemoryTrace {
        let mut state = 7u64;
        let mut random = |limit: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % limit
        };
        let row = |index: u64| {
            let tokens = if index.is_multiple_of(11) { 3 } else { 1 };
            let in_chunk = index % 11 == 1 || index % 11 == 2;
            let mut row = Row::default();
            row.pass_tokens = if in_chunk { 0 } else { tokens };
            let first = random(5) as u16;
            row.push_layer(&[first, (first + 1 + random(4) as u16) % 5], &[]);
            row.push_layer(if random(4) == 0 { &[] } else { &[3] }, &[]);
            row
        };
        let shape = Shape::uniform(2, 5, 2, 1);
        MemoryTrace::new(Header { shape, ..Header::default() }, (0..120).map(row).collect())
    }

    #[test]
    fn blocks_of_any_size_see_the_same_future() {
        let seen = |block| {
            let mut seen = Vec::new();
            let mut note = |event: &Seen<'_>| {
                let Seen { pass, layer, experts, next } = event;
                seen.push((*pass, *layer, experts.to_vec(), next.to_vec()));
            };
            foresee_by(&mut trace(), block, &mut note).unwrap();
            seen
        };
        let whole = seen(1 << 20);
        for (index, (_, layer, experts, next)) in whole.iter().enumerate() {
            for (expert, next) in experts.iter().zip(next) {
                let same = |later: &&(u64, usize, Vec<u16>, Vec<u64>)| {
                    later.1 == *layer && later.2.contains(expert)
                };
                let found = whole[index + 1..].iter().find(same);
                let want = found.map_or(NEVER, |later| later.0 << 16 | *layer as u64);
                assert_eq!(*next, want, "event {index}, expert {expert}");
            }
        }
        for block in [1, 2, 7, 64] {
            assert!(seen(block) == whole, "blocks of {block}");
        }
    }
}
