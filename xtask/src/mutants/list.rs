//! Lists of seeded bugs.
//!
//! ```toml
//! # Arguments of `cargo test`, by a name of their own.
//! [tests]
//! slots = "-p pregate-runtime --test loom_slots"
//!
//! [[bug]]
//! name = "a pinned slot is claimed"
//! file = "runtime/src/store/slot.rs"
//! tests = ["slots"]         # asked in this order until one fails
//! text = '''...'''          # occurs once in the file
//! replacement = '''...'''
//! ```

use serde::Deserialize;
use std::{collections::BTreeMap, fs, path::Path};

/// One file of bugs.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct File {
    tests: BTreeMap<String, String>,
    /// None in a list that was only begun.
    #[serde(rename = "bug", default)]
    bugs: Vec<Bug>,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Bug {
    pub name: String,
    /// Relative to the root of the repository.
    pub file: String,
    pub tests: Vec<String>,
    pub text: String,
    pub replacement: String,
}

/// A file of bugs, checked.
#[derive(Debug)]
pub struct List {
    /// Of its file.
    pub name: String,
    tests: BTreeMap<String, Vec<String>>,
    /// In their file's order, those of one crate together.
    pub bugs: Vec<Bug>,
}

impl List {
    /// Arguments of `cargo test` for the tests that `bug` names.
    pub fn commands<'a>(&'a self, bug: &'a Bug) -> impl Iterator<Item = &'a Vec<String>> {
        bug.tests.iter().map(|name| &self.tests[name])
    }
}

/// All lists of `folder`, by name. Errors, in words: what is wrong and where.
pub fn read(folder: &Path) -> Result<Vec<List>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let entries = fs::read_dir(folder).map_err(failed)?;
    let mut paths =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>();
    let paths = paths.as_mut().map_err(|error| format!("{}: {error}", folder.display()))?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    let list = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let text = fs::read_to_string(path).map_err(|error| error.to_string());
        text.and_then(|text| parse(&name, &text))
            .map_err(|error| format!("{}: {error}", path.display()))
    };
    paths.iter().map(list).collect()
}

fn parse(name: &str, text: &str) -> Result<List, String> {
    let mut file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    let words = |text: String| text.split_whitespace().map(str::to_string).collect();
    let tests = file.tests.into_iter().map(|(name, text)| (name, words(text))).collect();
    let crate_of = |bug: &Bug| bug.file.split('/').next().map(str::to_string);
    file.bugs.sort_by_cached_key(crate_of);
    let list = List { name: name.to_string(), tests, bugs: file.bugs };
    for (index, bug) in list.bugs.iter().enumerate() {
        let name = &bug.name;
        if bug.tests.is_empty() {
            return Err(format!("{name:?} names no tests"));
        }
        if let Some(test) = bug.tests.iter().find(|test| !list.tests.contains_key(*test)) {
            return Err(format!("{name:?} names {test:?}, which is not in [tests]"));
        }
        if bug.text.is_empty() || bug.text == bug.replacement {
            return Err(format!("{name:?} changes nothing"));
        }
        if list.bugs[..index].iter().any(|other| other.name == *name) {
            return Err(format!("{name:?} is there twice"));
        }
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bug(name: &str, test: &str, replacement: &str) -> String {
        format!(
            "[[bug]]\nname = '{name}'\nfile = 'runtime/a.rs'\ntests = ['{test}']\ntext = 'a'\n\
             replacement = '{replacement}'\n"
        )
    }

    fn parsed(bugs: &[String]) -> Result<List, String> {
        parse("a.toml", &format!("[tests]\nslots = '-p  x --lib'\n{}", bugs.concat()))
    }

    #[test]
    fn tests_are_named_and_cut_into_words() {
        let list = parsed(&[bug("one", "slots", "b"), bug("two", "slots", "")]).unwrap();
        let commands: Vec<_> = list.commands(&list.bugs[1]).collect();
        assert_eq!(commands, [&["-p", "x", "--lib"]]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (bugs, word) in [
            (vec![bug("one", "other", "b")], "not in [tests]"),
            (vec![bug("one", "slots", "a")], "changes nothing"),
            (vec![bug("one", "slots", "b"), bug("one", "slots", "c")], "twice"),
            (vec!["[[bug]]\nname = 'one'\n".into()], "missing field"),
        ] {
            let error = parsed(&bugs).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    /// The text of every bug is where the list says; that the tests find it
    /// takes `cargo xtask mutants`.
    #[test]
    fn the_repositorys_lists_fit_its_sources() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let lists = read(&root.join("tools/mutants")).unwrap();
        assert!(lists.len() > 1, "{lists:?}");
        for bug in lists.iter().flat_map(|list| &list.bugs) {
            let text = fs::read_to_string(root.join(&bug.file)).unwrap_or_default();
            assert_eq!(text.matches(&bug.text).count(), 1, "{} in {}", bug.name, bug.file);
        }
    }
}
