//! An end on SIGINT that leaves no half of a file.

use crate::{exit::Failure, signals};
use pregate_runtime::Cancel;
use pregate_traces::{Header, Row, Sequence, Source, TraceError, format::Dropped};
use std::{io::ErrorKind, path::PathBuf};

/// Gives `source` to `work`, which reads an error where the user interrupts.
pub fn until_interrupted<T>(
    source: &mut dyn Source,
    work: impl FnOnce(&mut dyn Source) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let cancel = Cancel::new();
    signals::cancel_on_interrupt(cancel.clone())?;
    until(cancel, source, work)
}

fn until<T>(
    cancel: Cancel,
    source: &mut dyn Source,
    work: impl FnOnce(&mut dyn Source) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let done = work(&mut Interruptible { source, cancel: cancel.clone() });
    done.map_err(|failure| if cancel.is_cancelled() { Failure::Interrupted } else { failure })
}

struct Interruptible<'s> {
    source: &'s mut dyn Source,
    cancel: Cancel,
}

impl Source for Interruptible<'_> {
    fn header(&self) -> &Header {
        self.source.header()
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        match self.cancel.is_cancelled() {
            true => {
                let (path, source) = (PathBuf::new(), ErrorKind::Interrupted.into());
                Err(TraceError::Io { path, source })
            }
            false => self.source.next(row),
        }
    }

    fn tokens(&self) -> Option<u64> {
        self.source.tokens()
    }

    fn sequences(&self) -> &[Sequence] {
        self.source.sequences()
    }

    fn notice(&self) -> Option<String> {
        self.source.notice()
    }

    fn dropped(&self) -> Dropped {
        self.source.dropped()
    }

    fn may_end_within_pass(&self) -> bool {
        self.source.may_end_within_pass()
    }

    fn verify(&self) -> Result<(), TraceError> {
        self.source.verify()
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.source.rewind()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_predictor::Shape;
    use pregate_traces::{export, replay::MemoryTrace};
    use std::fs;

    #[test]
    fn an_interrupted_export_leaves_the_older_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("t.pgtrace");
        fs::write(&out, "older").unwrap();
        let mut row = Row::default();
        (row.starts_sequence, row.pass_tokens) = (true, 1);
        row.push_layer(&[1], &[]);
        let header = Header { shape: Shape::uniform(1, 4, 1, 0), ..Header::default() };
        let mut trace = MemoryTrace::new(header, vec![row]);
        let cancel = Cancel::new();
        let export = |cancel: &Cancel, trace: &mut MemoryTrace| {
            until(cancel.clone(), trace, |source| Ok(export::own(source, &out, &mut |_| {})?))
        };
        cancel.cancel();
        assert!(matches!(export(&cancel, &mut trace), Err(Failure::Interrupted)));
        assert_eq!(fs::read(&out).unwrap(), b"older");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(export(&Cancel::new(), &mut trace).unwrap().tokens, 1);
    }
}
