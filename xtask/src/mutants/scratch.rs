//! The copy of the tracked files in which bugs are seeded, and `cargo test`
//! in it.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

pub struct Scratch {
    folder: PathBuf,
}

/// What a test command came to.
pub enum Ran {
    /// In so much time, without the build.
    Passed(Duration),
    Failed {
        /// Names of the tests that failed, or none if their program crashed.
        tests: Vec<String>,
        words: String,
    },
    /// With the compiler's words.
    DoesNotBuild(String),
    TimedOut,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

impl Scratch {
    /// Brings the copy of `root` in `folder` up to date. Files that are the
    /// same are left alone, so that cargo need not build them again.
    ///
    /// Errors, in words: git or a file refuses.
    pub fn new(root: &Path, folder: &Path) -> Result<Self, String> {
        fs::create_dir_all(folder).map_err(failed(folder))?;
        let folder = folder.canonicalize().map_err(failed(folder))?;
        let scratch = Self { folder };
        let tracked = tracked(root)?;
        for name in files_under(&scratch.tree()).difference(&tracked) {
            let path = scratch.tree().join(name);
            fs::remove_file(&path).map_err(failed(&path))?;
        }
        for name in &tracked {
            let from = root.join(name);
            let bytes = match fs::read(&from) {
                Ok(bytes) => bytes,
                // Deleted, and git was not told yet.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(&from)(error)),
            };
            let to = scratch.tree().join(name);
            if fs::read(&to).is_ok_and(|present| present == bytes) {
                continue;
            }
            let parent = to.parent().expect("a file lies in a folder");
            fs::create_dir_all(parent).map_err(failed(parent))?;
            fs::write(&to, bytes).map_err(failed(&to))?;
        }
        Ok(scratch)
    }

    fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    pub fn read(&self, name: &str) -> Result<String, String> {
        let path = self.tree().join(name);
        fs::read_to_string(&path).map_err(failed(&path))
    }

    pub fn write(&self, name: &str, text: &str) -> Result<(), String> {
        let path = self.tree().join(name);
        fs::write(&path, text).map_err(failed(&path))
    }

    pub fn remove(self) -> Result<(), String> {
        fs::remove_dir_all(&self.folder).map_err(failed(&self.folder))
    }

    /// Builds the tests that `arguments` name, however long that takes, and
    /// runs them for at most `limit`.
    pub fn test(&self, arguments: &[String], limit: Option<Duration>) -> Result<Ran, String> {
        let (status, _, words) = self.cargo(&["--no-run"], arguments, None)?;
        if !status.is_some_and(|status| status.success()) {
            return Ok(Ran::DoesNotBuild(words));
        }
        let start = Instant::now();
        let (status, output, words) = self.cargo(&[], arguments, limit)?;
        Ok(match status {
            None => Ran::TimedOut,
            Some(status) if status.success() => Ran::Passed(start.elapsed()),
            Some(_) => Ran::Failed { tests: failures(&output), words: output + &words },
        })
    }

    /// Exit status (`None`: it ran past `limit` and was ended), output, and
    /// errors of `cargo test`.
    fn cargo(
        &self,
        first: &[&str],
        arguments: &[String],
        limit: Option<Duration>,
    ) -> Result<(Option<ExitStatus>, String, String), String> {
        // Files, since nobody empties pipes while this waits.
        let outputs = ["stdout", "stderr"].map(|name| self.folder.join(name));
        let file = |path: &PathBuf| File::create(path).map_err(failed(path));
        let mut command = Command::new("cargo");
        command
            .args(["test", "--locked", "--quiet"])
            .args(first)
            .args(arguments)
            .current_dir(self.tree())
            .env("CARGO_TARGET_DIR", self.folder.join("target"))
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(file(&outputs[0])?)
            .stderr(file(&outputs[1])?);
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(|error| format!("cargo: {error}"))?;
        let status = wait(child, limit).map_err(|error| format!("cargo: {error}"))?;
        let read = |path: &PathBuf| {
            let bytes = fs::read(path).map_err(failed(path))?;
            Ok::<_, String>(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok((status, read(&outputs[0])?, read(&outputs[1])?))
    }
}

/// `None`: ended after `limit`, with the programs that it had started. Time is
/// counted in naps: a machine or a terminal that was paused is no hang.
fn wait(mut child: Child, limit: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    const NAP: Duration = Duration::from_millis(20);
    let mut slept = Duration::ZERO;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if limit.is_some_and(|limit| slept > limit) {
            // It leads a group of its own, in which the tests run.
            #[cfg(unix)]
            Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).status()?;
            #[cfg(not(unix))]
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        sleep(NAP);
        slept += NAP;
    }
}

/// The names in the last list of failures that each test program prints.
fn failures(output: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for list in output.split("failures:\n").skip(1) {
        let lines = list.lines().map_while(|line| line.strip_prefix("    "));
        for name in lines.filter(|name| !name.starts_with(' ')) {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_string());
            }
        }
    }
    names
}

/// What git keeps of `root`, with changes that are not committed.
fn tracked(root: &Path) -> Result<BTreeSet<PathBuf>, String> {
    let git = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output();
    let git = git.map_err(|error| format!("git: {error}"))?;
    if !git.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&git.stderr)));
    }
    let names = String::from_utf8_lossy(&git.stdout);
    Ok(names.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect())
}

/// All files below `folder`, relative to it; none if it is not there.
fn files_under(folder: &Path) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(name) = path.strip_prefix(folder) {
                files.insert(name.to_path_buf());
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_failed_tests_are_read_from_the_output() {
        let output = "running 3 tests\n..F\nfailures:\n\n---- a::b stdout ----\n\
                      thread panicked\n    left: 1\n\nfailures:\n    a::b\n    c\n\n\
                      test result: FAILED. 1 passed\n\nfailures:\n    c\n\ntest result: FAILED\n";
        assert_eq!(failures(output), ["a::b", "c"]);
        assert_eq!(failures("running 1 test\nfailures: none\n"), [""; 0]);
    }

    #[cfg(unix)]
    #[test]
    fn a_hang_ends_with_everything_that_it_started() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 60 & echo $!; wait"]).stdout(Stdio::piped());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let start = Instant::now();
        assert!(wait(child, Some(Duration::from_millis(300))).unwrap().is_none());
        // Ends when the last process that could write is gone.
        let mut pid = String::new();
        io::Read::read_to_string(&mut output, &mut pid).unwrap();
        assert!(pid.trim().parse::<u32>().is_ok(), "{pid:?}");
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
