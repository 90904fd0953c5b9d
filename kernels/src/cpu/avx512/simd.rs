//! Loads and stores between slices and registers, reductions, and the
//! macro that names the features: the only pointers of this folder.

use std::arch::x86_64::*;

/// int8 values of one register.
pub type Q64 = [i8; 64];

/// Declares functions for machines that [`super::is_available`] approves.
macro_rules! simd {
    ($($all:tt)*) => { with_features! { "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", $($all)* } };
}
pub(super) use simd;

/// The same for machines that [`super::has_byte_permutes`] approves.
macro_rules! simd_vbmi {
    ($($all:tt)*) => { with_features! { "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi", $($all)* } };
}
pub(super) use simd_vbmi;

macro_rules! with_features {
    ($features:literal, $($(#[$meta:meta])* $vis:vis fn $name:ident $(<$(const $param:ident: $kind:ty),*>)?
        ($($args:tt)*) $(-> $ret:ty)? $body:block)*) => {
        $(
            $(#[$meta])*
            #[inline]
            #[target_feature(enable = $features)]
            $vis fn $name $(<$(const $param: $kind),*>)? ($($args)*) $(-> $ret)? $body
        )*
    };
}
pub(super) use with_features;

simd! {
    pub fn load64(bytes: &[u8; 64]) -> __m512i {
        // SAFETY: the array is 64 bytes long; the load needs no alignment.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    pub fn load32(bytes: &[u8; 32]) -> __m256i {
        // SAFETY: the array is 32 bytes long; the load needs no alignment.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    pub fn load16(bytes: &[u8; 16]) -> __m128i {
        // SAFETY: the array is 16 bytes long; the load needs no alignment.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    pub fn load_q(q: &Q64) -> __m512i {
        // SAFETY: the array is 64 bytes long; the load needs no alignment.
        unsafe { _mm512_loadu_si512(q.as_ptr().cast()) }
    }

    /// 32 int8 values from `at`.
    pub fn load_q32(q: &[i8], at: usize) -> __m256i {
        let q = &q[at..at + 32];
        // SAFETY: the slice is 32 bytes long; the load needs no alignment.
        unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
    }

    /// Up to 32 int16 values, the rest zero.
    pub fn load_i16(values: &[i16]) -> __m512i {
        let mask = low_bits32(values.len());
        // SAFETY: the mask covers at most the slice; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_epi16(mask, values.as_ptr()) }
    }

    /// Up to 8 int16 values, the rest zero.
    pub fn load_i16x8(values: &[i16]) -> __m128i {
        // SAFETY: the mask covers at most the slice; masked lanes are not read.
        unsafe { _mm_maskz_loadu_epi16(low_bits16(values.len()) as u8, values.as_ptr()) }
    }

    /// Up to 16 floats, the rest `+0`.
    pub fn load_f32(values: &[f32]) -> __m512 {
        // SAFETY: the mask covers at most the slice; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(low_bits16(values.len()), values.as_ptr()) }
    }

    /// Up to 8 floats, the rest `+0`.
    pub fn load_f32x8(values: &[f32]) -> __m256 {
        // SAFETY: the mask covers at most the slice; masked lanes are not read.
        unsafe { _mm256_maskz_loadu_ps(low_bits16(values.len()) as u8, values.as_ptr()) }
    }

    pub fn load_f32x16(values: &[f32; 16]) -> __m512 {
        // SAFETY: the array has 16 floats; the load needs no alignment.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    /// Stores as many of the 16 floats as fit.
    pub fn store_f32(values: &mut [f32], x: __m512) {
        // SAFETY: the mask covers at most the slice; masked lanes are not
        // written.
        unsafe { _mm512_mask_storeu_ps(values.as_mut_ptr(), low_bits16(values.len()), x) }
    }

    pub fn store_f32x16(values: &mut [f32; 16], x: __m512) {
        // SAFETY: the array has 16 floats; the store needs no alignment.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), x) }
    }

    /// Stores as many of the 16 int8 values as fit.
    pub fn store_q(values: &mut [i8], x: __m128i) {
        // SAFETY: the mask covers at most the slice; masked lanes are not
        // written.
        unsafe { _mm_mask_storeu_epi8(values.as_mut_ptr(), low_bits16(values.len()), x) }
    }

    pub fn store_i32x16(values: &mut [i32; 16], x: __m512i) {
        // SAFETY: the array is 64 bytes long; the store needs no alignment.
        unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), x) }
    }

    pub fn load_i32x16(values: &[i32; 16]) -> __m512i {
        // SAFETY: the array is 64 bytes long; the load needs no alignment.
        unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
    }

    pub fn store64(bytes: &mut [u8; 64], x: __m512i) {
        // SAFETY: the array is 64 bytes long; the store needs no alignment.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), x) }
    }

    /// Asks for the cache lines of `bytes` bytes from `start + ahead`, into
    /// the second-level cache.
    pub fn prefetch(start: *const u8, ahead: usize, bytes: usize) {
        for line in (0..bytes).step_by(64) {
            _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(ahead + line).cast());
        }
    }

    /// `[x02, y02, x13, y13]` in each 128-bit lane.
    pub fn fold_pairs(x: __m512i, y: __m512i) -> __m512i {
        _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y))
    }

    /// From `[x, y, x', y']` and `[z, w, z', w']`: `[x, y, z, w]`.
    pub fn fold_quads(p: __m512i, q: __m512i) -> __m512i {
        _mm512_add_epi32(_mm512_unpacklo_epi64(p, q), _mm512_unpackhi_epi64(p, q))
    }

    /// Sums of the 16 integers of each register.
    pub fn sum_each(a: [__m512i; 8]) -> __m256i {
        let low = fold_quads(fold_pairs(a[0], a[1]), fold_pairs(a[2], a[3]));
        let high = fold_quads(fold_pairs(a[4], a[5]), fold_pairs(a[6], a[7]));
        let w = _mm512_add_epi32(
            _mm512_shuffle_i32x4::<0b01_00_01_00>(low, high),
            _mm512_shuffle_i32x4::<0b11_10_11_10>(low, high),
        );
        let w = _mm512_add_epi32(w, _mm512_shuffle_i32x4::<0b10_11_00_01>(w, w));
        _mm512_castsi512_si256(_mm512_shuffle_i32x4::<0b00_00_10_00>(w, w))
    }

    /// Sums of the 4 integers of each 128-bit lane: those of `x`, then of `y`.
    pub fn sum_lanes(x: __m512i, y: __m512i) -> __m256i {
        let u = fold_pairs(x, y);
        let u = _mm512_add_epi32(u, _mm512_shuffle_epi32::<0b01_00_11_10>(u));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, u))
    }

    /// The contract's tree over eight lanes.
    pub fn tree8(lanes: __m256) -> f32 {
        let a = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
    }

    /// The contract's tree over sixteen lanes.
    pub fn tree16(lanes: __m512) -> f32 {
        tree8(_mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes)))
    }

    /// The 128-bit registers side by side.
    pub fn concat(a: [__m128i; 4]) -> __m512i {
        let x = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a[0]), a[1]);
        _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(x, a[2]), a[3])
    }
}

pub fn low_bits16(count: usize) -> u16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

pub fn low_bits32(count: usize) -> u32 {
    if count >= 32 { u32::MAX } else { (1 << count) - 1 }
}

/// The little-endian u16 at `at`.
#[inline]
pub fn u16_at<const B: usize>(block: &[u8; B], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// The little-endian u32 at `at`.
#[inline]
pub fn u32_at<const B: usize>(block: &[u8; B], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// `N` bytes of a block from `at`.
#[inline]
pub fn bytes_at<const N: usize, const B: usize>(block: &[u8; B], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("field inside the block")
}
