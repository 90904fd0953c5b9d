//! What a disk gives to the ways of reading, lengths of reads and reads at
//! once: GB/s of random reads all over a file, processor time per GB, and the
//! time of a single small read; then what would be chosen. Without depths
//! (`''`), only the choice.
//!
//! ```text
//! cargo run --release -p pregate-runtime --example disk -- model.gguf [seconds per cell] [depths] [KiB]
//! ```

use pregate_runtime::files::ModelFiles;
use pregate_runtime::store::{
    disk::{DiskChoice, DiskOptions, probe},
    frames::{ClassSpec, FrameId, Frames},
    mover::{Fill, Mover, Piece, Urgency},
};
use std::{error::Error, fs, path::PathBuf, sync::Arc};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = "give a model file, and perhaps: seconds per cell, depths (4,8), KiB (1024,2048)";
    let path = PathBuf::from(arguments.first().ok_or(usage)?);
    let seconds: f64 = arguments.get(1).map_or(Ok(0.5), |text| text.parse())?;
    let depths = list(arguments.get(2).map_or("1,2,4,8,16", String::as_str))?;
    let kibs = list(arguments.get(3).map_or("256,512,1024,2048,4096", String::as_str))?;
    let model = ModelFiles::open(&path)?;
    let files: Vec<_> = model.paths().iter().cloned().zip(model.identities()).collect();

    let plain = DiskOptions { register: false, ..DiskOptions::default() };
    let ways = [
        DiskOptions { choice: DiskChoice::Uring, ..DiskOptions::default() },
        DiskOptions { choice: DiskChoice::Uring, ..plain.clone() },
        DiskOptions { choice: DiskChoice::Threads, ..plain.clone() },
        DiskOptions { choice: DiskChoice::Buffered, ..plain },
    ];
    println!("GB/s (processor seconds per GB)");
    for way in ways {
        if depths.is_empty() {
            break;
        }
        println!("\n{}{}", way.choice, if way.register { ", registered" } else { "" });
        print!("{:>10}", "KiB");
        depths.iter().for_each(|depth| print!("{:>16}", format!("{depth} at once")));
        println!();
        for &kib in &kibs {
            print!("{kib:>10}");
            for &depth in &depths {
                let frame_bytes = (kib << 10).max(4096);
                let frames = Frames::new(&[ClassSpec { frame_bytes, frames: 2 * depth }])?;
                let measure_ns = (seconds * 1e9) as u64;
                let options = DiskOptions {
                    chunk_bytes: kib << 10,
                    depth,
                    prefetch_depth: 1,
                    measure_ns,
                    ..way.clone()
                };
                files.iter().for_each(|(path, _)| drop_from_cache(path));
                let before = processor_seconds();
                let (mover, report) = probe(&files, &frames, &options)?;
                let measured = report.measured.ok_or("the file is too small to measure")?;
                drop(mover);
                let processor = processor_seconds() - before;
                let rate = measured.bytes_per_second() / 1e9;
                let per_gb = processor * 1e9 / measured.bytes as f64;
                print!("{:>16}", format!("{rate:.2} ({per_gb:.3})"));
            }
            println!();
        }
        let frames = Frames::new(&[ClassSpec { frame_bytes: 4096, frames: 1 }])?;
        let options = DiskOptions { measure_ns: 0, ..way.clone() };
        let (mut mover, report) = probe(&files, &frames, &options)?;
        println!("{}", single(&mut *mover, &frames)?);
        println!("{}", report.words);
    }
    let frames = Frames::new(&[ClassSpec { frame_bytes: 4 << 20, frames: 16 }])?;
    let (_, report) = probe(&files, &frames, &DiskOptions::default())?;
    let rate = report.measured.map_or(0.0, |measured| measured.bytes_per_second() / 1e9);
    println!("\nchosen here: {}; {rate:.2} GB/s", report.words);
    report.refused.iter().for_each(|why| println!("refused: {why}"));
    Ok(())
}

/// Numbers between commas; none for an empty text.
fn list(text: &str) -> Outcome<Vec<usize>> {
    Ok(text.split_terminator(',').map(str::parse).collect::<Result<_, _>>()?)
}

/// The time of one read of 4 KiB from submission to arrival, nothing else
/// going on.
fn single(mover: &mut dyn Mover, frames: &Arc<Frames>) -> Outcome<String> {
    let mut times = Vec::new();
    let frame = FrameId { class: 0, index: 0 };
    for index in 0..2000u64 {
        let ticket = frames.claim(frame).ok_or("the frame is in use")?;
        let offset = index % 500 * 4096;
        let piece = Piece { file: 0, offset, len: 4096, needed: 4096, at: 0 };
        let start_ns = mover.now_ns();
        mover.submit(Fill {
            key: index,
            ticket,
            pieces: Arc::new([piece]),
            urgency: Urgency::Demand,
        });
        let done = mover.next(u64::MAX).ok_or("no answer")?;
        done.result?;
        times.push(mover.now_ns() - start_ns);
    }
    times.sort_unstable();
    let at = |share: f64| times[(times.len() as f64 * share) as usize] as f64 / 1e3;
    Ok(format!("one read of 4 KiB: median {:.1} us, 99 % {:.1} us", at(0.5), at(0.99)))
}

/// As far as nobody else has it mapped.
fn drop_from_cache(path: &std::path::Path) {
    #[cfg(target_os = "linux")]
    if let Ok(file) = fs::File::open(path) {
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    }
}

/// User and system time of this process, where `/proc` tells it.
fn processor_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = |field: usize| {
        after_name.split_whitespace().nth(field).and_then(|text| text.parse::<f64>().ok())
    };
    (ticks(11).unwrap_or(0.0) + ticks(12).unwrap_or(0.0)) / 100.0
}
