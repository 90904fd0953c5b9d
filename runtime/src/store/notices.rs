//! Which notices were told already.

use super::mover::Notice;
use std::{
    mem::{Discriminant, discriminant},
    path::PathBuf,
};

/// A slow disk is slow for every read; the user hears it once for each file.
#[derive(Default)]
pub(super) struct Told(Vec<(Discriminant<Notice>, PathBuf)>);

impl Told {
    /// Is `notice` the first of its kind about its file? Remembers it.
    pub fn is_new(&mut self, notice: &Notice) -> bool {
        let kind = discriminant(notice);
        let is_new = !self.0.iter().any(|(told, file)| *told == kind && file == notice.file());
        if is_new {
            self.0.push((kind, notice.file().to_path_buf()));
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_once_for_each_file() {
        let slow = |file: &str, offset| Notice::Slow { file: file.into(), offset };
        let mut told = Told::default();
        assert!(told.is_new(&slow("a", 0)));
        assert!(!told.is_new(&slow("a", 4096)));
        assert!(told.is_new(&slow("b", 0)));
        assert!(told.is_new(&Notice::Replaced { file: "a".into() }));
        assert!(!told.is_new(&Notice::Replaced { file: "a".into() }));
    }
}
