//! Files that appear whole or not at all: written beside their place, then
//! renamed. What is no regular file (a device, a pipe) is written as it is.

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
/// file stays as it was. Of a link the target is replaced.
pub fn write_whole(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    let failed = |source| Failure::io(path.display().to_string(), source);
    let Place::File { file, temporary } = place(path)? else {
        return OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut to| fill(&mut to))
            .map_err(failed);
    };
    let written = (|| {
        let mut to = create_new(&temporary)?;
        let mut buffered = io::BufWriter::new(&mut to);
        fill(&mut buffered)?;
        buffered.flush()?;
        drop(buffered);
        to.sync_all()?;
        fs::rename(&temporary, file)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        failed(error)
    })
}

/// Whether [`write_whole`] could write there, as far as that is known before:
/// to be asked ahead of long work.
pub fn check_place(path: &Path) -> Result<(), Failure> {
    let Place::File { temporary, .. } = place(path)? else { return Ok(()) };
    create_new(&temporary)
        .and_then(|_| fs::remove_file(&temporary))
        .map_err(|source| Failure::io(path.display().to_string(), source))
}

enum Place {
    /// A file that is there or not, and where it is written first.
    File { file: PathBuf, temporary: PathBuf },
    /// Renaming would put a file into its place.
    Device,
}

fn place(path: &Path) -> Result<Place, Failure> {
    let failed = |source| Failure::io(path.display().to_string(), source);
    let file = match fs::metadata(path) {
        Ok(found) if found.is_file() => path.canonicalize().map_err(failed)?,
        Ok(found) if !found.is_dir() => return Ok(Place::Device),
        Ok(_) => return Err(no_name(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_path_buf(),
        Err(error) => return Err(failed(error)),
    };
    let temporary = temporary_path(&file).ok_or_else(|| no_name(path))?;
    Ok(Place::File { file, temporary })
}

fn no_name(path: &Path) -> Failure {
    Failure::Usage(format!("{}: a file name is needed, not a folder", path.display()))
}

fn create_new(path: &Path) -> io::Result<fs::File> {
    OpenOptions::new().write(true).create_new(true).open(path)
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
    fn devices_are_written_and_links_stay_links() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let write = |path: &Path| write_whole(path, |out| out.write_all(b"new"));
        assert!(matches!(write(folder.path()), Err(Failure::Usage(_))));
        assert!(matches!(check_place(folder.path()), Err(Failure::Usage(_))));
        assert!(check_place(&at("no/such")).is_err());
        check_place(&at("new")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
        #[cfg(unix)]
        {
            fs::write(at("old"), "old").unwrap();
            std::os::unix::fs::symlink(at("old"), at("link")).unwrap();
            write(&at("link")).unwrap();
            assert_eq!(fs::read_to_string(at("old")).unwrap(), "new");
            assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
            // A socket is no regular file, and nobody else's.
            let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
            assert!(write(&at("socket")).is_err());
            assert!(!fs::symlink_metadata(at("socket")).unwrap().is_file());
        }
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
