//! Seeded bugs that the tests must find: `cargo xtask mutants`.
//!
//! The lists lie in `tools/mutants/`. Each bug is one text of one file that is
//! replaced in a copy of the tracked files; then the tests that the bug names
//! are run, and one of them has to fail. A bug that survives is a hole in the
//! tests; a text that is gone means that the code has moved on and the list has
//! not. Either makes the command fail.

mod list;
mod scratch;

use list::{Bug, List};
use scratch::{Ran, Scratch};
use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What the user asked for.
#[derive(Default, Debug)]
pub struct Options {
    /// Bugs whose name, file or list contains this.
    only: String,
    list: bool,
    /// The scratch folder stays, so that the next run builds less.
    keep: bool,
    scratch: Option<PathBuf>,
}

impl Options {
    /// Errors: words that are no option.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--only" => options.only = value()?,
                "--scratch" => options.scratch = Some(value()?.into()),
                "--list" => options.list = true,
                "--keep" => options.keep = true,
                _ => return Err(format!("{word}: no such option")),
            }
        }
        Ok(options)
    }
}

/// What became of a bug.
#[derive(PartialEq, Eq, Debug)]
enum Fate {
    /// By these tests, or a crash or a hang.
    Killed(String),
    Survived,
    DoesNotBuild,
    /// Its text occurs so many times, not once.
    Found(usize),
}

impl Fate {
    fn words(&self) -> String {
        match self {
            Self::Killed(by) => by.clone(),
            Self::Survived => "SURVIVED".into(),
            Self::DoesNotBuild => "DOES NOT BUILD".into(),
            Self::Found(0) => "TEXT NOT FOUND".into(),
            Self::Found(times) => format!("TEXT FOUND {times} TIMES"),
        }
    }
}

/// Runs the bugs of `root/tools/mutants`; whether all were killed.
///
/// Errors, in words: lists that make no sense, tests that fail without any
/// bug, a scratch folder that cannot be written.
pub fn run(root: &Path, options: Options) -> Result<bool, String> {
    let mut lists = list::read(&root.join("tools/mutants"))?;
    for list in &mut lists {
        let is_meant = |text: &String| text.contains(&options.only);
        let name = list.name.clone();
        list.bugs.retain(|bug| [&name, &bug.name, &bug.file].into_iter().any(is_meant));
    }
    let bugs: Vec<(&List, &Bug)> =
        lists.iter().flat_map(|list| list.bugs.iter().map(move |bug| (list, bug))).collect();
    if options.list {
        bugs.iter().for_each(|(_, bug)| println!("{:44}  {}", bug.file, bug.name));
        println!("{} bugs", bugs.len());
        return Ok(true);
    }
    if bugs.is_empty() {
        return Err(format!("no bug has {:?} in its name, file or list", options.only));
    }
    let target = env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let folder = options.scratch.unwrap_or(target.join("mutants"));
    let scratch = Scratch::new(root, &folder)?;
    let limits = without_bugs(&scratch, &bugs)?;
    let start = Instant::now();
    let mut fates = Vec::new();
    for (list, bug) in &bugs {
        eprint!("[{:>2}/{}] {} ... ", fates.len() + 1, bugs.len(), bug.name);
        let since = Instant::now();
        let fate = seed(&scratch, list, bug, &limits)?;
        eprintln!("{} ({:.0} s)", fate.words(), since.elapsed().as_secs_f64());
        fates.push((bug, fate));
    }
    if !options.keep {
        scratch.remove()?;
    }
    table(&fates);
    let killed = fates.iter().filter(|(_, fate)| matches!(fate, Fate::Killed(_))).count();
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    println!("\n{killed} of {} bugs killed, {minutes:.0} minutes", fates.len());
    Ok(killed == fates.len())
}

/// How long each test command may take, by its arguments.
type Limits = BTreeMap<Vec<String>, Duration>;

/// Runs every test command that the bugs name on the sources as they are. A
/// mutant gets three times as long, and a minute.
fn without_bugs(scratch: &Scratch, bugs: &[(&List, &Bug)]) -> Result<Limits, String> {
    let mut limits = Limits::new();
    for (list, bug) in bugs {
        for arguments in list.commands(bug) {
            if limits.contains_key(arguments) {
                continue;
            }
            eprint!("no bug: cargo test {} ... ", arguments.join(" "));
            match scratch.test(arguments, None)? {
                Ran::Passed(took) => {
                    eprintln!("passes ({:.0} s)", took.as_secs_f64());
                    limits.insert(arguments.clone(), 3 * took + Duration::from_secs(60));
                }
                Ran::DoesNotBuild(words) | Ran::Failed { words, .. } => {
                    return Err(format!("the tests fail without any bug:\n{words}"));
                }
                Ran::TimedOut => unreachable!("no limit was given"),
            }
        }
    }
    Ok(limits)
}

/// Puts `bug` into the copy, runs its tests, and takes it out again.
fn seed(scratch: &Scratch, list: &List, bug: &Bug, limits: &Limits) -> Result<Fate, String> {
    let original = scratch.read(&bug.file)?;
    let times = original.matches(&bug.text).count();
    if times != 1 {
        return Ok(Fate::Found(times));
    }
    scratch.write(&bug.file, &original.replace(&bug.text, &bug.replacement))?;
    let fate = judge(scratch, list, bug, limits);
    scratch.write(&bug.file, &original)?;
    fate
}

fn judge(scratch: &Scratch, list: &List, bug: &Bug, limits: &Limits) -> Result<Fate, String> {
    for arguments in list.commands(bug) {
        match scratch.test(arguments, limits.get(arguments).copied())? {
            Ran::Passed(_) => {}
            Ran::DoesNotBuild(words) => {
                eprintln!("{words}");
                return Ok(Fate::DoesNotBuild);
            }
            Ran::TimedOut => return Ok(Fate::Killed("a hang".into())),
            Ran::Failed { tests, .. } if tests.is_empty() => {
                return Ok(Fate::Killed("a crash".into()));
            }
            Ran::Failed { tests, .. } => return Ok(Fate::Killed(some(&tests))),
        }
    }
    Ok(Fate::Survived)
}

/// The first two of `tests`, and how many more.
fn some(tests: &[String]) -> String {
    match tests {
        [first, second, rest @ ..] if !rest.is_empty() => {
            format!("{first}, {second} and {} more", rest.len())
        }
        _ => tests.join(", "),
    }
}

fn table(fates: &[(&&Bug, Fate)]) {
    let width = |text: fn(&Bug) -> &str| {
        fates.iter().map(|(bug, _)| text(bug).chars().count()).max().unwrap_or(0)
    };
    let (names, files) = (width(|bug| &bug.name), width(|bug| &bug.file));
    println!("\n{:names$}  {:files$}  killed by", "bug", "file");
    for (bug, fate) in fates {
        println!("{:names$}  {:files$}  {}", bug.name, bug.file, fate.words());
    }
}
