//! Lists the checked-in PTX (`ptx/<module>.sm<target>.ptx`), so that the
//! program carries whatever is there.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=ptx");
    println!("cargo::rerun-if-changed=build.rs");
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("ptx");
    let mut files: Vec<_> = fs::read_dir(&folder)
        .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
        .unwrap_or_default();
    files.sort();
    let mut list = String::from("&[\n");
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let Some((module, target)) =
            name.strip_suffix(".ptx").and_then(|name| name.rsplit_once(".sm"))
        else {
            continue;
        };
        let target: u32 = target.parse().expect("a target as in experts.sm80.ptx");
        writeln!(list, "({module:?}, {target}, include_str!({:?})),", file.display()).unwrap();
    }
    list.push_str("]\n");
    fs::write(Path::new(&env::var("OUT_DIR").unwrap()).join("ptx.rs"), list).unwrap();
}
