//! What tests of kernels share: values to and from a device, and comparing
//! bits.
#![allow(dead_code)]

use pregate_kernels::cuda::{
    Arena, Device, DeviceMatrix, Input, Quantise, QuantisedSpans, Span, quantise,
};
use pregate_kernels::testing::Random;
use pregate_kernels::{ActivationKind, Format};
use pregate_standin::testing;
use std::fmt::Display;

/// A device, and memory on it. Every span is an allocation of its own, so
/// that reading or writing past one is seen.
pub struct Lab {
    pub device: Device,
}

impl Lab {
    /// `None` where there is nothing to run kernels on; says so.
    pub fn open() -> Option<Self> {
        testing::device().map(|device| Self { device })
    }

    /// Memory that holds no numbers yet: f32 and f16 of such bytes are NaN.
    pub fn space(&self, bytes: usize) -> Span {
        self.filled(bytes, 0xff)
    }

    pub fn zeros(&self, bytes: usize) -> Span {
        self.filled(bytes, 0)
    }

    pub fn filled(&self, bytes: usize, value: u8) -> Span {
        let span = self.arena(bytes.max(1)).take(bytes, 256).unwrap();
        self.device.compute().fill(&span, value).unwrap();
        span
    }

    /// `count` cells of 4 bytes that hold neither an id nor a weight.
    pub fn cells(&self, count: usize) -> Span {
        self.filled(4 * count, 0xa5)
    }

    /// For what takes its own memory.
    pub fn arena(&self, bytes: usize) -> Arena {
        self.device.arena(bytes).unwrap()
    }

    pub fn bytes(&self, bytes: &[u8]) -> Span {
        let span = self.arena(bytes.len().max(1)).take(bytes.len(), 256).unwrap();
        self.device.compute().upload(&span, bytes).unwrap();
        span
    }

    pub fn floats(&self, values: &[f32]) -> Span {
        self.bytes(&values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>())
    }

    pub fn ints(&self, values: &[i32]) -> Span {
        self.bytes(&values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>())
    }

    pub fn addresses(&self, values: &[u64]) -> Span {
        self.bytes(&values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>())
    }

    pub fn read(&self, span: &Span) -> Vec<u8> {
        let mut bytes = vec![0; span.bytes()];
        self.device.compute().download(span, &mut bytes).unwrap();
        bytes
    }

    pub fn read_floats(&self, span: &Span) -> Vec<f32> {
        let bytes = self.read(span);
        bytes.as_chunks::<4>().0.iter().map(|value| f32::from_ne_bytes(*value)).collect()
    }

    pub fn read_ints(&self, span: &Span) -> Vec<i32> {
        let bytes = self.read(span);
        bytes.as_chunks::<4>().0.iter().map(|value| i32::from_ne_bytes(*value)).collect()
    }

    pub fn read_shorts(&self, span: &Span) -> Vec<i16> {
        let bytes = self.read(span);
        bytes.as_chunks::<2>().0.iter().map(|value| i16::from_ne_bytes(*value)).collect()
    }

    pub fn matrix(&self, format: Format, rows: usize, cols: usize, bytes: &[u8]) -> DeviceMatrix {
        DeviceMatrix::new(format, rows, cols, self.bytes(bytes), 0).unwrap()
    }

    pub fn quantised_space(&self, group: usize, rows: usize, cols: usize) -> QuantisedSpans {
        let count = rows * cols;
        QuantisedSpans {
            group,
            q: self.space(count),
            scales: self.space(count / group * 4),
            sums: self.space(count / 8),
        }
    }

    /// `[rows, cols]` as rows of `format` want it, quantised on the device.
    pub fn activations(&self, format: Format, x: &[f32], cols: usize) -> Activations {
        let floats = self.floats(x);
        if format.activation() == ActivationKind::F32 {
            return Activations::Floats(floats);
        }
        let rows = x.len() / cols;
        let to = self.quantised_space(format.block_len(), rows, cols);
        let call = Quantise { rows, cols, x: &floats, stride: cols, to: &to };
        quantise(&self.device, self.device.compute(), call).unwrap();
        Activations::Quantised(to)
    }
}

/// What [`Input`] borrows.
pub enum Activations {
    Floats(Span),
    Quantised(QuantisedSpans),
}

impl Activations {
    pub fn input(&self) -> Input<'_> {
        match self {
            Self::Floats(x) => Input::Floats(x),
            Self::Quantised(x) => Input::Quantised(x),
        }
    }
}

/// Another order of blocks and threads on the stand-in; 0: by their numbers.
pub fn set_order(seed: u64) {
    if let Some(standin) = testing::standin() {
        standin.set_order(seed);
    }
}

/// Normal numbers, and a few that are not: zeros of both signs, subnormal,
/// large.
pub fn numbers(count: usize, random: &mut Random) -> Vec<f32> {
    (0..count)
        .map(|_| match random.below(40) {
            0 => random.pick(&[0.0, -0.0, 1e-40, -1e-40, 300.0, -3e4]),
            _ => random.normal(),
        })
        .collect()
}

/// Equal in every bit; any NaN equals any other.
#[track_caller]
pub fn assert_same_bits(found: &[f32], wanted: &[f32], what: &dyn Display) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let is_same = found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan();
        assert!(is_same, "{what}: element {i} is {found:e}, must be {wanted:e}");
    }
}

/// Numbers of columns that are awkward for rows of `format`: around the lanes
/// of a row and the steps that the kernels take.
pub fn awkward_cols(format: Format) -> Vec<usize> {
    match format.block_len() {
        1 => vec![1, 3, 8, 33, 63, 64, 65, 200, 513, 1025],
        len => [1, 2, 3, 5, 7, 8, 9, 16, 31, 67].iter().map(|blocks| blocks * len).collect(),
    }
}
