//! The bundle for a machine with a GPU: `cargo xtask gpu-check`.
//!
//! `target/gpu-check/` holds programs, tests, small models and one script,
//! `gpu-check.sh`. That machine needs its driver; Rust and a network it need
//! not have.

use crate::ptx::target_folder;
use serde::Deserialize;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Programs, as cargo builds them, and their names in `bin/`.
const PROGRAMS: [(&[&str], &str); 3] = [
    (&["-p", "pregate", "--bin", "pregate"], "pregate"),
    (&["-p", "pregate-kernels", "--example", "gpu_bench"], "gpu_bench"),
    (&["-p", "pregate-runtime", "--example", "random_model"], "random_model"),
];

/// The runtime's test that also runs on a GPU.
const IDENTITY: &str = "gpu_identity";

/// Of tools/gpu-check.
const SCRIPTS: [&str; 4] = ["gpu-check.sh", "speed.py", "engines.py", "report.py"];

/// Looks back over many programs: each has the same compressed PTX, so that the
/// archive is 2.5 times smaller than with gzip.
const COMPRESSOR: &str = "xz --lzma2=preset=6,dict=64MiB";

/// What the small models are asked.
const TOKENS: &str = "[1, 5, 9, 200, 31, 7]";

/// Packs the bundle; `dev`: of programs that are hardly optimised, to try the
/// script. Always `true`.
///
/// Errors, in words: something does not build, or a file cannot be written.
pub fn run(root: &Path, dev: bool) -> Result<bool, String> {
    let cargo = |command: &str, arguments: &[&str]| cargo(root, dev, command, arguments);
    let built = |command: &str, arguments: &[&str]| executables(&cargo(command, arguments)?);
    let target = target_folder(root);
    let bundle = target.join("gpu-check");
    let _ = fs::remove_dir_all(&bundle);
    for folder in ["bin", "tests", "models", "stand-in"] {
        make(&bundle.join(folder))?;
    }
    for (arguments, name) in PROGRAMS {
        let built = built("build", arguments)?;
        let program = built.first().ok_or(format!("cargo built no {name}"))?;
        pack(&program.1, &bundle.join("bin").join(name))?;
    }
    let tests = cuda_tests(&root.join("kernels/tests"))?;
    let mut arguments = vec!["-p", "pregate-kernels", "--no-run"];
    tests.iter().for_each(|test| arguments.extend(["--test", test]));
    for (name, program) in built("test", &arguments)? {
        if tests.contains(&name) {
            pack(&program, &bundle.join("tests").join(&name))?;
        }
    }
    let messages = cargo("test", &["-p", "pregate-runtime", "--no-run", "--test", IDENTITY])?;
    let programs = executables(&messages)?;
    let identity = programs.iter().find(|(name, _)| name == IDENTITY);
    pack(
        &identity.ok_or("cargo built no test of identity")?.1,
        &bundle.join("tests/gpu_identity"),
    )?;
    if let Some(library) = standin(&messages)? {
        copy(&library, &bundle.join("stand-in/libcuda.so"))?;
    }
    models(root, &bundle)?;
    for script in SCRIPTS {
        copy(&root.join("tools/gpu-check").join(script), &bundle.join(script))?;
    }
    write(&bundle.join("version.txt"), &version(root))?;
    let archive = target.join("gpu-check.tar.xz");
    let tar = Command::new("tar")
        .args(["-C".as_ref(), target.as_os_str(), "-I".as_ref(), COMPRESSOR.as_ref()])
        .args(["-cf".as_ref(), archive.as_os_str(), "gpu-check".as_ref()])
        .status();
    match tar {
        Ok(status) if status.success() => {}
        other => return Err(format!("tar with xz, which packs the folder: {other:?}")),
    }
    let mib = fs::metadata(&archive).map_or(0.0, |data| data.len() as f64 / f64::from(1 << 20));
    println!(
        "{} ({mib:.0} MiB): unpack it there and run gpu-check/gpu-check.sh",
        archive.display()
    );
    println!("it lies unpacked in {}; try it here with --stand-in", bundle.display());
    Ok(true)
}

/// A line of cargo's, of which there are other kinds.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    executable: Option<PathBuf>,
    #[serde(default)]
    target: Option<Target>,
    /// What a build script sets.
    #[serde(default)]
    env: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// The messages of `cargo command arguments`.
fn cargo(root: &Path, dev: bool, command: &str, arguments: &[&str]) -> Result<String, String> {
    let profile = if dev { "dev" } else { "release" };
    eprintln!("cargo {command} --profile {profile} {}", arguments.join(" "));
    let output = Command::new("cargo")
        .args([command, "--profile", profile, "--quiet"])
        .arg("--message-format=json-render-diagnostics")
        .args(arguments)
        .current_dir(root)
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(|error| format!("cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo {command}: {}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn parsed(messages: &str) -> impl Iterator<Item = Result<Message, String>> {
    messages.lines().filter(|line| line.starts_with('{')).map(|line| {
        serde_json::from_str(line).map_err(|error| format!("cannot read cargo's message: {error}"))
    })
}

/// Name and path of the programs that cargo's messages tell of.
fn executables(messages: &str) -> Result<Vec<(String, PathBuf)>, String> {
    let mut found = Vec::new();
    for message in parsed(messages) {
        let message = message?;
        if let (Some(path), Some(target)) = (message.executable, message.target) {
            found.push((target.name, path));
        }
    }
    Ok(found)
}

/// The stand-in for the driver; `None`: it was built without a C++ compiler.
fn standin(messages: &str) -> Result<Option<PathBuf>, String> {
    for message in parsed(messages) {
        let found = message?.env.into_iter().find(|(name, _)| name == "PREGATE_STANDIN_LIBRARY");
        if let Some((_, path)) = found {
            return Ok(Some(path.into()));
        }
    }
    Ok(None)
}

/// The kernels' tests, which run on a device.
fn cuda_tests(folder: &Path) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("cuda_"))
        // A file, or a folder with a main.rs.
        .map(|name| name.trim_end_matches(".rs").to_string())
        .collect();
    names.sort();
    match names.is_empty() {
        true => Err(format!("{} has no cuda_* tests", folder.display())),
        false => Ok(names),
    }
}

/// The demo model and the small ones of the tests, and what the processor
/// answers to [`TOKENS`] with each: on every machine, to the bit.
fn models(root: &Path, bundle: &Path) -> Result<(), String> {
    let folder = bundle.join("models");
    copy(&root.join("models/pregate-demo.gguf"), &bundle.join("bin/pregate-demo.gguf"))?;
    let tokens = folder.join("tokens.json");
    write(&tokens, TOKENS)?;
    let small = root.join("tests/data/gguf");
    let entries = fs::read_dir(&small).map_err(|error| format!("{}: {error}", small.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    paths.sort();
    let mut expected = String::new();
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let model = folder.join(format!("{name}.gguf"));
        copy(&path, &model)?;
        let out = folder.join("logits");
        output(
            Command::new(bundle.join("bin/pregate"))
                .args(["eval", "logits", "--model"])
                .arg(&model)
                .arg("--tokens")
                .arg(&tokens)
                .arg("--out")
                .arg(&out),
        )?;
        let sum = output(Command::new("sha256sum").arg(&out))?;
        let sum = sum.split_whitespace().next().unwrap_or_default();
        expected += &format!("{sum} {name}\n");
        fs::remove_file(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    }
    write(&folder.join("expected.txt"), &expected)
}

/// Commit, compiler and C library.
fn version(root: &Path) -> String {
    let git = |arguments: &[&str]| {
        output(Command::new("git").args(arguments).current_dir(root)).unwrap_or_default()
    };
    let commit = git(&["rev-parse", "--short", "HEAD"]);
    let changed = if git(&["status", "--porcelain"]).is_empty() { "" } else { ", with changes" };
    let rustc = output(Command::new("rustc").arg("--version")).unwrap_or_default();
    let libc = output(Command::new("ldd").arg("--version")).unwrap_or_default();
    let libc = libc.lines().next().unwrap_or("C library unknown");
    format!("commit {}{changed}\n{}\nlinked with {libc}\n", commit.trim(), rustc.trim())
}

/// Standard output. Errors, in words: it does not start or fails.
fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Copies a program without its symbols, where `strip` is there.
fn pack(from: &Path, to: &Path) -> Result<(), String> {
    copy(from, to)?;
    let _ = Command::new("strip").arg(to).status();
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to).map(drop).map_err(|error| format!("{}: {error}", from.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn make(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_read_from_cargos_messages() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"half","kind":["lib"]},"executable":null}
{"reason":"compiler-artifact","target":{"name":"cuda_dense","kind":["test"]},"executable":"/t/cuda_dense-1"}
{"reason":"build-script-executed","package_id":"s","env":[["A","b"],["PREGATE_STANDIN_LIBRARY","/t/libcuda.so"]]}
{"reason":"build-finished","success":true}
"#;
        let expected = [("cuda_dense".to_string(), PathBuf::from("/t/cuda_dense-1"))];
        assert_eq!(executables(messages).unwrap(), expected);
        assert!(executables("{nonsense").is_err());
        assert_eq!(standin(messages), Ok(Some("/t/libcuda.so".into())));
        assert_eq!(standin("{\"reason\":\"build-finished\"}"), Ok(None));
    }

    #[test]
    fn the_script_is_for_bash_and_a_missing_folder_is_told() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let script = root.join("tools/gpu-check/gpu-check.sh");
        let checked = Command::new("bash").arg("-n").arg(&script).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        assert!(cuda_tests(&root.join("xtask/src")).unwrap_err().contains("cuda_*"));
    }
}
