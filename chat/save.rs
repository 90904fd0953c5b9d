//! Files that the user named for output.

use crate::{
    engine::{Message, Role},
    exit::Failure,
};
use pregate_traces::export::Whole;
use std::{
    fs,
    io::{self, Write},
    path::Path,
};

/// Writes through `fill` to a file that appears whole or not at all
/// ([`Whole`]).
pub fn write_whole(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    let mut file = create(path)?;
    fill(&mut file).map_err(|source| Failure::io(path.display().to_string(), source))?;
    Ok(file.commit()?)
}

/// Whether [`write_whole`] could write there, as far as that is known before:
/// to be asked ahead of long work.
pub fn check_place(path: &Path) -> Result<(), Failure> {
    create(path).map(drop)
}

fn create(path: &Path) -> Result<Whole, Failure> {
    if path.is_dir() {
        let what = "a file name is needed, not a folder";
        return Err(Failure::Usage(format!("{}: {what}", path.display())));
    }
    Ok(Whole::create(path)?)
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
    use std::path::PathBuf;

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
