//! JSON files of a model folder, with bounds on size and depth.

use super::mapping;
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::{fs::File, io::Read, path::Path};

/// Deeper nesting than any description of a model has.
const MAX_DEPTH: usize = 64;

/// The content of a small file; refuses anything else than a regular file of
/// at most `most` bytes.
pub(super) fn read_file(path: &Path, most: u64) -> Result<Vec<u8>> {
    let metadata = mapping::stat(path)?;
    mapping::regular_file(path, &metadata)?;
    let too_large = |found: u64| {
        Error::invalid(
            path,
            None,
            "file size",
            format!("{found} bytes or more"),
            format!("at most {most} bytes"),
        )
    };
    if metadata.len() > most {
        return Err(too_large(metadata.len()));
    }
    let io = |action| move |source| Error::Io { file: path.to_path_buf(), action, source };
    let file = File::open(path).map_err(io("open"))?;
    let mut bytes = Vec::new();
    // The file may have grown since; the limit holds all the same.
    let read = file.take(most + 1).read_to_end(&mut bytes).map_err(io("read"))?;
    if read as u64 > most {
        return Err(too_large(read as u64));
    }
    Ok(bytes)
}

/// Parses `text`, which starts at byte `base` of `file`.
pub(super) fn parse<T: DeserializeOwned>(
    file: &Path,
    base: u64,
    what: &str,
    text: &[u8],
) -> Result<T> {
    if let Some(at) = too_deep(text) {
        return Err(Error::invalid(
            file,
            Some(base + at as u64),
            what,
            format!("JSON nested more than {MAX_DEPTH} deep"),
            format!("at most {MAX_DEPTH}"),
        ));
    }
    serde_json::from_slice(text).map_err(|error| {
        let at = base.saturating_add(offset_of(text, error.line(), error.column()));
        Error::invalid(file, Some(at), what, error.to_string(), "JSON of the documented form")
    })
}

/// Where nesting exceeds the limit, if it does.
fn too_deep(text: &[u8]) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, &byte) in text.iter().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Some(at);
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// Byte offset of a line and column as serde_json counts them, from one.
fn offset_of(text: &[u8], line: usize, column: usize) -> u64 {
    let lines = text.split_inclusive(|&byte| byte == b'\n').take(line.saturating_sub(1));
    let before: usize = lines.map(<[u8]>::len).sum();
    before.saturating_add(column.saturating_sub(1)).min(text.len()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_strings_only() {
        let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        let parse =
            |text: &str| parse::<serde_json::Value>(Path::new("c"), 0, "c", text.as_bytes());
        assert!(parse(&nested(64)).is_ok());
        let error = parse(&nested(65)).unwrap_err().to_string();
        assert!(error.contains("at byte 64") && error.contains("at most 64"), "{error}");
        assert!(parse(&format!(r#"["\"{}"]"#, "[".repeat(100))).is_ok());
    }

    #[test]
    fn errors_carry_the_byte_offset() {
        let text = b"{\n \"a\": 1,\n \"b\": x}";
        let error = parse::<serde_json::Value>(Path::new("c"), 100, "config", text).unwrap_err();
        assert!(error.to_string().starts_with("c at byte 117: config: found "), "{error}");
    }
}
