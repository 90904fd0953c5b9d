//! Rows of formats with blocks of 32 four-bit elements times one token, on
//! machines with byte permutes (VBMI: Intel since Ice Lake, AMD since Zen 4).
//!
//! Eight blocks lie in 136 or 144 bytes that begin nowhere in particular. Two
//! permutes of whole registers bring their elements into line, and one their
//! factors, where inserting block by block takes four times as many
//! instructions. A row's last blocks, fewer than eight, go the other way.

use super::decode::{self, AHEAD, Input, nibbles};
use super::simd::*;
use crate::block;
use crate::cpu::kernels::{Activation, Rows};
use crate::format::Format;
use std::arch::x86_64::*;

/// Where the bytes of one register come from in two registers that were loaded
/// from `starts` on: `0..64` the first, `64..128` the second.
type Places = [u8; 64];

const fn place(byte: usize, starts: [usize; 2]) -> u8 {
    if byte - starts[0] < 64 { (byte - starts[0]) as u8 } else { (64 + byte - starts[1]) as u8 }
}

/// Where the two registers begin that hold the elements of blocks `0..4` and
/// `4..8`, of `bytes` each.
const fn starts(bytes: usize) -> [[usize; 2]; 2] {
    [[0, 64], [4 * bytes, 8 * bytes - 64]]
}

/// The 16 bytes of elements from `at` of four blocks of `bytes`, for either
/// half of a group.
const fn elements(bytes: usize, at: usize) -> [Places; 2] {
    let mut out = [[0; 64]; 2];
    let mut i = 0;
    while i < 128 {
        let byte = i / 16 * bytes + at + i % 16;
        out[i / 64][i % 64] = place(byte, starts(bytes)[i / 64]);
        i += 1;
    }
    out
}

/// `count` bytes from `at` of eight blocks of `bytes`, `apart` bytes from one
/// another, out of the first half's registers.
const fn factors(bytes: usize, at: usize, count: usize, apart: usize) -> Places {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 8 * count {
        let byte = i / count * bytes + at + i % count;
        out[i / count * apart + i % count] = place(byte, starts(bytes)[0]);
        i += 1;
    }
    out
}

/// A table of sixteen four times over: a permute looks at six bits of an index,
/// of which the upper two are then neighbours that need not be cleared.
const fn four_times(table: [u8; 16]) -> Places {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = table[i % 16];
        i += 1;
    }
    out
}

const IQ4: Places = four_times(decode::IQ4_UNSIGNED);
const MXFP4: Places = four_times(decode::MXFP4_UNSIGNED);

const OF_18: [Places; 2] = elements(18, block::q4_0::QS);
const D_OF_18: Places = factors(18, block::q4_0::D, 2, 2);
const OF_17: [Places; 2] = elements(17, block::mxfp4::QS);
const E_OF_17: Places = factors(17, block::mxfp4::E, 1, 4);

simd_vbmi! {
    fn load_at(bytes: &[u8], at: usize) -> __m512i {
        load64(bytes[at..].first_chunk().expect("a group is longer than two registers"))
    }

    /// Sums of eight blocks of `B` bytes, whose elements are looked up in
    /// `table` if there is one; and the registers of the first half.
    fn sums<const B: usize>(
        blocks: &[[u8; B]; 8],
        places: &[Places; 2],
        table: Option<&Places>,
        q: &[Q64; 4],
    ) -> (__m256i, [__m512i; 2]) {
        let bytes = blocks.as_flattened();
        let [[a, b], [c, d]] = starts(B);
        let first = [load_at(bytes, a), load_at(bytes, b)];
        let second = [load_at(bytes, c), load_at(bytes, d)];
        let s = dot(first, &places[0], table, [&q[0], &q[1]]);
        let t = dot(second, &places[1], table, [&q[2], &q[3]]);
        (sum_lanes(s, t), first)
    }

    /// Four sums for each of the four blocks whose elements are at `places` of
    /// `bytes`.
    fn dot(bytes: [__m512i; 2], places: &Places, table: Option<&Places>, q: [&Q64; 2]) -> __m512i {
        let codes = _mm512_permutex2var_epi8(bytes[0], load64(places), bytes[1]);
        let (low, high) = match table {
            None => nibbles(codes),
            Some(table) => {
                let (table, high) = (load64(table), _mm512_srli_epi16::<4>(codes));
                (_mm512_permutexvar_epi8(codes, table), _mm512_permutexvar_epi8(high, table))
            }
        };
        let sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, load_q(q[0]));
        _mm512_dpbusd_epi32(sum, high, load_q(q[1]))
    }

    /// f16 at the start of eight blocks of 18 bytes.
    fn halves([low, high]: [__m512i; 2]) -> __m256 {
        let d = _mm512_permutex2var_epi8(low, load64(&D_OF_18), high);
        _mm256_cvtph_ps(_mm512_castsi512_si128(d))
    }

    fn q4_0<const N: usize>(blocks: &[[u8; 18]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let Some(eight) = blocks.first_chunk() else { return decode::q4_0(blocks, x, lanes) };
        let (s, first) = sums(eight, &OF_18, None, &x.q[0]);
        let s = _mm256_sub_epi32(s, decode::offsets(x.sums32, 3));
        decode::add_scaled::<8>(lanes, halves(first), x.scales, s)
    }

    fn iq4_nl<const N: usize>(blocks: &[[u8; 18]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let Some(eight) = blocks.first_chunk() else { return decode::iq4_nl(blocks, x, lanes) };
        let (s, first) = sums(eight, &OF_18, Some(&IQ4), &x.q[0]);
        let s = _mm256_sub_epi32(s, decode::offsets(x.sums32, 7));
        decode::add_scaled::<8>(lanes, halves(first), x.scales, s)
    }

    fn mxfp4<const N: usize>(blocks: &[[u8; 17]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let Some(eight) = blocks.first_chunk() else { return decode::mxfp4(blocks, x, lanes) };
        let (s, [low, high]) = sums(eight, &OF_17, Some(&MXFP4), &x.q[0]);
        let s = _mm256_sub_epi32(s, decode::offsets(x.sums32, 4));
        let e = _mm512_permutex2var_epi8(low, load64(&E_OF_17), high);
        let e = _mm512_castsi512_si256(_mm512_and_si512(e, _mm512_set1_epi32(255)));
        decode::add_scaled::<8>(lanes, decode::mxfp4_factors(e), x.scales, s)
    }
}

decode::walk!(simd_vbmi, q4_0_rows, 18, 32, own, q4_0);
decode::walk!(simd_vbmi, iq4_nl_rows, 18, 32, own, iq4_nl);
decode::walk!(simd_vbmi, mxfp4_rows, 17, 32, own, mxfp4);

simd_vbmi! {
    pub fn rows(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
        match rows.format {
            Format::Q4_0 => q4_0_rows(rows, x, out),
            Format::Iq4Nl => iq4_nl_rows(rows, x, out),
            Format::Mxfp4 => mxfp4_rows(rows, x, out),
            _ => decode::rows(rows, x, out),
        }
    }
}
