//! Compares the tokenizers built from GGUF metadata with expected ids.
//!
//! `vocab_check FOLDER`: the folder holds `ggml-vocab-*.gguf` with, beside
//! each, `.inp` (texts between `__ggml_vocab_test__` lines) and `.out` (one
//! line of ids per text), as `models/` in llama.cpp's source does. Prints a
//! table, with the time that one word of 100 KB takes; exits with 1 if any
//! text differs.

use pregate_runtime::{
    files::{Container, ModelFiles},
    text::{TextKind, Tokenizer},
};
use std::{fs, path::Path, process::ExitCode, time::Instant};

fn main() -> ExitCode {
    let Some(folder) = std::env::args().nth(1) else {
        eprintln!("usage: vocab_check FOLDER");
        return ExitCode::from(2);
    };
    let mut names: Vec<_> = fs::read_dir(&folder)
        .expect("the folder can be listed")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .collect();
    names.sort();
    let mut all_equal = true;
    println!(
        "{:<28} {:>5} {:>5} {:>6} {:>7}  note",
        "vocabulary", "cases", "equal", "load", "100 KB"
    );
    for path in names {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let start = Instant::now();
        let tokenizer = match open(&path) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                let cases = cases(&path);
                all_equal &= cases.is_none();
                let count = cases.map_or("-".to_string(), |cases| cases.len().to_string());
                let error: String = error.chars().take(200).collect();
                println!("{name:<28} {count:>5} {:>5} {:>6} {:>7}  {error}", "-", "-", "-");
                continue;
            }
        };
        let load = format!("{:.2}s", start.elapsed().as_secs_f64());
        let start = Instant::now();
        let long = tokenizer.encode(&"a".repeat(100_000), TextKind::Plain);
        all_equal &= long.is_ok();
        let long = format!("{:.0}ms", start.elapsed().as_secs_f64() * 1e3);
        let Some(cases) = cases(&path) else {
            let note = "loads; nothing to compare";
            println!("{name:<28} {:>5} {:>5} {load:>6} {long:>7}  {note}", "-", "-");
            continue;
        };
        let mut equal = 0;
        let mut note = tokenizer.kind().to_string();
        for (text, expected) in &cases {
            let found = tokenizer.encode(text, TextKind::Plain).unwrap_or_default();
            if found == *expected {
                equal += 1;
            } else if all_equal || equal + 1 == cases.len() || note == tokenizer.kind() {
                note = difference(&tokenizer, text, &found, expected);
            }
        }
        all_equal &= equal == cases.len();
        println!("{name:<28} {:>5} {equal:>5} {load:>6} {long:>7}  {note}", cases.len());
    }
    if all_equal { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn open(path: &Path) -> Result<Tokenizer, String> {
    let files = ModelFiles::open(path).map_err(|error| error.to_string())?;
    match files.container() {
        Container::Gguf(metadata) => {
            Tokenizer::from_gguf(metadata).map_err(|error| error.to_string())
        }
        Container::HuggingFace { .. } => Err("not a GGUF file".to_string()),
    }
}

fn cases(path: &Path) -> Option<Vec<(String, Vec<u32>)>> {
    let beside = |end: &str| fs::read_to_string(format!("{}.{end}", path.display())).ok();
    let (texts, ids) = (beside("inp")?, beside("out")?);
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let ids = ids.lines().map(|line| {
        line.split_whitespace().map(|id| id.parse().expect("an id")).collect::<Vec<u32>>()
    });
    Some(texts.into_iter().map(str::to_string).zip(ids).collect())
}

fn difference(tokenizer: &Tokenizer, text: &str, found: &[u32], expected: &[u32]) -> String {
    let at = found.iter().zip(expected).take_while(|(left, right)| left == right).count();
    let show = |ids: &[u32]| {
        let few = ids.iter().skip(at).take(4);
        few.map(|&id| format!("{id}{:?}", tokenizer.token_text(id))).collect::<Vec<_>>().join(" ")
    };
    let short: String = text.chars().take(40).collect();
    format!("{short:?} token {at}: got {} expected {}", show(found), show(expected))
}
