//! What this device reaches at best: copies, reads, matrix products.

use crate::{Scale, report::Report, timing};
use pregate_kernels::cuda::{
    CudaError, Device, ProbeProduct, probe_copy, probe_products, probe_read,
};

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
    let ours =
        timing::seconds(device, scale, &mut |_| probe_copy(device, stream, blocks, &from, &to))?;
    let moved = 2.0 * bytes as f64;
    let copy = (moved / driver).max(moved / ours);
    let names =
        format!("{} by the driver, {} by probe_copy", giga(moved / driver), giga(moved / ours));
    report.row("copy, bytes read and written", names);
    let read =
        timing::seconds(device, scale, &mut |_| probe_read(device, stream, blocks, &from, &out))?;
    report.row("read", giga(bytes as f64 / read));

    let rounds = if full { 4096 } else { 1 };
    let warps = 8.0 * f64::from(blocks);
    let matrix = |product: ProbeProduct| {
        let seconds = timing::seconds(device, scale, &mut |_| {
            probe_products(device, stream, blocks, product, rounds, &out)
        })?;
        let products = f64::from(ProbeProduct::IN_ROUND) * rounds as f64 * warps;
        Ok::<_, CudaError>(products * f64::from(product.operations()) / seconds)
    };
    let (int8, f16) = (matrix(ProbeProduct::Int8)?, matrix(ProbeProduct::F16)?);
    report.row("matrix products, int8", format!("{:.0} TOP/s", int8 / 1e12));
    report.row("matrix products, f16 in f32", format!("{:.0} TFLOP/s", f16 / 1e12));
    Ok(Limits { copy, int8, f16 })
}
