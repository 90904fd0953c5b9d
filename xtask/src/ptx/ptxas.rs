//! ptxas, and what it says of kernels with `-v`.

use super::{table::Target, tools::Tools};
use std::{collections::BTreeMap, fs, path::Path, process::Command};

/// What a kernel takes on one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub name: String,
    /// Per thread.
    pub registers: u32,
    /// Static, per block.
    pub shared_bytes: u32,
    /// Local memory per thread: arrays that registers cannot hold.
    pub stack_bytes: u32,
    /// Stores and loads of spilled registers.
    pub spill_bytes: u32,
}

/// Assembles `ptx` for `target`.
///
/// Errors, in words: ptxas refuses the file.
pub fn run(tools: &Tools, ptx: &Path, target: Target) -> Result<Vec<Report>, String> {
    let failed = |what: String| format!("{} for {}: {what}", ptx.display(), target.name());
    let text = fs::read_to_string(ptx).map_err(|error| failed(error.to_string()))?;
    let words = tools.kept(&[&target.name(), &text], || {
        let output = Command::new(tools.ptxas())
            .arg("-v")
            .arg(format!("-arch={}", target.name()))
            .arg(ptx)
            .arg("-o")
            .arg(ptx.with_extension(format!("{}.cubin", target.name())))
            .output()
            .map_err(|error| failed(error.to_string()))?;
        let words = String::from_utf8_lossy(&output.stderr);
        match output.status.success() {
            true => Ok(words.into_owned()),
            false => Err(failed(words.trim_end().to_string())),
        }
    })?;
    words.lines().filter(|line| line.contains("warning")).for_each(|line| eprintln!("{line}"));
    parse(&words).map_err(failed)
}

/// Spills of functions that are not inlined count for the kernel before them.
fn parse(words: &str) -> Result<Vec<Report>, String> {
    let mut kernels: Vec<Report> = Vec::new();
    for line in words.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_string();
            kernels.push(Report { name, ..Report::default() });
            continue;
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            let number = |what| before(line, what).ok_or(format!("cannot read {line:?}"));
            kernel.stack_bytes += number("bytes stack frame")?;
            kernel.spill_bytes += number("bytes spill stores")? + number("bytes spill loads")?;
        } else if line.contains("Used ") {
            kernel.registers = before(line, "registers").ok_or(format!("cannot read {line:?}"))?;
            kernel.shared_bytes = before(line, "bytes smem").unwrap_or(0);
        }
    }
    match kernels.iter().find(|kernel| kernel.registers == 0) {
        Some(kernel) => Err(format!("no registers are told for {}", kernel.name)),
        None => Ok(kernels),
    }
}

/// The number before `what` in `line`.
fn before(line: &str, what: &str) -> Option<u32> {
    line.split(what)
        .next()
        .filter(|rest| rest.len() < line.len())?
        .split_whitespace()
        .last()?
        .parse()
        .ok()
}

/// A kernel's launch bounds: threads of a block, and blocks that shall be
/// resident at once.
pub type Bounds = (u32, Option<u32>);

/// `.maxntid` and `.minnctapersm` of the kernels of a PTX file that have them.
pub fn bounds(ptx: &str) -> BTreeMap<String, Bounds> {
    let mut found: BTreeMap<String, Bounds> = BTreeMap::new();
    let mut name = String::new();
    for line in ptx.lines() {
        if let Some((_, rest)) = line.split_once(".entry ") {
            name = rest.trim_end_matches(['(', ')', ' ']).to_string();
        } else if let Some(rest) = line.trim().strip_prefix(".maxntid ") {
            let threads = rest.split(',').filter_map(|word| word.trim().parse::<u32>().ok());
            found.insert(name.clone(), (threads.product(), None));
        } else if let Some(rest) = line.trim().strip_prefix(".minnctapersm ")
            && let Some(bounds) = found.get_mut(&name)
        {
            bounds.1 = rest.trim().parse().ok();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemv_q4_k' for 'sm_86'
ptxas info    : Function properties for gemv_q4_k
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 1040 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 20.149 ms
ptxas info    : Compiling entry function 'gemv_q6_k' for 'sm_86'
ptxas info    : Function properties for gemv_q6_k
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 400 bytes cmem[0]
";

    #[test]
    fn what_ptxas_says_is_read() {
        let report = |name: &str, registers, shared_bytes, stack_bytes, spill_bytes| Report {
            name: name.to_string(),
            registers,
            shared_bytes,
            stack_bytes,
            spill_bytes,
        };
        let expected = [report("gemv_q4_k", 40, 1040, 8, 0), report("gemv_q6_k", 255, 0, 16, 32)];
        assert_eq!(parse(WORDS).unwrap(), expected);
        let cut = WORDS.lines().take(4).collect::<Vec<_>>().join("\n");
        assert!(parse(&cut).unwrap_err().contains("gemv_q4_k"));
    }

    #[test]
    fn launch_bounds_are_read() {
        let ptx = ".visible .entry a(\n.param .u64 a_param_0\n)\n.maxntid 64, 2, 1\n\
                   .minnctapersm 3\n{\n}\n.visible .entry b()\n{\n}\n.visible .entry c(\n)\n\
                   .maxntid 32, 1, 1\n";
        let found: Vec<_> = bounds(ptx).into_iter().collect();
        assert_eq!(found, [("a".to_string(), (128, Some(3))), ("c".to_string(), (32, None))]);
    }
}
