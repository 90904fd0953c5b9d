//! Compresses and lists the checked-in PTX (`ptx/<module>.sm<target>.ptx`), so
//! that the program carries whatever is there, in a fifth of its size.

use flate2::{Compression, write::ZlibEncoder};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=ptx");
    println!("cargo::rerun-if-changed=build.rs");
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("ptx");
    let out = env::var("OUT_DIR").unwrap();
    let out = Path::new(&out);
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
        let text = fs::read(&file).unwrap();
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::best());
        packed.write_all(&text).unwrap();
        let place = out.join(format!("{name}.zz"));
        fs::write(&place, packed.finish().unwrap()).unwrap();
        writeln!(list, "({module:?}, {target}, include_bytes!({:?})),", place.display()).unwrap();
    }
    list.push_str("]\n");
    fs::write(out.join("ptx.rs"), list).unwrap();
}
