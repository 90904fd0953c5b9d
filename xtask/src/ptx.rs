//! PTX of the kernels: `cargo xtask ptx [--check]`.
//!
//! NVRTC compiles every `kernels/cuda/*.cu` for compute_75 and compute_80;
//! ptxas assembles the result for six architectures and says what each kernel
//! takes of them. PTX and table are checked in, so that a build needs neither;
//! `--check` makes both again and compares. No kernel may spill registers.

mod ptxas;
mod table;
mod tools;

pub use table::{Kernel, TARGETS, Table};
pub use tools::target_folder;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};
use tools::Tools;

/// Where the sources, and what is made of them, lie.
const SOURCES: &str = "kernels/cuda";
const MADE: &str = "kernels/ptx";
/// The table's name in [`MADE`].
pub const TABLE: &str = "kernels/ptx/ptxas.toml";

/// Virtual architectures that PTX is made for. The first serves Turing only;
/// the second, everything since Ampere.
const VIRTUAL: [u32; 2] = [75, 80];

/// Of NVRTC, beside the architecture. Contraction is off and nothing is
/// approximated: the bits of a kernel are those of `contract.rs`. A program
/// that compiles at run time reads the same file.
const OPTIONS: &str = "kernels/cuda/options.txt";

/// `check`: compare with what is checked in instead of writing it. Whether all
/// is well; what is not was printed.
///
/// Errors, in words: a tool is missing or fails, a file cannot be read or
/// written.
pub fn run(root: &Path, check: bool) -> Result<bool, String> {
    let sources = files(&root.join(SOURCES), "cu")?;
    let tools = Tools::get(root)?;
    let work = tools.work_folder("ptx")?;
    let options = read(&root.join(OPTIONS))?;
    let headers = files(&root.join(SOURCES), "cuh")?;
    let headers: String = headers.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    let jobs = sources.iter().flat_map(|source| VIRTUAL.map(|arch| (source.clone(), arch)));
    let ptx = in_parallel(jobs.collect(), |(source, arch)| {
        let name = ptx_name(&source, arch);
        let made = work.join(&name);
        let arch = format!("--gpu-architecture=compute_{arch}");
        let mut key = vec![name.as_str(), &arch, &options, &headers];
        let text = read(&source)?;
        key.push(&text);
        let ptx = tools.kept(&key, || {
            nvrtc(&tools, root, &source, &arch, &options, &made)?;
            read(&made)
        })?;
        fs::write(&made, &ptx).map_err(|error| format!("{}: {error}", made.display()))?;
        Ok((name.clone(), ptx))
    })?;
    let ptx: BTreeMap<String, String> = ptx.into_iter().collect();
    let jobs = sources.iter().flat_map(|source| TARGETS.map(|target| (source.clone(), target)));
    let reports = in_parallel(jobs.collect(), |(source, target)| {
        let ptx = work.join(ptx_name(&source, target.ptx));
        let kernels = ptxas::run(&tools, &ptx, target)?;
        Ok((stem(&source), target, kernels))
    })?;
    let mut table = Table::default();
    for (file, target, kernels) in reports {
        for kernel in kernels {
            table.add(&file, target, &kernel);
        }
    }
    for source in &sources {
        let text = &ptx[&ptx_name(source, VIRTUAL[1])];
        table.add_bounds(&stem(source), &ptxas::bounds(text));
    }
    let made = root.join(MADE);
    let old = fs::read_to_string(root.join(TABLE)).ok();
    let mut complaints = table.spills();
    if check {
        complaints.extend(differences(&made, &ptx)?);
        match old {
            None => complaints.push(format!("{TABLE} is missing")),
            Some(text) => complaints.extend(table.differences(&Table::parse(&text)?)),
        }
    } else {
        write(&made, &ptx)?;
        fs::write(root.join(TABLE), table.text()).map_err(|error| format!("{TABLE}: {error}"))?;
        if let Some(old) = old.and_then(|text| Table::parse(&text).ok()) {
            table.differences(&old).iter().for_each(|change| println!("{change}"));
        }
    }
    complaints.iter().for_each(|complaint| println!("{complaint}"));
    if check && !complaints.is_empty() {
        println!("`cargo xtask ptx` makes kernels/ptx again");
    }
    println!(
        "{} kernels in {} files, {} architectures",
        table.kernels().count(),
        sources.len(),
        TARGETS.len()
    );
    Ok(complaints.is_empty())
}

/// Every file of `folder` that ends so, by name.
fn files(folder: &Path, ending: &str) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let entries = fs::read_dir(folder).map_err(failed)?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut paths: Vec<PathBuf> = paths.collect::<Result<_, _>>().map_err(failed)?;
    paths.retain(|path| path.extension().is_some_and(|found| found == ending));
    paths.sort();
    match paths.is_empty() {
        true => Err(format!("{} has no .{ending} files", folder.display())),
        false => Ok(paths),
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn ptx_name(source: &Path, arch: u32) -> String {
    format!("{}.sm{arch}.ptx", stem(source))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// `job` of every item, on as many threads as there are processors; the
/// answers in the items' order, or the first error in that order.
fn in_parallel<T: Send, R: Send>(
    items: Vec<T>,
    job: impl Fn(T) -> Result<R, String> + Sync,
) -> Result<Vec<R>, String> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let mut answers: Vec<Option<Result<R, String>>> = items.iter().map(|_| None).collect();
    let queue = Mutex::new(items.into_iter().zip(&mut answers));
    let next = || queue.lock().expect("no job panics while it takes an item").next();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((item, answer)) = next() {
                    *answer = Some(job(item));
                }
            });
        }
    });
    drop(queue);
    answers.into_iter().map(|answer| answer.expect("every item was taken")).collect()
}

/// Compiles `source` to `made`. Warnings are passed on.
fn nvrtc(
    tools: &Tools,
    root: &Path,
    source: &Path,
    arch: &str,
    options: &str,
    made: &Path,
) -> Result<(), String> {
    let output = Command::new(tools::PYTHON)
        .arg(root.join("tools/ptx/nvrtc.py"))
        .args([&tools.nvrtc(), source, made])
        .arg(arch)
        .args(options.split_whitespace())
        .output()
        .map_err(|error| format!("{}: {error}", tools::PYTHON))?;
    let words = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(words.trim_end().to_string());
    }
    if !words.trim().is_empty() {
        eprintln!("{}", words.trim_end());
    }
    Ok(())
}

/// What of `ptx` is not so in `folder`, and what is in `folder` beside it.
fn differences(folder: &Path, ptx: &BTreeMap<String, String>) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for (name, text) in ptx {
        match fs::read_to_string(folder.join(name)) {
            Err(_) => found.push(format!("{MADE}/{name} is missing")),
            Ok(old) if old == *text => {}
            Ok(old) => {
                let same = old.lines().zip(text.lines()).take_while(|(a, b)| a == b).count();
                let line = text.lines().nth(same).unwrap_or("the end of the file");
                let found_there = old.lines().nth(same).unwrap_or("the end of the file");
                found.push(format!(
                    "{MADE}/{name} differs from what NVRTC makes, first in line {}: {:?}, not {:?}",
                    same + 1,
                    found_there.trim(),
                    line.trim()
                ));
            }
        }
    }
    for name in stale(folder, ptx)? {
        found.push(format!("{MADE}/{name} has no source"));
    }
    Ok(found)
}

/// Files of PTX in `folder` that are not in `ptx`.
fn stale(folder: &Path, ptx: &BTreeMap<String, String>) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter(|name| name.ends_with(".ptx") && !ptx.contains_key(name)).collect())
}

fn write(folder: &Path, ptx: &BTreeMap<String, String>) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(folder).map_err(failed)?;
    for (name, text) in ptx {
        fs::write(folder.join(name), text).map_err(failed)?;
    }
    for name in stale(folder, ptx)? {
        fs::remove_file(folder.join(name)).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_items() {
        let answers = in_parallel((0..100).collect(), |i| Ok::<_, String>(i * i)).unwrap();
        assert_eq!(answers, (0..100).map(|i| i * i).collect::<Vec<_>>());
        let error = in_parallel((0..100).collect(), |i| match i % 30 {
            29 => Err(format!("{i}")),
            _ => Ok(i),
        });
        assert_eq!(error, Err("29".to_string()));
    }

    #[test]
    fn stale_missing_and_changed_files_are_named() {
        let folder = std::env::temp_dir().join(format!("pregate-ptx-{}", std::process::id()));
        let made = |names: &[(&str, &str)]| {
            names.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect()
        };
        write(&folder, &made(&[("a.sm75.ptx", "one\ntwo\n"), ("b.sm75.ptx", "x")])).unwrap();
        let now = made(&[("a.sm75.ptx", "one\n2\n"), ("c.sm75.ptx", "y")]);
        let found = differences(&folder, &now).unwrap().join("\n");
        for words in ["line 2: \"two\", not \"2\"", "c.sm75.ptx is missing", "b.sm75.ptx has no"] {
            assert!(found.contains(words), "{found}");
        }
        write(&folder, &now).unwrap();
        assert_eq!(differences(&folder, &now), Ok(vec![]));
        fs::remove_dir_all(&folder).unwrap();
    }
}
