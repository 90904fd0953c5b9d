//! What copies between host and device cost, by size and kind of memory.

use crate::{Scale, raw, report::Report, timing};
use pregate_kernels::cuda::{CudaError, Device, HostMemory, PinnedPart, Span};
use std::sync::Arc;

const SIZES: [usize; 7] = [4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];
/// Copies that follow each other where the rate is measured.
const IN_ROW: usize = 8;

pub fn measure(device: &Device, scale: Scale, report: &mut Report) -> Result<(), CudaError> {
    report.heading("host to device: one copy | host's time in the call | rate of 8 in a row");
    let sizes = if scale == Scale::Full { &SIZES[..] } else { &SIZES[..2] };
    let largest = sizes[sizes.len() - 1];
    let arena = device.arena(largest)?;
    let target = arena.take(largest, 256)?;

    let pinned = Arc::new(device.pinned(largest)?);
    for &bytes in sizes {
        let part = || PinnedPart::new(pinned.clone(), 0..bytes);
        let costs = host_to_device(device, scale, &target.part(0..bytes), &part)?;
        report.row(&format!("  pinned, {}", size(bytes)), costs);
    }
    let pageable: Arc<[u8]> = vec![1; largest].into();
    for &bytes in sizes {
        // A part of it would be copied here first: all of it has its size.
        let own: Arc<[u8]> = pageable[..bytes].into();
        let costs = host_to_device(device, scale, &target.part(0..bytes), &|| Ok(own.clone()))?;
        report.row(&format!("  pageable, {}", size(bytes)), costs);
    }
    match raw::WriteCombined::new(scale, largest) {
        Err(why) => report.row("  write-combined", why),
        Ok(memory) => {
            for &bytes in sizes {
                let part = || Ok(memory.part(bytes));
                let costs = host_to_device(device, scale, &target.part(0..bytes), &part)?;
                report.row(&format!("  write-combined, {}", size(bytes)), costs);
            }
        }
    }
    drop(pinned);
    report.heading("device to host, pinned: one copy");
    for &bytes in sizes {
        let mut block = Some(device.pinned(bytes)?);
        let from = target.part(0..bytes);
        let seconds = timing::host_seconds(repetitions(scale), || {
            if let Some(memory) = block.take() {
                block = Some(device.copy().copy_out(&from, memory, 0)?.wait()?);
            }
            Ok(())
        })?;
        report.row(&format!("  {}", size(bytes)), rate(bytes, seconds));
    }
    Ok(())
}

fn repetitions(scale: Scale) -> usize {
    if scale == Scale::Full { 20 } else { 1 }
}

fn host_to_device<M: HostMemory>(
    device: &Device,
    scale: Scale,
    to: &Span,
    memory: &dyn Fn() -> Result<M, CudaError>,
) -> Result<String, CudaError> {
    let stream = device.copy();
    let bytes = to.bytes();
    let one = timing::host_seconds(repetitions(scale), || {
        stream.copy_in(memory()?, 0..bytes, to)?.wait().map(drop)
    })?;
    let mut tickets = Vec::with_capacity(IN_ROW);
    let call = timing::host_seconds(IN_ROW, || {
        tickets.push(stream.copy_in(memory()?, 0..bytes, to)?);
        Ok(())
    })?;
    tickets.clear();
    let in_row = timing::host_seconds(repetitions(scale), || {
        for _ in 0..IN_ROW {
            tickets.push(stream.copy_in(memory()?, 0..bytes, to)?);
        }
        stream.synchronize()?;
        tickets.clear();
        Ok(())
    })?;
    let (one, in_row) = (rate(bytes, one), rate(IN_ROW * bytes, in_row));
    Ok(format!("{one} | {:6.1} us | {in_row}", call * 1e6))
}

fn rate(bytes: usize, seconds: f64) -> String {
    format!("{:8.1} us {:6.2} GB/s", seconds * 1e6, bytes as f64 / seconds / 1e9)
}

fn size(bytes: usize) -> String {
    match bytes >> 20 {
        0 => format!("{} KiB", bytes >> 10),
        mebibytes => format!("{mebibytes} MiB"),
    }
}
