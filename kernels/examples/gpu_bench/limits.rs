//! What this device reaches at best: copies, reads, matrix products.

use crate::{Scale, report::Report, timing};
use pregate_kernels::cuda::{Args, CudaError, Device, Grid, Span};

/// Measured rates.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes read and written per second by a copy on the device.
    pub copy: f64,
    /// Integer operations per second (a product and a sum are two).
    pub int8: f64,
    /// The same of binary16.
    pub f16: f64,
}

/// More than any device's caches hold.
const BYTES: usize = 512 << 20;
/// Products under way in a warp, and operations of one: `probe.cu`.
const CHAINS: f64 = 8.0;
const INT8_OPERATIONS: f64 = 2.0 * 16.0 * 8.0 * 32.0;
const F16_OPERATIONS: f64 = 2.0 * 16.0 * 8.0 * 16.0;

pub fn measure(device: &Device, scale: Scale, report: &mut Report) -> Result<Limits, CudaError> {
    report.heading("at best");
    let full = scale == Scale::Full;
    let bytes = if full { BYTES } else { 1 << 14 };
    // Eight blocks of 256 are what a multiprocessor holds at most.
    let blocks = if full { 8 * device.info().multiprocessors } else { 2 };
    let threads = 256 * blocks as usize;
    let arena = device.arena(2 * bytes + 4 * threads)?;
    let (from, to) = (arena.take(bytes, 256)?, arena.take(bytes, 256)?);
    let out = arena.take(4 * threads, 16)?;
    let stream = device.compute();
    stream.fill(&from, 1)?;
    let giga = |rate: f64| format!("{:.0} GB/s", rate / 1e9);

    let driver = timing::seconds(device, scale, &mut |_| stream.copy(&from, &to))?;
    let launch = |name: &str, args: &dyn Fn() -> Args| {
        let kernel = device.kernel("probe", name)?;
        timing::seconds(device, scale, &mut |_| {
            stream.launch(&kernel, Grid::new(blocks, 256), args())
        })
    };
    let words = (bytes / 16) as u64;
    let ours = launch("probe_copy", &|| Args::new().span(&to).span(&from).u64(words))?;
    let moved = 2.0 * bytes as f64;
    let copy = (moved / driver).max(moved / ours);
    let names =
        format!("{} by the driver, {} by probe_copy", giga(moved / driver), giga(moved / ours));
    report.row("copy, bytes read and written", names);
    let read = launch("probe_read", &|| Args::new().span(&out).span(&from).u64(words))?;
    report.row("read", giga(bytes as f64 / read));

    let rounds = if full { 4096 } else { 1 };
    let products = CHAINS * f64::from(rounds) * f64::from(blocks) * 8.0;
    let matrix = |name: &str, operations: f64, out: &Span| {
        let seconds = launch(name, &|| Args::new().span(out).i32(rounds))?;
        Ok::<_, CudaError>(products * operations / seconds)
    };
    let int8 = matrix("probe_mma_s8", INT8_OPERATIONS, &out)?;
    let f16 = matrix("probe_mma_f16", F16_OPERATIONS, &out)?;
    report.row("matrix products, int8", format!("{:.0} TOP/s", int8 / 1e12));
    report.row("matrix products, f16 in f32", format!("{:.0} TFLOP/s", f16 / 1e12));
    Ok(Limits { copy, int8, f16 })
}
