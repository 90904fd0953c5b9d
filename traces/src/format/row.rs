//! A row in a block.
//!
//! ```text
//! flags:u8             1 starts a sequence, 2 starts a pass, 4 of a prompt,
//!                      8 position, 16 token, 32 weights, 64 served,
//!                      128 not every MoE layer has its top-k experts
//! position:varint      if 8; else one more than in the row before it in the
//!                      block, 0 at the block's or a sequence's start
//! pass tokens:varint   if 2
//! token:varint         if 16
//! counts:varint*       if 128: experts of each MoE layer
//! experts:bits         of each MoE layer in rank order, each of as many bits
//!                      as tell the layer's experts apart; zeros fill the
//!                      last byte
//! weights:f16*         if 32, one for each expert
//! served               if 64: count:varint, then for each layer: layers
//!                      skipped since the last:varint, origins:varint,
//!                      evictions:varint, bytes:varint, stall_ns:varint, and
//!                      for each origin the expert's bits and two bits (0 hit,
//!                      1 early, 2 in flight, 3 miss); zeros fill the last
//!                      byte
//! ```

use super::MAX_PASS;
use super::bits::{BitReader, BitWriter, Bytes, put_varint, width};
use crate::{LayerServed, Row};
use half::f16;
use pregate_predictor::{Origin, Shape};

const STARTS: u8 = 1;
const PASS: u8 = 2;
const PROMPT: u8 = 4;
const POSITION: u8 = 8;
const TOKEN: u8 = 16;
const WEIGHTS: u8 = 32;
const SERVED: u8 = 64;
const PARTIAL: u8 = 128;

/// What reading and writing need to know of a model.
#[derive(Clone, Debug)]
pub struct Layout {
    layers: Vec<Option<Experts>>,
    /// For telling which experts of a layer were seen: the number of the last
    /// layer that had them.
    seen: Vec<u32>,
    layer: u32,
    /// One layer.
    experts: Vec<u16>,
    weights: Vec<f32>,
    counts: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Experts {
    count: usize,
    top_k: usize,
    bits: u32,
}

impl Layout {
    pub fn new(shape: &Shape) -> Self {
        let layers: Vec<_> = shape
            .layers
            .iter()
            .map(|layer| {
                let layer = layer.as_ref()?;
                let (count, top_k) = (layer.experts, layer.top_k);
                Some(Experts { count, top_k, bits: width(count) })
            })
            .collect();
        let most = layers.iter().flatten().map(|layer| layer.count).max().unwrap_or(0);
        let (experts, weights, counts) = (Vec::new(), Vec::new(), Vec::new());
        Self { layers, seen: vec![0; most], layer: 0, experts, weights, counts }
    }

    /// Begins a new set of experts.
    fn begin(&mut self) {
        self.layer = self.layer.checked_add(1).unwrap_or_else(|| {
            self.seen.fill(0);
            1
        });
    }

    /// Is `expert` a new one of a layer with `count`?
    fn mark(&mut self, expert: u32, count: usize) -> bool {
        let expert = expert as usize;
        expert < count && std::mem::replace(&mut self.seen[expert], self.layer) != self.layer
    }

    /// Appends `row`; `position` is the one that need not be said.
    ///
    /// # Errors
    /// A row that the header does not allow; `out` has a part of it then.
    pub fn write(&mut self, row: &Row, position: u32, out: &mut Vec<u8>) -> Result<(), String> {
        self.check(row)?;
        let has_weights = (0..row.layers()).any(|layer| !row.weights(layer).is_empty());
        let is_full = |(index, layer): (usize, &Option<Experts>)| {
            layer.is_none_or(|layer| row.experts(index).len() == layer.top_k)
        };
        let is_full = self.layers.iter().enumerate().all(is_full);
        let expected = if row.starts_sequence { 0 } else { position };
        let flags = [
            (STARTS, row.starts_sequence),
            (PASS, row.pass_tokens > 0),
            (PROMPT, row.is_prompt),
            (POSITION, row.position != expected),
            (TOKEN, row.token.is_some()),
            (WEIGHTS, has_weights),
            (SERVED, !row.served.is_empty()),
            (PARTIAL, !is_full),
        ];
        out.push(flags.iter().filter(|flag| flag.1).map(|flag| flag.0).sum());
        if row.position != expected {
            put_varint(out, row.position.into());
        }
        if row.pass_tokens > 0 {
            put_varint(out, row.pass_tokens.into());
        }
        if let Some(token) = row.token {
            put_varint(out, token.into());
        }
        let moe = || self.layers.iter().enumerate().filter_map(|(i, layer)| Some((i, (*layer)?)));
        if !is_full {
            moe().for_each(|(index, _)| put_varint(out, row.experts(index).len() as u64));
        }
        let mut bits = BitWriter::new(out);
        for (index, layer) in moe() {
            row.experts(index).iter().for_each(|&expert| bits.put(expert.into(), layer.bits));
        }
        bits.finish();
        for index in 0..row.layers() {
            for &weight in row.weights(index) {
                out.extend(f16::from_f32(weight).to_le_bytes());
            }
        }
        if !row.served.is_empty() {
            self.write_served(&row.served, out);
        }
        Ok(())
    }

    fn write_served(&self, served: &[LayerServed], out: &mut Vec<u8>) {
        put_varint(out, served.len() as u64);
        let mut next = 0;
        for layer in served {
            put_varint(out, u64::from(layer.layer - next));
            next = layer.layer + 1;
            put_varint(out, layer.origins.len() as u64);
            put_varint(out, layer.evictions.into());
            put_varint(out, layer.bytes);
            put_varint(out, layer.stall_ns);
            let width = self.layers[layer.layer as usize].map_or(0, |layer| layer.bits);
            let mut bits = BitWriter::new(out);
            for &(expert, origin) in &layer.origins {
                bits.put(expert.into(), width);
                bits.put(origin as u32, 2);
            }
            bits.finish();
        }
    }

    fn check(&mut self, row: &Row) -> Result<(), String> {
        if row.layers() != self.layers.len() {
            return Err(format!("a row of {} layers, not {}", row.layers(), self.layers.len()));
        }
        if row.pass_tokens > MAX_PASS {
            return Err(format!("a pass of {} tokens; {MAX_PASS} are allowed", row.pass_tokens));
        }
        for index in 0..row.layers() {
            let count = self.layers[index].map_or(0, |layer| layer.count);
            self.begin();
            if !row.experts(index).iter().all(|&expert| self.mark(expert.into(), count)) {
                return Err(format!("layer {index} of {count} experts: {:?}", row.experts(index)));
            }
            let overflows = |weight: &&f32| !f16::from_f32(**weight).is_finite();
            if let Some(weight) = row.weights(index).iter().find(overflows) {
                return Err(format!("layer {index} has the weight {weight}"));
            }
        }
        let mut next = 0;
        for layer in &row.served {
            let shape = self.layers.get(layer.layer as usize).copied().flatten();
            let Some(shape) = shape.filter(|_| layer.layer >= next) else {
                return Err(format!("layer {} was served out of turn", layer.layer));
            };
            next = layer.layer + 1;
            self.begin();
            if !layer.origins.iter().all(|&(expert, _)| self.mark(expert.into(), shape.count)) {
                return Err(format!("layer {}: served {:?}", layer.layer, layer.origins));
            }
        }
        Ok(())
    }

    /// Takes a row from the front of `bytes`; the inverse of [`Self::write`].
    ///
    /// # Errors
    /// Bytes that are no row of this model.
    pub fn read(&mut self, bytes: &mut Bytes, position: u32, row: &mut Row) -> Result<(), String> {
        const SHORT: &str = "the block ends within a row";
        row.clear();
        let flags = bytes.byte().ok_or(SHORT)?;
        let has = |flag: u8| flags & flag != 0;
        row.starts_sequence = has(STARTS);
        row.is_prompt = has(PROMPT);
        row.position = if has(STARTS) { 0 } else { position };
        if has(POSITION) {
            row.position = bytes.small().ok_or(SHORT)?;
        }
        if has(PASS) {
            row.pass_tokens = bytes.small().ok_or(SHORT)?;
            if !(1..=MAX_PASS).contains(&row.pass_tokens) {
                return Err(format!("a pass of {} tokens", row.pass_tokens));
            }
        }
        if has(TOKEN) {
            row.token = Some(bytes.small().ok_or(SHORT)?);
        }
        self.counts.clear();
        for layer in self.layers.iter().flatten() {
            let count = match has(PARTIAL) {
                true => bytes.small().ok_or(SHORT)?,
                false => layer.top_k as u32,
            };
            if count as usize > layer.count {
                return Err(format!("{count} of {} experts", layer.count));
            }
            self.counts.push(count);
        }
        self.read_experts(bytes, has(WEIGHTS), row)?;
        if has(SERVED) {
            self.read_served(bytes, row)?;
        }
        Ok(())
    }

    /// `counts` says how many each MoE layer has.
    fn read_experts(
        &mut self,
        bytes: &mut Bytes,
        weigh: bool,
        row: &mut Row,
    ) -> Result<(), String> {
        const SHORT: &str = "the block ends within a row's experts";
        // Weights follow all experts, so both are walked side by side.
        let moe = || self.layers.iter().flatten();
        let bits: u64 =
            moe().zip(&self.counts).map(|(layer, &count)| u64::from(layer.bits * count)).sum();
        let size = usize::try_from(bits.div_ceil(8)).map_err(|_| SHORT)?;
        let mut packed = Bytes { left: bytes.take(size).ok_or(SHORT)? };
        let total: usize = self.counts.iter().map(|&count| count as usize).sum();
        let size = if weigh { total.checked_mul(2).ok_or(SHORT)? } else { 0 };
        let mut halves = Bytes { left: bytes.take(size).ok_or(SHORT)? };
        let mut packed = BitReader::new(&mut packed);
        let mut moe = 0;
        for index in 0..self.layers.len() {
            self.experts.clear();
            self.weights.clear();
            if let Some(layer) = self.layers[index] {
                let count = self.counts[moe];
                moe += 1;
                self.begin();
                for _ in 0..count {
                    let expert = packed.take(layer.bits).ok_or(SHORT)?;
                    if !self.mark(expert, layer.count) {
                        let count = layer.count;
                        return Err(format!("layer {index}: expert {expert} of {count}, or twice"));
                    }
                    self.experts.push(expert as u16);
                    if let Some(half) = halves.left.first_chunk().copied() {
                        halves.left = &halves.left[2..];
                        let weight = f16::from_le_bytes(half).to_f32();
                        if !weight.is_finite() {
                            return Err(format!("layer {index}: the weight {weight}"));
                        }
                        self.weights.push(weight);
                    }
                }
            }
            row.push_layer(&self.experts, &self.weights);
        }
        Ok(())
    }

    fn read_served(&mut self, bytes: &mut Bytes, row: &mut Row) -> Result<(), String> {
        const SHORT: &str = "the block ends within what a pass cost";
        let count = bytes.small().ok_or(SHORT)?;
        let mut next = 0u32;
        for _ in 0..count {
            let skipped = bytes.small().ok_or(SHORT)?;
            let layer = next.checked_add(skipped).ok_or(SHORT)?;
            let Some(shape) = self.layers.get(layer as usize).copied().flatten() else {
                return Err(format!("layer {layer}, which has no experts, was served"));
            };
            next = layer + 1;
            let origins = bytes.varint().ok_or(SHORT)?;
            if origins > shape.count as u64 {
                return Err(format!("layer {layer}: {origins} origins"));
            }
            let evictions = bytes.small().ok_or(SHORT)?;
            let arrived = bytes.varint().ok_or(SHORT)?;
            let stall_ns = bytes.varint().ok_or(SHORT)?;
            let mut served =
                LayerServed { layer, origins: Vec::new(), evictions, bytes: arrived, stall_ns };
            self.begin();
            let mut bits = BitReader::new(bytes);
            for _ in 0..origins {
                let expert = bits.take(shape.bits).ok_or(SHORT)?;
                let origin = match bits.take(2).ok_or(SHORT)? {
                    0 => Origin::Hit,
                    1 => Origin::Early,
                    2 => Origin::InFlight,
                    _ => Origin::Miss,
                };
                if !self.mark(expert, shape.count) {
                    return Err(format!("layer {layer}: expert {expert} was served, or twice"));
                }
                served.origins.push((expert as u16, origin));
            }
            row.served.push(served);
        }
        Ok(())
    }
}
