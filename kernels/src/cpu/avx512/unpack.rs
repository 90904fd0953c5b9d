//! Sixteen rows of any quantised format as one panel of unsigned bytes:
//! `[cols / 4][16 rows][4]`, with the rows' scales in vectors beside it.
//! Packed bytes are transposed before they are unpacked, so the shuffles are
//! paid per packed byte.

use super::batch::TOKENS;
use super::decode::{IQ4_UNSIGNED, MXFP4_UNSIGNED, iq4_xs_scales, q3_k_scales};
use super::simd::*;
use crate::block::{self, q2_k, q3_k, q4_k, q5_k, q6_k};
use crate::cpu::kernels::Rows;
use crate::format::Format;
use std::arch::x86_64::*;

/// One group of four columns of sixteen rows.
pub type Quad = [u8; 64];
/// A value of each of sixteen rows.
pub type Ints = [i32; 16];
pub type Floats = [f32; 16];

/// Sixteen rows, unpacked.
#[derive(Debug, Default)]
pub struct Panel {
    /// `[cols / 4]`
    pub quads: Vec<Quad>,
    /// `[blocks][sub-blocks]` for blocks of 256, else empty.
    pub scales: Vec<Ints>,
    /// `[blocks][sub-blocks / 2]`: pairs of 16-bit minimums, where the format
    /// has them in its sub-blocks.
    pub mins: Vec<Ints>,
    /// `[blocks]`
    pub d: Vec<Floats>,
    /// `[blocks]`, where the format has minimums.
    pub m: Vec<Floats>,
    /// `[8 lanes]`: float lanes of the tile at hand.
    pub lanes: Vec<[Floats; TOKENS]>,
}

/// The parts of a panel that one block fills.
struct Target<'a> {
    quads: &'a mut [Quad],
    scales: &'a mut [Ints],
    mins: &'a mut [Ints],
    d: &'a mut Floats,
    m: Option<&'a mut Floats>,
}

/// How a format's integers are arranged for the batch kernels.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Activations of a sub-block: 16 or 32.
    pub sub_len: usize,
    /// Sub-block scales of a block.
    pub scales: usize,
    /// Pairs of minimums of a block.
    pub min_pairs: usize,
    /// What was added to the weights to make them unsigned: `2^shift`.
    pub shift: Option<u32>,
    /// Whether the block has `m`.
    pub has_m: bool,
}

pub fn shape(format: Format) -> Shape {
    let small = |shift, has_m| Shape { sub_len: 32, scales: 0, min_pairs: 0, shift, has_m };
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => panic!("{format} has no panels"),
        Format::Q8_0 | Format::Iq4Nl => small(Some(7), false),
        Format::Q4_0 => small(Some(3), false),
        Format::Q5_0 | Format::Mxfp4 => small(Some(4), false),
        Format::Q4_1 | Format::Q5_1 => small(None, true),
        Format::Q4K | Format::Q5K => Shape { scales: 8, min_pairs: 4, ..small(None, true) },
        Format::Q2K => Shape { sub_len: 16, scales: 16, min_pairs: 8, shift: None, has_m: true },
        Format::Q3K => Shape { sub_len: 16, scales: 16, ..small(Some(2), false) },
        Format::Q6K => Shape { sub_len: 16, scales: 16, ..small(Some(5), false) },
        Format::Iq4Xs => Shape { scales: 8, ..small(Some(7), false) },
    }
}

/// Declares the unpacking of whole rows from that of one block column.
macro_rules! panel_of {
    ($name:ident, $bytes:literal, $block:ident) => {
        simd! {
            fn $name(rows: Rows<'_>, first: usize, panel: &mut Panel) {
                let shape = shape(rows.format);
                let blocks = rows.cols / rows.format.block_len();
                let (each, last) = (rows.format.block_len() / 4, rows.rows - 1);
                let mut table: [&[[u8; $bytes]]; 16] = [&[]; 16];
                for (r, row) in table.iter_mut().enumerate() {
                    // Missing rows repeat the last one; their answers are not
                    // stored.
                    *row = rows.row((first + r).min(last)).as_chunks::<$bytes>().0;
                }
                for b in 0..blocks {
                    let mut at: [&[u8; $bytes]; 16] = [&[0; $bytes]; 16];
                    for r in 0..16 {
                        at[r] = &table[r][b];
                        // The same block of the next panel: it is wanted when
                        // all tokens have met this one.
                        prefetch(at[r].as_ptr(), 16 * rows.stride, $bytes);
                    }
                    let target = Target {
                        quads: &mut panel.quads[b * each..(b + 1) * each],
                        scales: &mut panel.scales[b * shape.scales..(b + 1) * shape.scales],
                        mins: &mut panel.mins[b * shape.min_pairs..(b + 1) * shape.min_pairs],
                        d: &mut panel.d[b],
                        m: panel.m.get_mut(b),
                    };
                    $block(&at, target);
                }
            }
        }
    };
}

simd! {
    pub fn unpack(rows: Rows<'_>, first: usize, panel: &mut Panel) {
        let shape = shape(rows.format);
        let blocks = rows.cols / rows.format.block_len();
        panel.quads.resize(rows.cols / 4, [0; 64]);
        panel.scales.resize(blocks * shape.scales, [0; 16]);
        panel.mins.resize(blocks * shape.min_pairs, [0; 16]);
        panel.d.resize(blocks, [0.0; 16]);
        panel.lanes.resize(8, [[0.0; 16]; TOKENS]);
        panel.m.resize(if shape.has_m { blocks } else { 0 }, [0.0; 16]);
        match rows.format {
            Format::Q8_0 => q8_0_panel(rows, first, panel),
            Format::Q4_0 => q4_0_panel(rows, first, panel),
            Format::Q4_1 => q4_1_panel(rows, first, panel),
            Format::Q5_0 => q5_0_panel(rows, first, panel),
            Format::Q5_1 => q5_1_panel(rows, first, panel),
            Format::Iq4Nl => iq4_nl_panel(rows, first, panel),
            Format::Mxfp4 => mxfp4_panel(rows, first, panel),
            Format::Q2K => q2_k_panel(rows, first, panel),
            Format::Q3K => q3_k_panel(rows, first, panel),
            Format::Q4K => q4_k_panel(rows, first, panel),
            Format::Q5K => q5_k_panel(rows, first, panel),
            Format::Q6K => q6_k_panel(rows, first, panel),
            Format::Iq4Xs => iq4_xs_panel(rows, first, panel),
            Format::F32 | Format::F16 | Format::Bf16 => panic!("no panels of floats"),
        }
    }

    /// Bytes `at .. at + 16` of each row as four registers: the i-th holds
    /// the i-th four bytes of rows 0 to 15.
    fn columns<const B: usize>(rows: &[&[u8; B]; 16], at: usize) -> [__m512i; 4] {
        let mut z = [_mm512_setzero_si512(); 4];
        for i in 0..4 {
            z[i] = concat([
                load16(bytes_at(rows[i], at)),
                load16(bytes_at(rows[i + 4], at)),
                load16(bytes_at(rows[i + 8], at)),
                load16(bytes_at(rows[i + 12], at)),
            ]);
        }
        let low = [_mm512_unpacklo_epi32(z[0], z[1]), _mm512_unpacklo_epi32(z[2], z[3])];
        let high = [_mm512_unpackhi_epi32(z[0], z[1]), _mm512_unpackhi_epi32(z[2], z[3])];
        [
            _mm512_unpacklo_epi64(low[0], low[1]),
            _mm512_unpackhi_epi64(low[0], low[1]),
            _mm512_unpacklo_epi64(high[0], high[1]),
            _mm512_unpackhi_epi64(high[0], high[1]),
        ]
    }

    fn low_nibbles(x: __m512i) -> __m512i {
        _mm512_and_si512(x, _mm512_set1_epi8(15))
    }

    fn high_nibbles(x: __m512i) -> __m512i {
        low_nibbles(_mm512_srli_epi16::<4>(x))
    }

    /// The f16 at `at` of each row.
    fn factors<const B: usize>(rows: &[&[u8; B]; 16], at: usize) -> __m512 {
        let mut values = [0u16; 16];
        for r in 0..16 {
            values[r] = u16_at(rows[r], at);
        }
        // SAFETY: the array is 32 bytes long; the load needs no alignment.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(values.as_ptr().cast()) })
    }

    /// The u32 at `at` of each row.
    fn words<const B: usize>(rows: &[&[u8; B]; 16], at: usize) -> __m512i {
        let mut values = [0i32; 16];
        for r in 0..16 {
            values[r] = u32_at(rows[r], at) as i32;
        }
        load_i32x16(&values)
    }

    /// `x >> shift`, 32 bits each.
    fn right(x: __m512i, shift: u32) -> __m512i {
        _mm512_srl_epi32(x, _mm_cvtsi32_si128(shift as i32))
    }

    fn masked(x: __m512i, mask: i32) -> __m512i {
        _mm512_and_si512(x, _mm512_set1_epi32(mask))
    }

    /// Bits `4 i ..` of each row's mask as bit 4 of four bytes.
    fn fifth_bits(mask: __m512i, i: usize) -> __m512i {
        // One multiplication copies four bits to four bytes without carries.
        let bits = masked(right(mask, 4 * i as u32), 15);
        let spread = _mm512_mullo_epi32(bits, _mm512_set1_epi32(0x0020_4081));
        _mm512_slli_epi32::<4>(masked(spread, 0x0101_0101))
    }

    /// Blocks of 32 with nibbles from `at`.
    fn nibble_quads<const B: usize>(rows: &[&[u8; B]; 16], at: usize, quads: &mut [Quad]) {
        let packed = columns(rows, at);
        for i in 0..4 {
            store64(&mut quads[i], low_nibbles(packed[i]));
            store64(&mut quads[i + 4], high_nibbles(packed[i]));
        }
    }

    fn table_quads<const B: usize>(rows: &[&[u8; B]; 16], at: usize, table: &[u8; 16], quads: &mut [Quad]) {
        let table = _mm512_broadcast_i32x4(load16(table));
        let packed = columns(rows, at);
        for i in 0..4 {
            store64(&mut quads[i], _mm512_shuffle_epi8(table, low_nibbles(packed[i])));
            store64(&mut quads[i + 4], _mm512_shuffle_epi8(table, high_nibbles(packed[i])));
        }
    }

    fn five_bit_quads<const B: usize>(rows: &[&[u8; B]; 16], high_at: usize, at: usize, quads: &mut [Quad]) {
        let mask = words(rows, high_at);
        let packed = columns(rows, at);
        for i in 0..4 {
            let low = _mm512_or_si512(low_nibbles(packed[i]), fifth_bits(mask, i));
            let high = _mm512_or_si512(high_nibbles(packed[i]), fifth_bits(mask, i + 4));
            store64(&mut quads[i], low);
            store64(&mut quads[i + 4], high);
        }
    }

    fn set_m<const B: usize>(m: Option<&mut Floats>, rows: &[&[u8; B]; 16], at: usize) {
        if let Some(m) = m {
            store_f32x16(m, factors(rows, at));
        }
    }

    fn q8_0(rows: &[&[u8; 34]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, block::q8_0::D));
        for half in 0..2 {
            let w = columns(rows, block::q8_0::QS + 16 * half);
            for i in 0..4 {
                let unsigned = _mm512_xor_si512(w[i], _mm512_set1_epi8(-128));
                store64(&mut to.quads[4 * half + i], unsigned);
            }
        }
    }

    fn q4_0(rows: &[&[u8; 18]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, block::q4_0::D));
        nibble_quads(rows, block::q4_0::QS, to.quads);
    }

    fn q4_1(rows: &[&[u8; 20]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, block::q4_1::D));
        set_m(to.m, rows, block::q4_1::M);
        nibble_quads(rows, block::q4_1::QS, to.quads);
    }

    fn q5_0(rows: &[&[u8; 22]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, block::q5_0::D));
        five_bit_quads(rows, block::q5_0::QH, block::q5_0::QS, to.quads);
    }

    fn q5_1(rows: &[&[u8; 24]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, block::q5_1::D));
        set_m(to.m, rows, block::q5_1::M);
        five_bit_quads(rows, block::q5_1::QH, block::q5_1::QS, to.quads);
    }

    fn iq4_nl(rows: &[&[u8; 18]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, block::iq4_nl::D));
        table_quads(rows, block::iq4_nl::QS, &IQ4_UNSIGNED, to.quads);
    }

    fn mxfp4(rows: &[&[u8; 17]; 16], to: Target<'_>) {
        for r in 0..16 {
            to.d[r] = block::e8m0_half(rows[r][block::mxfp4::E]);
        }
        table_quads(rows, block::mxfp4::QS, &MXFP4_UNSIGNED, to.quads);
    }

    /// Factors, scales and minimums of Q4_K and Q5_K.
    fn k4_header<const B: usize>(rows: &[&[u8; B]; 16], to: &mut Target<'_>) {
        let [factors, s0, s1, s2] = columns(rows, 0);
        store_f32x16(to.d, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(factors)));
        if let Some(m) = &mut to.m {
            store_f32x16(m, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(factors))));
        }
        let high = |x: __m512i, j: u32| _mm512_slli_epi32::<4>(masked(right(x, 8 * j + 6), 3));
        for j in 0..4 {
            let at = 8 * j as u32;
            store_i32x16(&mut to.scales[j], masked(right(s0, at), 63));
            let scale = _mm512_or_si512(masked(right(s2, at), 15), high(s0, j as u32));
            store_i32x16(&mut to.scales[j + 4], scale);
        }
        for pair in 0..2 {
            let (even, odd) = (2 * pair as u32, 2 * pair as u32 + 1);
            let low = |j: u32| masked(right(s1, 8 * j), 63);
            let both = _mm512_or_si512(low(even), _mm512_slli_epi32::<16>(low(odd)));
            store_i32x16(&mut to.mins[pair], both);
            let top = |j: u32| _mm512_or_si512(masked(right(s2, 8 * j + 4), 15), high(s1, j));
            let both = _mm512_or_si512(top(even), _mm512_slli_epi32::<16>(top(odd)));
            store_i32x16(&mut to.mins[pair + 2], both);
        }
    }

    fn q4_k(rows: &[&[u8; 144]; 16], mut to: Target<'_>) {
        k4_header(rows, &mut to);
        for part in 0..8 {
            let packed = columns(rows, q4_k::QS + 16 * part);
            // 32 bytes hold the low nibbles of one sub-block and the high
            // ones of the next.
            let quad = 16 * (part / 2) + 4 * (part % 2);
            for i in 0..4 {
                store64(&mut to.quads[quad + i], low_nibbles(packed[i]));
                store64(&mut to.quads[quad + 8 + i], high_nibbles(packed[i]));
            }
        }
    }

    fn q5_k(rows: &[&[u8; 176]; 16], mut to: Target<'_>) {
        k4_header(rows, &mut to);
        let one = _mm512_set1_epi8(1);
        for side in 0..2 {
            let fifth = columns(rows, q5_k::QH + 16 * side);
            for sub in 0..4 {
                let packed = columns(rows, q5_k::QS + 32 * sub + 16 * side);
                for i in 0..4 {
                    let bit = |s: usize| {
                        let bits = _mm512_and_si512(right(fifth[i], s as u32), one);
                        _mm512_slli_epi32::<4>(bits)
                    };
                    let quad = 16 * sub + 4 * side + i;
                    let low = _mm512_or_si512(low_nibbles(packed[i]), bit(2 * sub));
                    let high = _mm512_or_si512(high_nibbles(packed[i]), bit(2 * sub + 1));
                    store64(&mut to.quads[quad], low);
                    store64(&mut to.quads[quad + 8], high);
                }
            }
        }
    }

    /// Sixteen signed byte scales of each row.
    fn byte_scales(packed: [__m512i; 4], scales: &mut [Ints]) {
        for j in 0..16 {
            let x = _mm512_sll_epi32(packed[j / 4], _mm_cvtsi32_si128(24 - 8 * (j % 4) as i32));
            store_i32x16(&mut scales[j], _mm512_srai_epi32::<24>(x));
        }
    }

    fn q6_k(rows: &[&[u8; 210]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, q6_k::D));
        byte_scales(columns(rows, q6_k::SCALES), to.scales);
        let mask = _mm512_set1_epi8(0x30);
        for n in 0..2 {
            for side in 0..2 {
                let top = columns(rows, q6_k::QH + 32 * n + 16 * side);
                let first = columns(rows, q6_k::QL + 64 * n + 16 * side);
                let second = columns(rows, q6_k::QL + 64 * n + 32 + 16 * side);
                for i in 0..4 {
                    let quad = 32 * n + 4 * side + i;
                    let top = [
                        _mm512_slli_epi32::<4>(top[i]),
                        _mm512_slli_epi32::<2>(top[i]),
                        top[i],
                        _mm512_srli_epi32::<2>(top[i]),
                    ];
                    let low = [
                        low_nibbles(first[i]),
                        low_nibbles(second[i]),
                        high_nibbles(first[i]),
                        high_nibbles(second[i]),
                    ];
                    for j in 0..4 {
                        let w = _mm512_or_si512(low[j], _mm512_and_si512(top[j], mask));
                        store64(&mut to.quads[quad + 8 * j], w);
                    }
                }
            }
        }
    }

    /// Two low bits of each byte after a shift.
    fn crumbs(x: __m512i, j: usize) -> __m512i {
        _mm512_and_si512(right(x, 2 * j as u32), _mm512_set1_epi8(3))
    }

    fn q2_k(rows: &[&[u8; 84]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, q2_k::D));
        set_m(to.m, rows, q2_k::DMIN);
        let packed = columns(rows, q2_k::SCALES);
        for j in 0..16 {
            let byte = right(packed[j / 4], 8 * (j % 4) as u32);
            store_i32x16(&mut to.scales[j], masked(byte, 15));
        }
        for pair in 0..8 {
            let x = right(packed[pair / 2], 16 * (pair % 2) as u32);
            let even = masked(right(x, 4), 15);
            let odd = masked(right(x, 12), 15);
            store_i32x16(&mut to.mins[pair], _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd)));
        }
        for part in 0..4 {
            let codes = columns(rows, q2_k::QS + 16 * part);
            let quad = 32 * (part / 2) + 4 * (part % 2);
            for i in 0..4 {
                for j in 0..4 {
                    store64(&mut to.quads[quad + 8 * j + i], crumbs(codes[i], j));
                }
            }
        }
    }

    fn q3_k(rows: &[&[u8; 110]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, q3_k::D));
        let mut scales = [[0u8; 16]; 16];
        for r in 0..16 {
            // SAFETY: the array is 16 bytes long; the store needs no alignment.
            unsafe { _mm_storeu_si128(scales[r].as_mut_ptr().cast(), q3_k_scales(rows[r])) }
        }
        let mut table: [&[u8; 16]; 16] = [&[0; 16]; 16];
        for r in 0..16 {
            table[r] = &scales[r];
        }
        byte_scales(columns(&table, 0), to.scales);
        let one = _mm512_set1_epi8(1);
        for part in 0..4 {
            let codes = columns(rows, q3_k::QS + 16 * part);
            let third = columns(rows, q3_k::HMASK + 16 * (part % 2));
            let quad = 32 * (part / 2) + 4 * (part % 2);
            for i in 0..4 {
                for j in 0..4 {
                    let bit = (4 * (part / 2) + j) as u32;
                    let bits = _mm512_and_si512(right(third[i], bit), one);
                    let w = _mm512_or_si512(crumbs(codes[i], j), _mm512_slli_epi32::<2>(bits));
                    store64(&mut to.quads[quad + 8 * j + i], w);
                }
            }
        }
    }

    fn iq4_xs(rows: &[&[u8; 136]; 16], to: Target<'_>) {
        store_f32x16(to.d, factors(rows, block::iq4_xs::D));
        let mut scales = [[0u8; 16]; 16];
        for r in 0..16 {
            // SAFETY: the array is 16 bytes long; the store needs no alignment.
            unsafe { _mm_storeu_si128(scales[r].as_mut_ptr().cast(), iq4_xs_scales(rows[r])) }
        }
        let mut table: [&[u8; 16]; 16] = [&[0; 16]; 16];
        for r in 0..16 {
            table[r] = &scales[r];
        }
        let pairs = columns(&table, 0);
        for j in 0..4 {
            store_i32x16(&mut to.scales[2 * j], _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pairs[j])));
            store_i32x16(&mut to.scales[2 * j + 1], _mm512_srai_epi32::<16>(pairs[j]));
        }
        for sub in 0..8 {
            let quads = &mut to.quads[8 * sub..8 * sub + 8];
            table_quads(rows, block::iq4_xs::QS + 16 * sub, &IQ4_UNSIGNED, quads);
        }
    }
}

panel_of!(q8_0_panel, 34, q8_0);
panel_of!(q4_0_panel, 18, q4_0);
panel_of!(q4_1_panel, 20, q4_1);
panel_of!(q5_0_panel, 22, q5_0);
panel_of!(q5_1_panel, 24, q5_1);
panel_of!(iq4_nl_panel, 18, iq4_nl);
panel_of!(mxfp4_panel, 17, mxfp4);
panel_of!(q2_k_panel, 84, q2_k);
panel_of!(q3_k_panel, 110, q3_k);
panel_of!(q4_k_panel, 144, q4_k);
panel_of!(q5_k_panel, 176, q5_k);
panel_of!(q6_k_panel, 210, q6_k);
panel_of!(iq4_xs_panel, 136, iq4_xs);
