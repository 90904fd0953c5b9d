//! How fast the host and a GPU reach each other, and what the processor's
//! experts and copies leave each other when both run at once.

use crate::expert_speed::{self, Experts, Line};
use pregate_kernels::{
    Backend,
    cuda::{CudaError, Device, HostMemory, HostPart, PinnedPart, Span, Stream, probe_empty},
};
use pregate_predictor::roofline::{Machine, Worker};
use serde::Serialize;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// What one copy brings: about an expert.
const PIECE_BYTES: usize = 2 << 20;
/// Host memory that is copied, in pieces.
const PIECES: usize = 16;
/// Pieces that have a place on the device; copies take turns.
const PLACES: usize = 4;
/// Of which the best counts.
const PASSES: usize = 4;
/// How long copies run beside the processor.
const BESIDE: Duration = Duration::from_millis(20);
/// Copies of a few bytes, of which the median counts.
const SMALL_COPIES: usize = 33;
const SMALL_BYTES: usize = 4096;

/// Rates in GB/s (10^9 bytes), times in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkSpeed {
    /// Host to device from page-locked memory, in pieces of 2 MiB; `null`: the
    /// system gives none, see `pin_refused`.
    pub pinned_gb_s: Option<f64>,
    pub pin_refused: Option<String>,
    /// The same from ordinary memory.
    pub pageable_gb_s: f64,
    /// From the order of a copy of 4 KiB until it is seen to have ended.
    pub copy_us: f64,
    /// A kernel that does nothing, until it is seen to have ended.
    pub visit_us: f64,
    /// The processor's experts and copies at once.
    pub both: Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Both {
    pub cpu_gb_s: f64,
    pub link_gb_s: f64,
}

impl LinkSpeed {
    pub fn copy_gb_s(&self) -> f64 {
        self.pinned_gb_s.unwrap_or(self.pageable_gb_s)
    }

    /// What a prediction rests on; `gpu_gb_s` is what the GPU reads in its own
    /// memory.
    pub fn machine(&self, gpu_gb_s: f64, cpu: &Line) -> Machine {
        let beside = (self.both.cpu_gb_s / cpu.measured_gb_s).clamp(0.01, 1.0);
        let copies = self.copy_gb_s();
        Machine {
            gpu_rate: gpu_gb_s,
            cpu: Worker { rate: cpu.gb_s, beside: cpu.gb_s * beside, start_ns: cpu.start_us * 1e3 },
            link: Worker {
                rate: copies,
                beside: self.both.link_gb_s.min(copies),
                start_ns: self.copy_us * 1e3,
            },
            visit_ns: self.visit_us * 1e3,
        }
    }
}

/// Copies from `host` to places on `device`.
struct Copies {
    stream: Stream,
    host: Vec<HostPart>,
    places: Vec<Span>,
}

impl Copies {
    fn new(device: &Device, pinned: bool) -> Result<Self, CudaError> {
        let bytes = PIECES * PIECE_BYTES;
        let host = if pinned {
            let mut block = device.pinned(bytes)?;
            block.fill(0x55);
            let block = Arc::new(block);
            let piece = |at: usize| PinnedPart::new(block.clone(), at..at + PIECE_BYTES);
            let pieces = (0..bytes).step_by(PIECE_BYTES).map(|at| piece(at).map(HostPart::Pinned));
            pieces.collect::<Result<_, _>>()?
        } else {
            (0..PIECES).map(|_| HostPart::Pageable(vec![0x55; PIECE_BYTES].into())).collect()
        };
        let arena = device.arena(PLACES * PIECE_BYTES)?;
        let places = (0..PLACES).map(|_| arena.take(PIECE_BYTES, 256));
        Ok(Self { stream: device.copy().clone(), host, places: places.collect::<Result<_, _>>()? })
    }

    /// Seconds of `count` copies, by the device's clock; meanwhile does
    /// `beside`, which hears whether they still run.
    fn run(
        &self,
        count: usize,
        beside: impl FnOnce(&mut dyn FnMut() -> Result<bool, CudaError>) -> Result<(), CudaError>,
    ) -> Result<f64, CudaError> {
        let begin = self.stream.record_timed()?;
        let mut tickets = Vec::with_capacity(count);
        let pieces = self.host.iter().cycle().zip(self.places.iter().cycle());
        for (piece, place) in pieces.take(count) {
            tickets.push(self.stream.copy_in(piece.clone(), 0..piece.bytes().len(), place)?);
        }
        let end = self.stream.record_timed()?;
        beside(&mut || Ok(!end.is_complete()?))?;
        end.synchronize()?;
        end.seconds_since(&begin)
    }

    /// The best of some passes over all pieces, in GB/s.
    fn gb_s(&self) -> Result<f64, CudaError> {
        let mut best = 0.0f64;
        for _ in 0..PASSES {
            best = best.max(rate(PIECES, self.run(PIECES, |_| Ok(()))?));
        }
        Ok(best)
    }

    /// The median time of a small copy, in microseconds.
    fn small_us(&self) -> Result<f64, CudaError> {
        let place = self.places[0].part(0..SMALL_BYTES);
        median_us(|| {
            let ticket = self.stream.copy_in(self.host[0].clone(), 0..SMALL_BYTES, &place)?;
            ticket.wait().map(drop)
        })
    }
}

/// GB/s of so many pieces. A clock that stood still counts as a nanosecond.
fn rate(pieces: usize, seconds: f64) -> f64 {
    (pieces * PIECE_BYTES) as f64 / seconds.max(1e-9) / 1e9
}

fn median_us(mut call: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let mut times = Vec::with_capacity(SMALL_COPIES);
    for _ in 0..SMALL_COPIES {
        let started = Instant::now();
        call()?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    Ok(expert_speed::median(&times).unwrap_or(0.0))
}

/// Takes under a second where the link has 10 GB/s. `experts` are computed
/// beside copies, so many at once.
///
/// # Errors
/// The driver's. That memory cannot be page-locked is none.
pub fn measure(
    device: &Device,
    backend: &dyn Backend,
    experts: &mut Experts<'_>,
    at_once: usize,
) -> Result<LinkSpeed, CudaError> {
    let (pinned, pin_refused) = match Copies::new(device, true) {
        Ok(copies) => (Some(copies), None),
        Err(error) if error.is_sticky() => return Err(error),
        Err(error) => (None, Some(error.to_string())),
    };
    let pageable = Copies::new(device, false)?;
    let pinned_gb_s = pinned.as_ref().map(Copies::gb_s).transpose()?;
    let pageable_gb_s = pageable.gb_s()?;
    let copies = pinned.as_ref().unwrap_or(&pageable);
    let copy_us = copies.small_us()?;
    let visit_us = median_us(|| {
        probe_empty(device, device.compute())?;
        device.compute().synchronize()
    })?;
    let wanted = pinned_gb_s.unwrap_or(pageable_gb_s) * 1e9 * BESIDE.as_secs_f64();
    let count = (wanted / PIECE_BYTES as f64).clamp(PIECES as f64, 64.0 * PIECES as f64) as usize;
    let mut cpu_gb_s = 0.0;
    let seconds = copies.run(count, |running| {
        cpu_gb_s = experts.gb_s_while(backend, at_once, running)?;
        Ok(())
    })?;
    let both = Both { cpu_gb_s, link_gb_s: rate(count, seconds) };
    Ok(LinkSpeed { pinned_gb_s, pin_refused, pageable_gb_s, copy_us, visit_us, both })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_has_rates_alone_and_beside_each_other() {
        let speed = LinkSpeed {
            pinned_gb_s: Some(24.0),
            pin_refused: None,
            pageable_gb_s: 9.0,
            copy_us: 12.0,
            visit_us: 8.0,
            both: Both { cpu_gb_s: 24.0, link_gb_s: 20.0 },
        };
        let cpu = Line { gb_s: 40.0, start_us: 5.0, measured_gb_s: 32.0 };
        let machine = speed.machine(900.0, &cpu);
        assert_eq!((machine.gpu_rate, machine.visit_ns), (900.0, 8_000.0));
        let Worker { rate, beside, start_ns } = machine.cpu;
        // Three quarters of what was measured alone, 32 GB/s.
        assert_eq!((rate, beside, start_ns), (40.0, 30.0, 5_000.0));
        let Worker { rate, beside, start_ns } = machine.link;
        assert_eq!((rate, beside, start_ns), (24.0, 20.0, 12_000.0));
        let none = LinkSpeed { pinned_gb_s: None, ..speed };
        let link = none.machine(900.0, &cpu).link;
        assert_eq!((link.rate, link.beside), (9.0, 9.0), "never faster beside the processor");
    }
}
