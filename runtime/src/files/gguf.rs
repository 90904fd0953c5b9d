//! GGUF files, versions 2 and 3, little-endian.
//!
//! Source: the GGUF specification (`docs/gguf.md` of ggml). Everything that a
//! file says is checked here; tensors come out as ranges that are known to
//! lie inside the file.

use super::{
    ElementType, TensorInfo,
    cursor::Cursor,
    metadata::{Metadata, Value},
    table::TensorTable,
    values,
};
use crate::error::{Error, Result, printable};
use pregate_kernels::Format;
use std::path::Path;

pub const MAGIC: [u8; 4] = *b"GGUF";

const MAX_TENSORS: u64 = 65_536;
const MAX_KEYS: u64 = 65_536;
const MAX_KEY_BYTES: u64 = 64 * 1024;
const MAX_NAME_BYTES: u64 = 256;
const MAX_DIMENSIONS: u32 = 4;
/// For all decoded keys and values; the largest vocabularies take a tenth.
const MAX_METADATA_BYTES: usize = 256 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// The shortest key: its length, one byte, the type, one byte of value.
const LEAST_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
/// The shortest description: name, one dimension, type, offset.
const LEAST_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// What stands before the tensor data of one file.
#[derive(Debug)]
pub struct Header {
    pub version: u32,
    pub metadata: Metadata,
    /// Where the tensor data starts, in bytes.
    pub data_offset: u64,
    /// What a user may want to know and need not act on.
    pub notes: Vec<String>,
}

/// Reads the header of `bytes`, the whole content of `file`, and adds its
/// tensors to `tensors` as those of file number `number`.
///
/// # Errors
/// [`Error::Invalid`] for whatever the specification or our limits rule out,
/// [`Error::Unsupported`] for another version, byte order or tensor type.
pub fn parse(
    file: &Path,
    number: usize,
    bytes: &[u8],
    tensors: &mut TensorTable,
) -> Result<Header> {
    let mut cursor = Cursor::new(file, bytes, MAX_METADATA_BYTES);
    let version = magic_and_version(file, &mut cursor)?;
    let tensor_count = count(&mut cursor, "number of tensors", MAX_TENSORS, LEAST_TENSOR_BYTES)?;
    let key_count = count(&mut cursor, "number of keys", MAX_KEYS, LEAST_KEY_BYTES)?;

    let mut metadata = Metadata::new(file);
    let mut alignment = DEFAULT_ALIGNMENT;
    for _ in 0..key_count {
        key(&mut cursor, &mut metadata, &mut alignment)?;
    }
    let mut described = Vec::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        described.push(description(file, number, &mut cursor)?);
    }

    let (data_offset, end) = place(file, &mut described, cursor.offset(), alignment, bytes.len())?;
    for Described { at, tensor } in described {
        tensors.insert(file, Some(at), tensor)?;
    }
    let mut notes = Vec::new();
    if let Some(trailing) = (bytes.len() as u64).checked_sub(end).filter(|&count| count > 0) {
        notes.push(format!(
            "{}: {trailing} bytes after the last tensor are ignored",
            file.display()
        ));
    }
    Ok(Header { version, metadata, data_offset: data_offset.min(bytes.len() as u64), notes })
}

fn magic_and_version(file: &Path, cursor: &mut Cursor) -> Result<u32> {
    let magic = cursor.take(4, "magic")?;
    if magic != MAGIC {
        return Err(cursor.invalid_at(0, "magic", format!("{magic:02x?}"), "GGUF in ASCII"));
    }
    let version = cursor.u32("version")?;
    let unsupported = |found: String, supported: &str| Error::Unsupported {
        file: file.to_path_buf(),
        what: "GGUF version",
        found,
        supported: supported.to_string(),
    };
    match version {
        2 | 3 => Ok(version),
        // No version is that large, so the bytes are the other way round.
        _ if version.trailing_zeros() >= 16 && version != 0 => Err(unsupported(
            format!("{} in big-endian byte order at byte 4", version.swap_bytes()),
            "little-endian files; convert it, for example with gguf-py's gguf-convert-endian",
        )),
        _ => Err(unsupported(format!("{version} at byte 4"), "2, 3")),
    }
}

/// A 64-bit count of things that take at least `least` bytes each.
fn count(cursor: &mut Cursor, field: &str, limit: u64, least: u64) -> Result<usize> {
    let at = cursor.offset();
    let found = cursor.u64(field)?;
    let room = cursor.left() / least;
    if found > limit.min(room) {
        let allowed = if found > limit {
            format!("at most {limit}")
        } else {
            format!("at most {room}, what the {} bytes left can hold", cursor.left())
        };
        return Err(cursor.invalid_at(at, field, found.to_string(), allowed));
    }
    usize::try_from(found)
        .map_err(|_| cursor.invalid_at(at, field, found.to_string(), "a size of this machine"))
}

/// Reads one key with its value.
fn key(cursor: &mut Cursor, metadata: &mut Metadata, alignment: &mut u64) -> Result<()> {
    let at = cursor.offset();
    let key = cursor.string("key", MAX_KEY_BYTES)?;
    if key.is_empty() {
        return Err(cursor.invalid_at(at, "key", "an empty name", "1 to 65536 bytes"));
    }
    let type_at = cursor.offset();
    let kind = cursor.u32(&key)?;
    if key == ALIGNMENT_KEY && kind != values::UINT32 {
        return Err(cursor.invalid_at(
            type_at,
            &key,
            format!("value type {}", values::type_name(kind)),
            "uint32",
        ));
    }
    let value_at = cursor.offset();
    let value = values::read(cursor, &key, kind)?;
    if key == ALIGNMENT_KEY
        && let Value::Unsigned(found) = value
    {
        if !found.is_power_of_two() || !(8..=65_536).contains(&found) {
            return Err(cursor.invalid_at(
                value_at,
                &key,
                found.to_string(),
                "a power of two from 8 to 65536",
            ));
        }
        *alignment = found;
    }
    // The map and the order hold a copy each.
    cursor.charge(2, key.len() as u64 + 64, "key")?;
    let name = printable(key.clone());
    if !metadata.insert(key, value_at, value) {
        return Err(cursor.invalid_at(at, &name, "a second value for this key", "each key once"));
    }
    Ok(())
}

/// A tensor whose offset still counts from the start of the data.
struct Described {
    /// Where the file describes it.
    at: u64,
    tensor: TensorInfo,
}

fn description(file: &Path, number: usize, cursor: &mut Cursor) -> Result<Described> {
    let at = cursor.offset();
    let name = cursor.string("tensor name", MAX_NAME_BYTES)?;
    if name.is_empty() || name.chars().any(|c| c.is_control() || c == '/' || c == '\\') {
        return Err(cursor.invalid_at(
            at,
            "tensor name",
            format!("{name:?}"),
            "1 to 256 bytes without slashes and control characters",
        ));
    }
    let field = format!("tensor {name}");
    let dimensions_at = cursor.offset();
    let dimensions = cursor.u32(&field)?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(cursor.invalid_at(
            dimensions_at,
            &field,
            format!("{dimensions} dimensions"),
            "1 to 4",
        ));
    }
    let mut shape = Vec::with_capacity(4);
    for _ in 0..dimensions {
        let at = cursor.offset();
        let size = cursor.u64(&field)?;
        let fits = usize::try_from(size).ok().filter(|&size| size > 0 && size <= i64::MAX as usize);
        let Some(size) = fits else {
            return Err(cursor.invalid_at(
                at,
                &field,
                format!("a dimension of {size}"),
                "1 to 2^63 - 1",
            ));
        };
        shape.push(size);
    }
    shape.reverse();
    let type_at = cursor.offset();
    let type_number = cursor.u32(&field)?;
    let Some(format) = Format::from_ggml_type(type_number) else {
        return Err(unsupported_type(file, &name, type_number, type_at));
    };
    let bytes = tensor_bytes(format, &shape).map_err(|problem| {
        let allowed = format!(
            "rows of whole blocks of {}, fewer than 2^63 elements and bytes",
            format.block_len()
        );
        cursor.invalid_at(dimensions_at, &field, format!("{format} {shape:?}: {problem}"), allowed)
    })?;
    let offset = cursor.u64(&field)?;
    let element = ElementType::Format(format);
    Ok(Described { at, tensor: TensorInfo { name, element, shape, file: number, offset, bytes } })
}

/// Bytes of a tensor, or what is wrong with its shape.
fn tensor_bytes(format: Format, shape: &[usize]) -> Result<usize, &'static str> {
    const MOST: usize = i64::MAX as usize;
    let product = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    product.filter(|&product| product <= MOST).ok_or("too many elements")?;
    let (&cols, outer) = shape.split_last().ok_or("no dimension")?;
    if !cols.is_multiple_of(format.block_len()) {
        return Err("a row ends inside a block");
    }
    let rows: usize = outer.iter().product();
    format
        .row_bytes(cols)
        .and_then(|row| row.checked_mul(rows))
        .filter(|&bytes| bytes <= MOST)
        .ok_or("too many bytes")
}

/// Checks that the tensors follow each other, each at the next multiple of
/// `alignment`, and end inside the file; makes their offsets absolute.
/// Answers where the data starts and where it ends, padding included.
///
/// Writers of GGUF leave no other gaps and keep this order, and ggml's own
/// reader insists on it; so an overlap cannot hide.
fn place(
    file: &Path,
    described: &mut [Described],
    header_end: u64,
    alignment: u64,
    len: usize,
) -> Result<(u64, u64)> {
    let len = len as u64;
    // Headers end inside the file, so this cannot overflow; the sums below
    // are checked because their terms come from the file.
    let start = header_end.next_multiple_of(alignment);
    let mut expected = 0_u64;
    for Described { at, tensor } in described {
        let invalid = |found: String, allowed: String| {
            Error::invalid(file, Some(*at), format!("tensor {}", tensor.name), found, allowed)
        };
        let offset = tensor.offset;
        if offset != expected {
            let problem = if !offset.is_multiple_of(alignment) {
                format!(", which is no multiple of the alignment {alignment}")
            } else if offset < expected {
                ", inside an earlier tensor or out of order".to_string()
            } else {
                ", with a gap before it".to_string()
            };
            return Err(invalid(format!("data offset {offset}{problem}"), expected.to_string()));
        }
        let end = start
            .checked_add(offset)
            .and_then(|begin| begin.checked_add(tensor.bytes as u64))
            .filter(|&end| end <= len);
        let Some(end) = end else {
            return Err(invalid(
                format!("{} bytes at data offset {offset}", tensor.bytes),
                format!(
                    "an end within the {} bytes of data in the file; it may be an unfinished \
                     download",
                    len.saturating_sub(start)
                ),
            ));
        };
        tensor.offset = start + offset;
        // `end <= len`, which is a slice's length, and the alignment is small.
        expected = (end - start).next_multiple_of(alignment);
    }
    Ok((start, start + expected))
}

fn unsupported_type(file: &Path, tensor: &str, number: u32, at: u64) -> Error {
    let name = match number {
        4 => "Q4_2 (removed from GGUF)",
        5 => "Q4_3 (removed from GGUF)",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31..=33 => "Q4_0 repacked (removed from GGUF)",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36..=38 => "IQ4_NL repacked (removed from GGUF)",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => "unknown",
    };
    Error::Unsupported {
        file: file.to_path_buf(),
        what: "tensor type",
        found: format!(
            "{name} (number {number}) of {} at byte {at}",
            printable(tensor.to_string())
        ),
        supported: Format::ALL.map(Format::name).join(", "),
    }
}
