//! `docs/kernels.md`: `cargo xtask kernels [--check]`.
//!
//! What every kernel takes of a multiprocessor (from `kernels/ptx/ptxas.toml`)
//! and how many blocks fit; and for the steps of decoding with six models what
//! each launch must move, and which share of the memory's bandwidth a stated
//! model predicts for it.

mod limits;
mod page;
mod shapes;

use crate::ptx::{TABLE, Table};
use std::{fs, path::Path};

const PAGE: &str = "docs/kernels.md";

/// `check`: compare with the page instead of writing it. Whether all is well.
///
/// Errors, in words: the table of registers is missing or does not have a
/// kernel that a step names, a file cannot be written.
pub fn run(root: &Path, check: bool) -> Result<bool, String> {
    let failed = |what: &str| {
        let what = what.to_string();
        move |error: std::io::Error| format!("{what}: {error}")
    };
    let table = Table::parse(&fs::read_to_string(root.join(TABLE)).map_err(failed(TABLE))?)?;
    let text = page::text(&table)?;
    let path = root.join(PAGE);
    if !check {
        fs::write(&path, text).map_err(failed(PAGE))?;
        println!("{PAGE} is written");
        return Ok(true);
    }
    let is_same = fs::read_to_string(&path).map_err(failed(PAGE))? == text;
    match is_same {
        true => println!("{PAGE} is up to date"),
        false => println!("{PAGE} is out of date: `cargo xtask kernels` writes it"),
    }
    Ok(is_same)
}
