//! Builds the stand-in libcuda with the C++ compiler of the machine: the
//! machine and the driver of this crate, and every `.cu` file of
//! `kernels/cuda` and `tests/cuda`. Without a compiler the crate is empty.
//!
//! Kernels are found in the preprocessed text of a file (macros may make
//! them), and a generated source registers each by its name.

#[path = "build/compile.rs"]
mod compile;
#[path = "build/scan.rs"]
mod scan;

use compile::{Compiler, Unit};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for watched in ["build.rs", "build", "host", "driver", "tests/cuda", "../cuda"] {
        println!("cargo:rerun-if-changed={}", here.join(watched).display());
    }
    for variable in ["CXX", "PREGATE_STANDIN_SANITIZE", "PREGATE_STANDIN_ARCH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let Some(compiler) = Compiler::find() else {
        println!("cargo:warning=no C++ compiler for this machine: kernels will not run in tests");
        return;
    };
    let out = out.join(compiler.variant());
    fs::create_dir_all(&out).expect("the output folder is ours");
    let mut units = Vec::new();
    for source in
        files(&here.join("host"), "cpp").into_iter().chain(files(&here.join("driver"), "cpp"))
    {
        units.push(Unit::own(&source, &out));
    }
    let mut stems = Vec::new();
    for folder in [here.join("../cuda"), here.join("tests/cuda")] {
        for source in files(&folder, "cu") {
            let source = source.canonicalize().expect("it was just listed");
            let unit = Unit::kernels(&source, &here.join("host"), &out);
            assert!(!stems.contains(&unit.stem), "two .cu files are named {}", unit.stem);
            stems.push(unit.stem.clone());
            units.push(unit);
        }
    }
    let library = compiler.build(&units, &out);
    println!("cargo:rustc-env=PREGATE_STANDIN_LIBRARY={}", library.display());
    println!("cargo:rustc-env=PREGATE_STANDIN_VARIANT={}", compiler.variant());
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == extension))
        .collect();
    found.sort();
    found
}
