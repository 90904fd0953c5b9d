//! A device with memory for one test, and numbers to put there.

use pregate_kernels::cuda::{Arena, Device, Span};
use pregate_kernels::testing::Random;
use pregate_standin::testing;

pub struct Gpu {
    pub device: Device,
    arena: Arena,
}

impl Gpu {
    /// `None` where the machine can run no kernels at all.
    pub fn open(bytes: usize) -> Option<Self> {
        let device = testing::device()?;
        let arena = device.arena(bytes).unwrap();
        Some(Self { device, arena })
    }

    /// Memory that holds no numbers yet: every byte 0xff is NaN.
    pub fn space(&self, bytes: usize) -> Span {
        let span = self.arena.take(bytes, 256).unwrap();
        self.device.compute().fill(&span, 0xff).unwrap();
        span
    }

    pub fn zeros(&self, bytes: usize) -> Span {
        let span = self.arena.take(bytes, 256).unwrap();
        self.device.compute().fill(&span, 0).unwrap();
        span
    }

    pub fn bytes(&self, bytes: &[u8]) -> Span {
        let span = self.arena.take(bytes.len(), 256).unwrap();
        self.device.compute().upload(&span, bytes).unwrap();
        span
    }

    pub fn floats(&self, values: &[f32]) -> Span {
        self.bytes(&values.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>())
    }

    pub fn read_bytes(&self, span: &Span) -> Vec<u8> {
        let mut bytes = vec![0; span.bytes()];
        self.device.compute().download(span, &mut bytes).unwrap();
        bytes
    }

    pub fn read(&self, span: &Span) -> Vec<f32> {
        let bytes = self.read_bytes(span);
        bytes.as_chunks().0.iter().map(|x| f32::from_ne_bytes(*x)).collect()
    }
}

/// Normal numbers, and a few that are not: zeros of both signs, subnormal,
/// large.
pub fn numbers(count: usize, rng: &mut Random) -> Vec<f32> {
    (0..count)
        .map(|_| match rng.below(40) {
            0 => rng.pick(&[0.0, -0.0, 1e-40, -1e-40, 300.0, -3e4]),
            _ => rng.normal(),
        })
        .collect()
}

/// Equal in every bit, or NaN both.
#[track_caller]
pub fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let is_same = g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
        assert!(is_same, "{what}: element {i} is {g:e}, want {w:e}");
    }
}
