//! What launches cost, one by one and in a graph, and what a layer pays for
//! asking the host.

use crate::{Scale, raw, report::Report, timing};
use pregate_kernels::cuda::{CudaError, Device, probe_empty};

/// Launches that follow each other.
const IN_ROW: usize = 1000;
/// Bytes of a token's routing answer, or of its hidden state in f32.
const ANSWER_BYTES: [usize; 2] = [64, 8 << 10];

pub fn measure(device: &Device, scale: Scale, report: &mut Report) -> Result<(), CudaError> {
    report.heading("launches and round trips");
    let count = if scale == Scale::Full { IN_ROW } else { 2 };
    let repetitions = if scale == Scale::Full { 50 } else { 1 };
    let stream = device.compute();
    let launch = || probe_empty(device, stream);
    let micro = |seconds: f64| format!("{:.2} us", seconds * 1e6);

    let host = timing::host_seconds(5, || (0..count).try_for_each(|_| launch()))?;
    stream.synchronize()?;
    let all = timing::host_seconds(5, || {
        (0..count).try_for_each(|_| launch())?;
        stream.synchronize()
    })?;
    let (host, all) = (micro(host / count as f64), micro(all / count as f64));
    report.row("launch", format!("{host} of the host, one after the other {all}"));
    let waited = timing::host_seconds(repetitions, || {
        launch()?;
        stream.synchronize()
    })?;
    report.row("launch and wait for it", micro(waited));
    match raw::graph_seconds(scale, count, repetitions) {
        Ok(seconds) => report.row("launch in a graph", micro(seconds / count as f64)),
        Err(why) => report.row("launch in a graph", why),
    }

    let arena = device.arena(ANSWER_BYTES[1])?;
    let span = arena.take(ANSWER_BYTES[1], 256)?;
    for bytes in ANSWER_BYTES {
        let part = span.part(0..bytes);
        let mut block = Some(device.pinned(bytes)?);
        let seconds = timing::host_seconds(repetitions, || {
            launch()?;
            let Some(memory) = block.take() else { return Ok(()) };
            // The host reads the answer, writes one, and the next layer goes on.
            let memory = stream.copy_out(&part, memory, 0)?.wait()?;
            let ticket = stream.copy_in(memory, 0..bytes, &part)?;
            launch()?;
            block = Some(ticket.wait()?);
            Ok(())
        })?;
        stream.synchronize()?;
        report.row(&format!("host round trip of a layer, {bytes} B"), micro(seconds));
    }
    Ok(())
}
