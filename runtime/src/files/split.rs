//! GGUF models in several files, as `llama-gguf-split` and gguf-py write
//! them: `NAME-00001-of-00003.gguf`, with the keys `split.no` (from zero),
//! `split.count` and `split.tensors.count` in each.

use super::{folder::MAX_SHARDS, metadata::Metadata};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// The parts of a shard's file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ShardName {
    /// Folder and name up to `-00001-of-00003.gguf`.
    folder: PathBuf,
    stem: String,
    /// From one.
    pub number: usize,
    pub count: usize,
}

impl ShardName {
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let five_digits = |text: &str| {
            let fits = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
            fits.then(|| text.parse::<usize>().ok()).flatten()
        };
        Some(Self {
            folder: path.parent().map(Path::to_path_buf).unwrap_or_default(),
            stem: stem.to_string(),
            number: five_digits(number)?,
            count: five_digits(count)?,
        })
    }

    fn path(&self, number: usize) -> PathBuf {
        self.folder.join(format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count))
    }
}

/// How many files the model of `metadata` has.
pub(super) fn count(metadata: &Metadata) -> Result<usize> {
    let count = metadata.unsigned(COUNT)?.unwrap_or(1).max(1);
    match usize::try_from(count) {
        Ok(count) if count <= MAX_SHARDS => Ok(count),
        _ => Err(metadata.invalid(COUNT, count.to_string(), format!("at most {MAX_SHARDS}"))),
    }
}

/// The paths of all shards of the model that `path`, one of `count`, is part
/// of.
pub(super) fn paths(path: &Path, count: usize) -> Result<Vec<PathBuf>> {
    let shard = ShardName::of(path).filter(|shard| shard.count == count);
    let Some(shard) = shard else {
        return Err(Error::invalid(
            path,
            None,
            "file name",
            "the name of an unsplit file",
            format!("NAME-00001-of-{count:05}.gguf: its keys say that it is one of {count} shards"),
        ));
    };
    let paths: Vec<PathBuf> = (1..=count).map(|number| shard.path(number)).collect();
    match paths.iter().position(|path| !path.exists()) {
        None => Ok(paths),
        Some(missing) => Err(Error::invalid(
            &paths[missing],
            None,
            "shard",
            "no such file",
            format!("all {count} shards of the model in one folder; get this one as well"),
        )),
    }
}

/// Checks shard `index` (from zero) of `count` against the first.
pub(super) fn check(
    metadata: &Metadata,
    index: usize,
    count: usize,
    first: &Metadata,
) -> Result<()> {
    let expect = |key: &str, allowed: usize| {
        let found = metadata.unsigned(key)?;
        if found == Some(allowed as u64) {
            return Ok(());
        }
        let found = found.map_or("nothing".to_string(), |found| found.to_string());
        Err(metadata.invalid(key, found, format!("{allowed}, as the file's name says")))
    };
    expect(NUMBER, index)?;
    expect(COUNT, count)?;
    for (key, value) in metadata.iter() {
        // The first shard has all keys of the model, the others some or none.
        let differs = match first.get(key) {
            Some(expected) => value != expected,
            None => key.starts_with("general.") && key != "general.alignment",
        };
        if differs && key != NUMBER && key != "general.alignment" {
            return Err(metadata.invalid(
                key,
                "another value than in the first shard",
                "shards of one model",
            ));
        }
    }
    Ok(())
}

/// Checks that the shards together hold as many tensors as the first says.
pub(super) fn check_tensor_count(first: &Metadata, found: usize) -> Result<()> {
    match first.unsigned(TENSORS)? {
        Some(expected) if expected != found as u64 => Err(first.invalid(
            TENSORS,
            expected.to_string(),
            format!("{found}, the number of tensors in the shards"),
        )),
        _ => Ok(()),
    }
}
