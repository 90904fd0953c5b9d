//! Keeps `docs/architecture.md` true: the arrows between the crates, the
//! list of files with `unsafe`, and the packages that were asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The names under `[dependencies]` of a manifest, and under every other
/// dependency table that takes part in a normal build.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(manifest)).unwrap();
    let mut inside = false;
    let mut names = BTreeSet::new();
    for line in text.lines() {
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            inside = table.ends_with("dependencies")
                && !table.contains("dev-dependencies")
                && !table.contains("workspace.");
        } else if inside && let Some((name, _)) = line.split_once(['=', '.']) {
            names.insert(name.trim().to_string());
        }
    }
    names
}

#[test]
fn arrows_between_the_crates_are_the_drawn_ones() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("kernels", &[][..]),
        ("kernels/standin", &["pregate-kernels"]),
        ("predictor", &[]),
        ("runtime", &["pregate-kernels", "pregate-predictor"]),
        ("traces", &["pregate-predictor"]),
        ("", &["pregate-kernels", "pregate-predictor", "pregate-runtime", "pregate-traces"]),
        ("xtask", &[]),
    ]);
    for (folder, arrows) in allowed {
        let manifest = Path::new(folder).join("Cargo.toml");
        let found = dependencies(manifest.to_str().unwrap());
        for name in found.iter().filter(|name| name.starts_with("pregate")) {
            assert!(arrows.contains(&name.as_str()), "{folder}/Cargo.toml points at {name}");
        }
    }
    let predictor = dependencies("predictor/Cargo.toml");
    let allowed = ["lru", "crc32fast"].map(str::to_string);
    assert_eq!(predictor, BTreeSet::from(allowed), "predictor is decisions only");
}

/// All Rust files of the workspace, relative to its root.
fn sources() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        ["chat", "runtime", "predictor", "kernels", "traces", "xtask", "tests", "benches"]
            .map(|name| root().join(name))
            .into_iter()
            .filter(|path| path.is_dir())
            .collect();
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path.strip_prefix(root()).unwrap().to_path_buf());
            }
        }
    }
    assert!(files.len() > 50, "only {} source files", files.len());
    files
}

/// Code without comments and string contents, so that words in prose do not
/// count.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(root().join(path)).unwrap();
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .map(|line| line.split('"').step_by(2).collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join("\n")
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word)
}

#[test]
fn unsafe_stays_in_the_named_files() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let section = page.split("## Unsafe code").nth(1).unwrap().split("\n## ").next().unwrap();
    let named: Vec<&str> =
        section.split('`').skip(1).step_by(2).filter(|text| text.contains('/')).collect();
    assert!(!named.is_empty());
    for path in sources() {
        let text = path.to_str().unwrap();
        // A named folder allows the files in it.
        let allowed =
            named.iter().any(|name| text == *name || name.ends_with('/') && text.starts_with(name));
        assert!(
            allowed || !has_word(&code(&path), "unsafe"),
            "{text} has unsafe code and is not named in docs/architecture.md"
        );
    }
    for name in &named {
        assert!(root().join(name).exists(), "docs/architecture.md names {name}, which is gone");
    }
}

#[test]
fn the_library_is_quiet() {
    let is_library = |path: &PathBuf| {
        ["runtime/src", "kernels/src", "predictor/src", "traces/src"]
            .iter()
            .any(|folder| path.starts_with(folder))
    };
    for path in sources().iter().filter(|path| is_library(path)) {
        let text = code(path);
        for macro_name in
            ["println!", "eprintln!", "print!", "eprint!", "dbg!", "todo!", "unimplemented!"]
        {
            assert!(!text.contains(macro_name), "{}: {macro_name}", path.display());
        }
        for call in ["env::var", "process::exit", "static mut"] {
            assert!(!text.contains(call), "{}: {call}", path.display());
        }
    }
}
