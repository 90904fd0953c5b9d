//! Files that appear whole or not at all: written beside their place, then
//! renamed.

use crate::{
    engine::{Message, Role},
    exit::Failure,
};
use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Writes through `fill` to a temporary file in the folder of `path`, syncs
/// it and renames it. On any error nothing is left behind and an existing
/// file stays as it was.
pub fn write_whole(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    let failed = |source| Failure::io(path.display().to_string(), source);
    let temporary = temporary_path(path).ok_or_else(|| {
        Failure::Usage(format!("{}: a file name is needed, not a folder", path.display()))
    })?;
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        let mut buffered = io::BufWriter::new(&mut file);
        fill(&mut buffered)?;
        buffered.flush()?;
        drop(buffered);
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        failed(error)
    })
}

/// Whether two names are of one file, which then is there.
pub fn is_same_file(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    let is_one = real(one).is_some_and(|one| real(other) == Some(one));
    is_one || is_same_link(one, other).unwrap_or(false)
}

/// Hard links are two names of one file.
#[cfg(unix)]
fn is_same_link(one: &Path, other: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (one, other) = (fs::metadata(one)?, fs::metadata(other)?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

#[cfg(not(unix))]
fn is_same_link(_: &Path, _: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Refuses to write to `out` where that is one of the files that are read:
/// creating it would empty them first. `what` they are: "the trace that is
/// read".
pub fn refuse_same<'p>(
    out: &Path,
    inputs: impl IntoIterator<Item = &'p Path>,
    what: &str,
) -> Result<(), Failure> {
    match inputs.into_iter().any(|input| is_same_file(out, input)) {
        true => Err(Failure::Usage(format!("{} is {what}; another name is needed", out.display()))),
        false => Ok(()),
    }
}

fn temporary_path(path: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(".");
    name.push(path.file_name()?);
    name.push(format!(".{}.tmp", std::process::id()));
    Some(path.with_file_name(name))
}

/// Saves a conversation as Markdown.
pub fn conversation(path: &Path, replace: bool, messages: &[Message]) -> Result<(), Failure> {
    if !replace && path.symlink_metadata().is_ok() {
        return Err(Failure::Usage(format!(
            "{} exists; /save! {} replaces it",
            path.display(),
            path.display()
        )));
    }
    write_whole(path, |out| {
        for message in messages {
            let heading = match message.role {
                Role::System => "System",
                Role::User => "You",
                Role::Assistant => "Pregate",
            };
            writeln!(out, "## {heading}\n\n{}\n", message.content)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_temporary_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chat.md");
        fs::write(&file, "old").unwrap();
        let result = write_whole(&file, |out| {
            out.write_all(b"new")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(result.is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_read_is_not_written_by_any_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("model"), "weights").unwrap();
        fs::hard_link(at("model"), at("hard")).unwrap();
        fs::write(at("other"), "").unwrap();
        let refused = |out: &str| {
            let inputs = [at("other"), at("model")];
            refuse_same(&at(out), inputs.iter().map(PathBuf::as_path), "what is read").is_err()
        };
        for name in ["model", "hard", "./model", "other"] {
            assert!(refused(name), "{name}");
        }
        assert!(!refused("new"));
        fs::write(at("old"), "").unwrap();
        assert!(!refused("old"), "an older file of the user's may be replaced");
    }

    #[test]
    fn an_existing_file_is_replaced_only_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chat.md");
        let messages = [Message::new(Role::User, "hi"), Message::new(Role::Assistant, "ls -S")];
        conversation(&file, false, &messages).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "## You\n\nhi\n\n## Pregate\n\nls -S\n\n");
        let refused = conversation(&file, false, &messages[..1]).unwrap_err();
        assert!(refused.to_string().contains("/save!"), "{refused}");
        conversation(&file, true, &messages[..1]).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "## You\n\nhi\n\n");
    }
}
