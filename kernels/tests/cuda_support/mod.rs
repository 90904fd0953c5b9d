//! Arrays to the device and back.
#![allow(dead_code)] // each test file uses its part

use pregate_kernels::cuda::{Arena, Device, Span};

/// Memory of a test.
pub struct Upload {
    device: Device,
    arena: Arena,
}

impl Upload {
    pub fn new(device: &Device, bytes: usize) -> Self {
        Self { device: device.clone(), arena: device.arena(bytes).unwrap() }
    }

    pub fn bytes(&self, bytes: &[u8]) -> Span {
        let span = self.arena.take(bytes.len(), 256).unwrap();
        self.device.compute().upload(&span, bytes).unwrap();
        span
    }
}

pub fn upload_f32(upload: &Upload, values: &[f32]) -> Span {
    upload.bytes(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

pub fn download_f32(device: &Device, span: &Span) -> Vec<f32> {
    let mut bytes = vec![0; span.bytes()];
    device.compute().download(span, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Equal in every bit; NaN equals NaN.
pub fn assert_bits(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let equal = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(equal, "{name}: element {i} is {got:e}, want {want:e}");
    }
}
