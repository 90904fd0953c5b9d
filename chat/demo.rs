//! Where the demo model lies.

use crate::exit::Failure;
use std::path::{Path, PathBuf};

const FILE: &str = "pregate-demo.gguf";

/// Questions that the demo model answers well.
pub const EXAMPLES: [&str; 3] =
    ["extract a tar.gz archive", "find files larger than 100 MB", "undo the last git commit"];

/// The demo model beside the program (where an archive or a package puts
/// it), else in the source tree that the program was built from.
pub fn find() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe().ok();
    let places = places(program.as_deref().and_then(Path::parent));
    places.iter().find(|place| place.is_file()).cloned().ok_or_else(|| {
        let list: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        Failure::Usage(format!(
            "the demo model was not found; looked for {}; name a model with --model PATH",
            list.join(", ")
        ))
    })
}

fn places(beside: Option<&Path>) -> Vec<PathBuf> {
    let near = beside.into_iter().flat_map(|folder| {
        [
            folder.join(FILE),
            folder.join("models").join(FILE),
            folder.join("../models").join(FILE),
            folder.join("../share/pregate").join(FILE),
        ]
    });
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(FILE);
    near.chain([sources]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_beside_the_program_is_preferred() {
        let places = places(Some(Path::new("/opt/pregate/bin")));
        assert_eq!(places[0], Path::new("/opt/pregate/bin/pregate-demo.gguf"));
        assert!(places.last().unwrap().is_file(), "the repository ships {FILE}");
    }
}
