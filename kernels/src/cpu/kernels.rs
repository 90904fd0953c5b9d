//! The seam between the CPU backend and its instruction sets.
//!
//! # How to plug in an instruction set
//! 1. Implement [`Kernels`] for a unit struct in `cpu/<isa>.rs` (or a folder).
//!    Every method but [`Kernels::isa`] has a default that is the scalar path,
//!    so a new instruction set can start with [`Kernels::rows`] for one format
//!    and hand every other format to [`scalar::rows`](super::scalar::rows).
//! 2. Add it to the two `match`es in [`Isa`]: `is_available` (run-time
//!    detection) and `kernels`.
//!
//! Every method must give the bits of [`crate::contract`] (attention: the
//! order stated in `docs/architecture.md`), whatever the instruction set, the
//! number of tokens or the split into calls; `cpu/tests.rs` compares all
//! available instruction sets.
//!
//! The backend calls [`Kernels::quantise`] once per distinct [`Layout`] and
//! input, then [`Kernels::rows`] for few tokens, or, when
//! [`Kernels::batch_from`] says that it pays, [`Kernels::pack`] once per tile
//! of [`Kernels::tile_tokens`] tokens and [`Kernels::batch`] per group of
//! rows. `rows` and `batch` must agree in every bit.

#![allow(clippy::too_many_arguments)]

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::pool::Columns;
use super::scalar;
use crate::backend::GatedActivation;
use crate::contract;
use crate::dequant::dequantize_row;
use crate::format::{ActivationKind, Format};
use half::f16;

/// An instruction set of the CPU backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Scalar,
    Avx2,
    Avx512Vnni,
    /// With byte permutes across a register.
    Avx512Vbmi,
    Neon,
}

impl Isa {
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::Avx512Vnni, Isa::Avx512Vbmi, Isa::Neon];

    /// Whether this machine has it and this build has kernels for it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => super::avx2::Avx2::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => avx512::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Vnni => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => avx512::has_byte_permutes(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Vbmi => false,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::neon::Neon::detect().is_some(),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => false,
        }
    }

    /// Every instruction set that can be used here, slowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The fastest one.
    pub fn detect() -> Isa {
        Isa::available().pop().unwrap_or(Isa::Scalar)
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "AVX2 + FMA",
            Isa::Avx512Vnni => "AVX-512 VNNI",
            Isa::Avx512Vbmi => "AVX-512 VNNI and VBMI",
            Isa::Neon => "NEON",
        }
    }

    /// # Panics
    /// When it is not available.
    pub(crate) fn kernels(self) -> &'static dyn Kernels {
        assert!(self.is_available(), "{} is not available on this machine", self.name());
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => super::avx2::Avx2::detect().expect("available"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &avx512::Avx512 { has_byte_permutes: false },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => &avx512::Avx512 { has_byte_permutes: true },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::neon::Neon::detect().expect("available"),
            _ => &scalar::Scalar,
        }
    }
}

/// How [`Kernels::quantise`] arranges the int8 values of one row for
/// [`Kernels::rows`], besides their natural order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Natural order only.
    Natural,
    /// Also in an order of the instruction set's own, chosen by format.
    Own(Format),
}

/// What a set of activations was prepared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub kind: ActivationKind,
    pub order: Order,
}

/// Activations `[tokens, cols]` prepared for rows of some formats.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    pub layout: Option<Layout>,
    pub cols: usize,
    /// `[tokens, cols]`: as they are (kind F32).
    pub x: Vec<f32>,
    /// `[tokens, cols]`: int8 in natural order.
    pub q: Vec<i8>,
    /// `[tokens, cols rounded up to 256]`: int8 in the order of
    /// [`Layout::order`], else empty.
    pub own: Vec<i8>,
    /// `[tokens, cols / 32]` or `[tokens, cols / 256]`
    pub scales: Vec<f32>,
    /// `[tokens, cols / 16]`: sums of sixteen int8 values. (kind Int8Per256)
    pub sums16: Vec<i16>,
    /// `[tokens, cols / 32]`: sums of 32 int8 values.
    pub sums32: Vec<i16>,
}

/// One token of [`Activations`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Activation<'a> {
    pub x: &'a [f32],
    pub q: &'a [i8],
    pub own: &'a [i8],
    pub scales: &'a [f32],
    pub sums16: &'a [i16],
    pub sums32: &'a [i16],
}

/// One token of [`Activations`] while it is being prepared.
pub(crate) struct ActivationMut<'a> {
    pub q: &'a mut [i8],
    pub own: &'a mut [i8],
    pub scales: &'a mut [f32],
    pub sums16: &'a mut [i16],
    pub sums32: &'a mut [i16],
}

fn part<T>(all: &[T], index: usize, each: usize) -> &[T] {
    if all.is_empty() { all } else { &all[index * each..(index + 1) * each] }
}

impl Activations {
    /// Sizes the buffers for `[tokens, cols]`; their contents are undefined.
    pub fn resize(&mut self, layout: Layout, tokens: usize, cols: usize) {
        self.layout = Some(layout);
        self.cols = cols;
        let int8 = layout.kind != ActivationKind::F32;
        let per256 = layout.kind == ActivationKind::Int8Per256;
        let count = |wanted: bool, each: usize| if wanted { tokens * each } else { 0 };
        self.x.resize(count(!int8, cols), 0.0);
        self.q.resize(count(int8, cols), 0);
        self.own.resize(count(layout.order != Order::Natural, cols.next_multiple_of(256)), 0);
        self.scales.resize(count(int8, cols / if per256 { 256 } else { 32 }), 0.0);
        self.sums16.resize(count(per256, cols / 16), 0);
        self.sums32.resize(count(int8, cols / 32), 0);
    }

    pub fn token(&self, t: usize) -> Activation<'_> {
        let cols = self.cols;
        let groups = match self.layout.map(|layout| layout.kind) {
            Some(ActivationKind::Int8Per256) => cols / 256,
            _ => cols / 32,
        };
        Activation {
            x: part(&self.x, t, cols),
            q: part(&self.q, t, cols),
            own: part(&self.own, t, cols.next_multiple_of(256)),
            scales: part(&self.scales, t, groups),
            sums16: part(&self.sums16, t, cols / 16),
            sums32: part(&self.sums32, t, cols / 32),
        }
    }
}

/// Some rows of a weight matrix in canonical block order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub format: Format,
    pub cols: usize,
    pub rows: usize,
    pub stride: usize,
    /// Row `r` starts at `r * stride`; checked by [`Rows::new`].
    pub bytes: &'a [u8],
}

impl<'a> Rows<'a> {
    pub fn new(format: Format, rows: usize, cols: usize, bytes: &'a [u8], stride: usize) -> Self {
        let row_bytes = format.row_bytes(cols).expect("whole blocks");
        assert!(rows == 0 || (rows - 1) * stride + row_bytes <= bytes.len(), "rows in bytes");
        Self { format, cols, rows, stride, bytes }
    }

    pub fn row_bytes(&self) -> usize {
        self.cols / self.format.block_len() * self.format.block_bytes()
    }

    pub fn row(&self, r: usize) -> &'a [u8] {
        assert!(r < self.rows);
        &self.bytes[r * self.stride..r * self.stride + self.row_bytes()]
    }
}

/// The activations of a few tokens, gathered for [`Kernels::batch`].
#[derive(Debug, Default)]
pub(crate) struct Tile {
    pub tokens: usize,
    /// `[tokens, cols]`
    pub q: Vec<i8>,
    /// AVX2 and NEON: sums of 16 or 32 codes, as in [`Activation`].
    pub short_sums: Vec<i16>,
    /// `[tokens, cols / 32]` or `[tokens, cols / 256]`
    pub scales: Vec<f32>,
    /// `[tokens, cols]`, for unquantised formats.
    pub x: Vec<f32>,
    /// AVX-512: interleaved by token, instead of `q`, sums and scales.
    #[cfg(target_arch = "x86_64")]
    pub packed: avx512::Packed,
}

impl Tile {
    /// Copies `tokens` of `x` as they are.
    pub fn gather(&mut self, x: &Activations, tokens: &[u32]) {
        self.q.clear();
        self.scales.clear();
        self.short_sums.clear();
        self.x.clear();
        for &t in tokens {
            let token = x.token(t as usize);
            let per_32 = token.sums16.is_empty();
            self.q.extend_from_slice(token.q);
            self.scales.extend_from_slice(token.scales);
            self.short_sums.extend_from_slice(if per_32 { token.sums32 } else { token.sums16 });
            self.x.extend_from_slice(token.x);
        }
    }
}

/// Buffers that a worker keeps between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub row: Vec<u8>,
    pub rows: Vec<u8>,
    pub floats: Vec<f32>,
    pub more_floats: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    pub panel: avx512::Panel,
}

/// Cells of consecutive positions of one head: position `p` starts at
/// `p * stride`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cells<'a> {
    F16(&'a [f16], usize),
    F32(&'a [f32], usize),
}

impl Cells<'_> {
    pub fn at(&self, position: usize, i: usize) -> f32 {
        match self {
            Cells::F16(cells, stride) => cells[position * stride + i].to_f32(),
            Cells::F32(cells, stride) => cells[position * stride + i],
        }
    }
}

/// The arithmetic of the CPU backend. See the module's page.
pub(crate) trait Kernels: Send + Sync {
    fn isa(&self) -> Isa;

    /// The order in which [`Kernels::rows`] wants activations for `format`.
    fn order(&self, _format: Format) -> Order {
        Order::Natural
    }

    /// Fills every non-empty slice of `out` from `x`, `group` elements per
    /// scale.
    fn quantise(&self, x: &[f32], group: usize, layout: Layout, out: ActivationMut<'_>) {
        scalar::quantise(x, group, layout, out);
    }

    /// `out[r]` = row `r` times one token.
    fn rows(&self, rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
        scalar::rows(rows, x, out);
    }

    /// The number of tokens from which [`Kernels::batch`] is faster than
    /// [`Kernels::rows`] for each token; `usize::MAX`: never.
    fn batch_from(&self, _format: Format) -> usize {
        usize::MAX
    }

    /// Tokens of one [`Tile`], and rows that [`Kernels::batch`] likes a
    /// multiple of.
    fn tile_shape(&self, _format: Format) -> (usize, usize) {
        (8, 16)
    }

    /// Gathers `tokens` of `x` for batches with rows of `format`.
    fn pack(&self, _format: Format, _x: &Activations, _tokens: &[u32], _out: &mut Tile) {
        unreachable!("batch_from() promised that no batch is wanted");
    }

    /// `out.row(i)[r]` = row `r` times token `i`, counted over all tiles.
    fn batch(
        &self,
        _rows: Rows<'_>,
        _tiles: &[Tile],
        _scratch: &mut Scratch,
        _out: &mut Columns<'_, f32>,
    ) {
        unreachable!("batch_from() promised that no batch is wanted");
    }

    /// `gate[i] = gated(activation, gate[i], up[i])`
    fn gate(&self, activation: GatedActivation, gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = contract::gated(activation, *g, *u);
        }
    }

    /// `out[i] = fma(w, y[i], out[i])`
    fn axpy(&self, w: f32, y: &[f32], out: &mut [f32]) {
        for (out, y) in out.iter_mut().zip(y) {
            *out = w.mul_add(*y, *out);
        }
    }

    /// Whole blocks of any format as f32, with the bits of
    /// [`dequantize_row`].
    fn dequantise(&self, format: Format, row: &[u8], out: &mut [f32]) {
        dequantize_row(format, row, out);
    }

    /// `out[q][p] = scale * (query q . key p)` for `count` positions and every
    /// query: `queries` is `[n, width]`, `out` `[n, out_stride]`.
    fn scores(
        &self,
        queries: &[f32],
        width: usize,
        keys: Cells<'_>,
        count: usize,
        scale: f32,
        out: &mut [f32],
        out_stride: usize,
    ) {
        scalar::scores(queries, width, keys, count, scale, out, out_stride);
    }

    /// Replaces the logits of one chunk by `exp(s - max)`; returns the maximum
    /// and the sum in sixteen lanes by `(first + i) mod 16` and a tree.
    fn softmax_chunk(&self, scores: &mut [f32], first: usize) -> (f32, f32) {
        scalar::softmax_chunk(scores, first)
    }

    /// `acc[q][d] = fma(weights[q][p], value[p][d], acc[q][d])` in position
    /// order: `acc` is `[n, width]`, `weights` `[n, weight_stride]`. A position
    /// outside `ranges[q]` is not touched for query `q`.
    fn values(
        &self,
        weights: &[f32],
        weight_stride: usize,
        ranges: &[(usize, usize)],
        values: Cells<'_>,
        width: usize,
        acc: &mut [f32],
    ) {
        scalar::values(weights, weight_stride, ranges, values, width, acc);
    }

    /// `acc[i] = fma(acc[i], a, part[i] * b)`
    fn merge(&self, acc: &mut [f32], a: f32, part: &[f32], b: f32) {
        for (acc, part) in acc.iter_mut().zip(part) {
            *acc = acc.mul_add(a, part * b);
        }
    }
}
