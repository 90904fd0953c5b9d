//! Every family of kernels, at shapes of real models, beside what the device
//! reaches at best.

mod decode;
mod mixers;
mod prefill;

use crate::{Scale, limits::Limits, report::Report, timing};
use pregate_kernels::{
    Format,
    cuda::{Arena, CudaError, Device, DeviceMatrix, Span},
    testing::{self, Random, Weights},
};

/// More weights than any device's caches hold are walked over in turn.
const WALKED_BYTES: usize = 512 << 20;

pub fn measure(
    device: &Device,
    scale: Scale,
    limits: &Limits,
    report: &mut Report,
) -> Result<(), CudaError> {
    let mut bench = Bench { device, scale, limits, report };
    decode::measure(&mut bench)?;
    mixers::measure(&mut bench)?;
    prefill::measure(&mut bench)
}

/// What a launch is bound by, and so compared with.
#[derive(Clone, Copy, Debug)]
enum Cost {
    /// Bytes that must move: beside the device's copy.
    Bytes(u64),
    /// Integer operations: beside its int8 products.
    Int8(f64),
    /// Beside its binary16 products.
    F16(f64),
}

struct Bench<'a> {
    device: &'a Device,
    scale: Scale,
    limits: &'a Limits,
    report: &'a mut Report,
}

impl Bench<'_> {
    fn is_full(&self) -> bool {
        self.scale == Scale::Full
    }

    /// `full`, or `small` where it runs once.
    fn pick<T>(&self, full: T, small: T) -> T {
        if self.is_full() { full } else { small }
    }

    /// Measures `work`, whose launches cost as much each.
    fn row(
        &mut self,
        name: &str,
        cost: Cost,
        work: &mut dyn FnMut(usize) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let seconds = timing::seconds(self.device, self.scale, work)?;
        let (rate, unit, best, of) = match cost {
            Cost::Bytes(bytes) => (bytes as f64, "GB/s", self.limits.copy, "copy"),
            Cost::Int8(operations) => (operations, "TOP/s", self.limits.int8, "int8"),
            Cost::F16(operations) => (operations, "TFLOP/s", self.limits.f16, "f16"),
        };
        let rate = rate / seconds;
        let shown = if unit == "GB/s" { rate / 1e9 } else { rate / 1e12 };
        let share = rate / best * 100.0;
        let micro = seconds * 1e6;
        let figures = format!("{micro:9.1} us {shown:8.1} {unit:<7} {share:4.0} % of {of}");
        self.report.row(name, figures);
        Ok(())
    }

    /// f32 from a normal distribution.
    fn floats(&self, arena: &Arena, count: usize, seed: u64) -> Result<Span, CudaError> {
        let mut random = Random::new(seed);
        let few: Vec<f32> = (0..count.min(1 << 16)).map(|_| random.normal()).collect();
        let bytes: Vec<u8> =
            few.iter().cycle().take(count).flat_map(|value| value.to_le_bytes()).collect();
        let span = arena.take(bytes.len(), 256)?;
        self.device.compute().upload(&span, &bytes)?;
        Ok(span)
    }

    fn integers(&self, arena: &Arena, values: &[i32]) -> Result<Span, CudaError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let span = arena.take(bytes.len(), 256)?;
        self.device.compute().upload(&span, &bytes)?;
        Ok(span)
    }

    fn zeros(&self, arena: &Arena, bytes: usize) -> Result<Span, CudaError> {
        let span = arena.take(bytes, 256)?;
        self.device.compute().fill(&span, 0)?;
        Ok(span)
    }
}

/// Blocks of random weights of a format, side by side at multiples of 256
/// bytes.
struct Pool {
    format: Format,
    span: Span,
    each: usize,
    count: usize,
}

impl Pool {
    /// Of `bytes` each: as many as go round every cache, at least `least`.
    fn new(
        bench: &Bench<'_>,
        format: Format,
        bytes: usize,
        least: usize,
    ) -> Result<Self, CudaError> {
        let each = bytes.next_multiple_of(256);
        let count = bench.pick((WALKED_BYTES / each).max(least), least.max(2));
        let arena = bench.device.arena(count * each)?;
        let span = arena.take(count * each, 256)?;
        // Whole blocks, repeated: what they hold does not change the time.
        let blocks = bench.pick(8 << 20, 64 << 10) / format.block_bytes();
        let mut random = Random::new(1);
        let cols = blocks * format.block_len();
        let few = testing::weights(format, Weights::Usual, 1, cols, &mut random);
        for start in (0..span.bytes()).step_by(few.len()) {
            let length = few.len().min(span.bytes() - start);
            let part = span.part(start..start + length);
            bench.device.compute().upload(&part, &few[..length])?;
        }
        Ok(Self { format, span, each, count })
    }

    fn at(&self, i: usize) -> usize {
        i % self.count * self.each
    }

    fn address(&self, i: usize) -> u64 {
        self.span.address() + self.at(i) as u64
    }

    fn matrix(&self, i: usize, rows: usize, cols: usize) -> Result<DeviceMatrix, CudaError> {
        DeviceMatrix::new(self.format, rows, cols, self.span.clone(), self.at(i))
    }
}

/// Bytes of a matrix, in whole blocks.
fn matrix_bytes(format: Format, rows: usize, cols: usize) -> usize {
    rows * format.row_bytes(cols).unwrap_or(0)
}
