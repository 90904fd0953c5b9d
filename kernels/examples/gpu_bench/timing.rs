//! How long work on the device takes.

use crate::Scale;
use pregate_kernels::cuda::{CudaError, Device};
use std::time::Instant;

/// A batch takes about this long.
const BATCH_S: f64 = 20e-3;
const BATCHES: usize = 7;

/// Seconds of one `work(i)` of many that follow each other on the compute
/// stream: the median of several batches. `i` counts up, for work that should
/// not find in a cache what the last one left there.
///
/// Between events of the device, so that what the host does counts only where
/// it is slower than the device.
pub fn seconds(
    device: &Device,
    scale: Scale,
    work: &mut dyn FnMut(usize) -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let mut next = 0;
    let mut batch = |count: usize| {
        let stream = device.compute();
        stream.synchronize()?;
        let since = stream.record_timed()?;
        for i in next..next + count {
            work(i)?;
        }
        next += count;
        let until = stream.record_timed()?;
        until.synchronize()?;
        Ok::<_, CudaError>(until.seconds_since(&since)? / count as f64)
    };
    let first = batch(1)?;
    if scale != Scale::Full {
        return Ok(first.max(1e-9));
    }
    let warm = batch(3)?.max(1e-7);
    let count = ((BATCH_S / warm) as usize).clamp(3, 4000);
    let mut all = (0..BATCHES).map(|_| batch(count)).collect::<Result<Vec<_>, _>>()?;
    all.sort_by(f64::total_cmp);
    Ok(all[BATCHES / 2].max(1e-9))
}

/// Seconds of the host for one `work`, the median of `count`.
pub fn host_seconds(
    count: usize,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let mut all = Vec::with_capacity(count);
    for _ in 0..count.max(1) {
        let since = Instant::now();
        work()?;
        all.push(since.elapsed().as_secs_f64());
    }
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2].max(1e-9))
}
