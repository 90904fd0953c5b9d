//! What a GPU does with our kernels, beside what it does at best.
//!
//! `gpu_bench [--once]`
//!
//! With `PREGATE_TEST_GPU=1` on the machine's GPU, else over the stand-in for
//! the driver, where figures mean nothing. `--once`: every kernel once, with
//! small shapes and without timing, for compute-sanitizer. What stands behind
//! the line `-- table` at the end is the summary.

mod copies;
mod kernels;
mod limits;
mod overhead;
mod raw;
mod report;
mod timing;

use pregate_kernels::cuda::{CudaError, Device};
use pregate_standin::testing;
use report::Report;
use std::process::ExitCode;

/// How much to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Everything once, small.
    Once,
    /// On the stand-in: as `Once`, with the measurements around it.
    Rehearsal,
    Full,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let once = match words.as_slice() {
        [] => false,
        [word] if word == "--once" => true,
        _ => {
            eprintln!("gpu_bench [--once]");
            return ExitCode::from(2);
        }
    };
    let is_gpu = std::env::var_os("PREGATE_TEST_GPU").is_some_and(|value| value == "1");
    let Some(device) = testing::device() else { return ExitCode::SUCCESS };
    let scale = match (once, is_gpu) {
        (true, _) => Scale::Once,
        (false, true) => Scale::Full,
        (false, false) => Scale::Rehearsal,
    };
    if !is_gpu {
        println!("over the stand-in: figures mean nothing");
    }
    let mut report = Report::default();
    let done = measure(&device, scale, &mut report);
    report.print();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu_bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(device: &Device, scale: Scale, report: &mut Report) -> Result<(), CudaError> {
    println!("{:?}", device.info());
    let limits = limits::measure(device, scale, report)?;
    kernels::measure(device, scale, &limits, report)?;
    if scale != Scale::Once {
        copies::measure(device, scale, report)?;
        overhead::measure(device, scale, report)?;
    }
    Ok(())
}
