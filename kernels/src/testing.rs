//! Inputs for tests: blocks of every format and activations, usual and
//! adversarial, from a seed. Not part of the API.

use crate::backend::{
    Backend, ExpertGroup, ExpertRows, ExpertWeights, GatedActivation, Grouping, Routes,
};
use crate::block;
use crate::format::Format;
use half::{bf16, f16};

/// SplitMix64 (Steele, Lea, Flood 2014): tests need the same numbers from the
/// same seed for ever, which no library promises.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `0..bound`
    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// In `[0, 1)`.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Mean 0, deviation 1 (Box and Muller 1958).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.unit()).cos()
    }
}

/// What kind of weights to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Scales as in real files: weights have mean 0 and a deviation of about
    /// 0.03, whatever the format.
    Usual,
    /// Every bit random: also infinite, NaN and subnormal scales.
    RandomBits,
    /// Every bit zero.
    Zeros,
    /// Usual scales, all codes, sub-block scales and minimums with every bit
    /// set.
    AllOnes,
    /// The largest finite scales and codes of the largest magnitude (-128 in
    /// Q8_0), signs mixed.
    Largest,
    /// Subnormal scales.
    Subnormal,
    /// Usual blocks, one in four with an infinite or NaN scale.
    NotFinite,
}

impl Weights {
    pub const ALL: [Weights; 7] = [
        Weights::Usual,
        Weights::RandomBits,
        Weights::Zeros,
        Weights::AllOnes,
        Weights::Largest,
        Weights::Subnormal,
        Weights::NotFinite,
    ];
}

/// The bytes of `rows` rows in canonical block order.
pub fn weights(
    format: Format,
    kind: Weights,
    rows: usize,
    cols: usize,
    random: &mut Random,
) -> Vec<u8> {
    let row_bytes = format.row_bytes(cols).expect("whole blocks");
    let mut bytes = vec![0; rows * row_bytes];
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        fill_block(format, kind, block, random);
    }
    bytes
}

fn fill_block(format: Format, kind: Weights, bytes: &mut [u8], random: &mut Random) {
    match kind {
        Weights::Zeros => return bytes.fill(0),
        Weights::AllOnes => bytes.fill(0xff),
        _ => bytes.fill_with(|| random.bits() as u8),
    }
    if format.block_len() == 1 {
        return fill_element(format, kind, bytes, random);
    }
    if kind == Weights::RandomBits {
        return;
    }
    if kind == Weights::Largest {
        fill_largest_codes(format, bytes, random);
    }
    let special = kind == Weights::NotFinite && random.below(4) == 0;
    // Deviation of the integers `scale * code`, and the minimum that centres
    // them, in units of `d`.
    let (spread, centre) = match format {
        Format::Q8_0 => (74.0, None),
        Format::Q4_0 => (4.6, None),
        Format::Q4_1 => (4.6, Some(-7.5)),
        Format::Q5_0 => (9.2, None),
        Format::Q5_1 => (9.2, Some(-15.5)),
        Format::Q2K => (10.0, Some(1.5)),
        Format::Q3K => (43.0, None),
        Format::Q4K => (168.0, Some(7.5)),
        Format::Q5K => (337.0, Some(15.5)),
        Format::Q6K => (1370.0, None),
        Format::Iq4Nl => (66.0, None),
        Format::Iq4Xs => (1220.0, None),
        Format::Mxfp4 => (5.4, None),
        Format::F32 | Format::F16 | Format::Bf16 => unreachable!("handled above"),
    };
    if kind == Weights::Usual {
        centre_minimums(format, bytes);
    }
    if format == Format::Mxfp4 {
        bytes[block::mxfp4::E] = match kind {
            Weights::Largest => 255,
            Weights::Subnormal => random.below(2) as u8,
            _ if special => 255,
            // 2^(e - 128) of about 0.03 / spread.
            _ => 119 + random.below(3) as u8,
        };
        return;
    }
    let d = match kind {
        Weights::Largest => f16::MAX.to_f32() * random.pick(&[1.0, -1.0]),
        Weights::Subnormal => f16::from_bits(1 + random.below(1023) as u16).to_f32(),
        _ => 0.03 / spread * (0.5 + random.unit()),
    };
    let put = |bytes: &mut [u8], at: usize, value: f32| {
        bytes[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    };
    let (d_at, min_at) = scale_offsets(format);
    put(bytes, d_at, d);
    if let (Some(at), Some(centre)) = (min_at, centre) {
        let min = if kind == Weights::Largest { d } else { d * centre };
        put(bytes, at, min);
    }
    if special {
        let value = random.pick(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
        put(bytes, min_at.filter(|_| random.below(2) == 0).unwrap_or(d_at), value);
    }
}

/// Offsets of `d` and of the f16 minimum.
fn scale_offsets(format: Format) -> (usize, Option<usize>) {
    match format {
        Format::Q4_1 => (block::q4_1::D, Some(block::q4_1::M)),
        Format::Q5_1 => (block::q5_1::D, Some(block::q5_1::M)),
        Format::Q2K => (block::q2_k::D, Some(block::q2_k::DMIN)),
        Format::Q4K => (block::q4_k::D, Some(block::q4_k::DMIN)),
        Format::Q5K => (block::q5_k::D, Some(block::q5_k::DMIN)),
        Format::Q3K => (block::q3_k::D, None),
        Format::Q6K => (block::q6_k::D, None),
        _ => (0, None),
    }
}

/// Makes each sub-block's minimum equal to its scale.
fn centre_minimums(format: Format, bytes: &mut [u8]) {
    match format {
        Format::Q2K => {
            for byte in &mut bytes[block::q2_k::SCALES..block::q2_k::QS] {
                *byte = (*byte & 15) * 0x11;
            }
        }
        Format::Q4K | Format::Q5K => {
            let packed = &mut bytes[block::q4_k::SCALES..block::q4_k::SCALES + 12];
            for j in 0..4 {
                packed[j + 4] = packed[j];
                packed[j + 8] = (packed[j + 8] & 15) * 0x11;
            }
        }
        _ => {}
    }
}

/// Codes and sub-block scales at the ends of their ranges.
fn fill_largest_codes(format: Format, bytes: &mut [u8], random: &mut Random) {
    for byte in bytes.iter_mut() {
        *byte = match format {
            Format::Q8_0 => random.pick(&[0x80, 0x7f]),
            _ => random.pick(&[0x00, 0xff, 0x0f, 0xf0]),
        };
    }
    if format == Format::Q6K {
        bytes[block::q6_k::SCALES..block::q6_k::D].fill_with(|| random.pick(&[0x80, 0x7f]));
    }
}

fn fill_element(format: Format, kind: Weights, bytes: &mut [u8], random: &mut Random) {
    let smallest = match format {
        Format::F16 => f16::from_bits(1).to_f32(),
        _ => bf16::from_bits(1).to_f32(),
    };
    let largest = match format {
        Format::F16 => f16::MAX.to_f32(),
        Format::Bf16 => bf16::MAX.to_f32(),
        _ => f32::MAX,
    };
    let value = match kind {
        Weights::RandomBits | Weights::Zeros | Weights::AllOnes => return,
        Weights::Largest => largest * random.pick(&[1.0, -1.0]),
        Weights::Subnormal => smallest * random.below(100) as f32,
        Weights::NotFinite if random.below(16) == 0 => {
            random.pick(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN])
        }
        Weights::NotFinite | Weights::Usual => 0.03 * random.normal(),
    };
    match format {
        Format::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
        Format::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        _ => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}

/// What kind of activations to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    Normal,
    /// Normal, one in 64 a hundred times larger, as real hidden states are.
    Outliers,
    /// Around 2^-100, where the contract's quantisation gives up.
    Tiny,
    /// Around the largest finite value.
    Huge,
    /// Zeros of both signs.
    Zeros,
    Subnormal,
    /// Multiples of half a quantisation step: every other one is a tie.
    Ties,
    /// All of the largest magnitude, signs mixed: every code is 127 or -127.
    Extremes,
    /// Normal with a few infinities and NaNs.
    NotFinite,
}

impl Inputs {
    pub const ALL: [Inputs; 9] = [
        Inputs::Normal,
        Inputs::Outliers,
        Inputs::Tiny,
        Inputs::Huge,
        Inputs::Zeros,
        Inputs::Subnormal,
        Inputs::Ties,
        Inputs::Extremes,
        Inputs::NotFinite,
    ];
}

pub fn inputs(kind: Inputs, len: usize, random: &mut Random) -> Vec<f32> {
    let sign = |random: &mut Random| random.pick(&[1.0, -1.0]);
    (0..len)
        .map(|i| match kind {
            Inputs::Normal => random.normal(),
            Inputs::Outliers if random.below(64) == 0 => 100.0 * random.normal(),
            Inputs::Outliers => random.normal(),
            Inputs::Tiny => (-100.0f32).exp2() * 0.6 * random.normal(),
            Inputs::Huge => f32::MAX * random.unit() * sign(random),
            Inputs::Zeros => 0.0 * sign(random),
            Inputs::Subnormal => f32::from_bits(random.below(1 << 23) as u32) * sign(random),
            // 127 in each group makes the scale exactly 1.
            Inputs::Ties if i % 32 == 5 => 127.0,
            Inputs::Ties => random.below(253) as f32 * 0.5 * sign(random),
            Inputs::Extremes => 3.0 * sign(random),
            Inputs::NotFinite if random.below(128) == 0 => {
                random.pick(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN])
            }
            Inputs::NotFinite => random.normal(),
        })
        .collect()
}

/// A layer's routed experts in one answer, `[tokens, hidden]`; every `parts`-th
/// expert in one call of [`Backend::expert_rows`], as if they had arrived in
/// that order.
pub fn experts_in_parts<'a>(
    backend: &dyn Backend,
    x: &[f32],
    routes: &Routes,
    weights: &dyn Fn(u32) -> ExpertWeights<'a>,
    activation: GatedActivation,
    parts: usize,
) -> Vec<f32> {
    let hidden = x.len() / routes.tokens().max(1);
    let mut grouping = Grouping::default();
    grouping.gather(routes);
    let mut answers = vec![f32::NAN; grouping.rows() * hidden];
    let experts: Vec<u32> = grouping.experts().collect();
    for part in 0..parts {
        let groups: Vec<ExpertGroup<'_>> = (part..experts.len())
            .step_by(parts)
            .map(|index| grouping.group(index, weights(experts[index])))
            .collect();
        if !groups.is_empty() {
            let (tokens, answers) = (routes.tokens(), &mut answers[..]);
            backend.expert_rows(ExpertRows { x, tokens, groups: &groups, activation, answers });
        }
    }
    let mut out = vec![f32::MAX; x.len()];
    backend.combine(routes, &grouping, &answers, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequant::dequantize_row;

    #[test]
    fn usual_weights_are_alike_in_every_format() {
        for format in Format::ALL {
            let mut random = Random::new(7);
            let bytes = weights(format, Weights::Usual, 64, 512, &mut random);
            let mut values = vec![0.0; 64 * 512];
            dequantize_row(format, &bytes, &mut values);
            let count = values.len() as f32;
            let mean = values.iter().sum::<f32>() / count;
            let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / count).sqrt();
            assert!(mean.abs() < 0.006, "{format}: mean {mean}");
            assert!((0.02..0.05).contains(&deviation), "{format}: deviation {deviation}");
        }
    }

    #[test]
    fn adversarial_weights_are_what_they_say() {
        for format in Format::ALL {
            let of = |kind| {
                let mut values = vec![0.0; 4 * 2048];
                let bytes = weights(format, kind, 4, 2048, &mut Random::new(3));
                dequantize_row(format, &bytes, &mut values);
                values
            };
            assert!(of(Weights::Zeros).iter().all(|&v| v == 0.0), "{format}");
            assert!(of(Weights::Largest).iter().any(|v| v.abs() > 5e4), "{format}");
            assert!(of(Weights::Subnormal).iter().all(|v| v.abs() < 0.6), "{format}");
            let not_finite = of(Weights::NotFinite).iter().filter(|v| !v.is_finite()).count();
            assert!((1..4 * 2048).contains(&not_finite), "{format}: {not_finite}");
        }
        assert!(
            weights(Format::Q8_0, Weights::Largest, 1, 32, &mut Random::new(1)).contains(&0x80)
        );
    }
}
