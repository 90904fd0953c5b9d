//! Files in the safetensors format.
//!
//! Source: the format section of the safetensors README and the rules that
//! its own validator keeps: a header of at most 100 MB, tensors that follow
//! each other without gap or overlap and fill the file. Ours goes further in
//! two things: a name may stand in the header once only, and no dimension is
//! zero (empty tensors may share offsets, which the rules above do not see).

use super::{ElementType, TensorInfo, json, table::TensorTable};
use crate::error::{Error, Result, printable};
use pregate_kernels::Format;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use std::{fmt, path::Path};

const MAX_HEADER_BYTES: u64 = 100_000_000;
const MAX_TENSORS: usize = 1 << 20;
const MAX_NAME_BYTES: usize = 1024;
const MAX_DIMENSIONS: usize = 8;

/// What stands before the tensor data of one file.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Where the tensor data starts, in bytes.
    pub data_offset: u64,
}

/// Reads the header of `bytes`, the whole content of `file`, and adds its
/// tensors to `tensors` as those of file number `number`, in data order.
///
/// # Errors
/// [`Error::Invalid`] for whatever the format or our limits rule out,
/// [`Error::Unsupported`] for a data type that we do not compute with.
pub fn parse(
    file: &Path,
    number: usize,
    bytes: &[u8],
    tensors: &mut TensorTable,
) -> Result<Header> {
    // A copy, because mapped bytes may change between check and use.
    let text = header_text(file, bytes)?.to_vec();
    let data_offset = 8 + text.len() as u64;
    let data_len = bytes.len() as u64 - data_offset;
    let Entries(mut entries) = json::parse(file, 8, "header", &text)?;
    drop(text);
    entries.sort_unstable_by_key(|(_, entry)| entry.data_offsets);
    tensors.reserve(entries.len());
    let mut expected = 0;
    for (name, entry) in entries {
        let tensor = check(file, number, data_len, expected, name, entry)?;
        expected += tensor.bytes as u64;
        let tensor = TensorInfo { offset: data_offset + tensor.offset, ..tensor };
        tensors.insert(file, None, tensor)?;
    }
    if expected != data_len {
        return Err(Error::invalid(
            file,
            Some(data_offset + expected),
            "end of data",
            format!("{} bytes that belong to no tensor", data_len - expected),
            "tensors that fill the file",
        ));
    }
    Ok(Header { data_offset })
}

fn header_text<'a>(file: &Path, bytes: &'a [u8]) -> Result<&'a [u8]> {
    let invalid = |found: String, allowed: String| {
        Err(Error::invalid(file, Some(0), "header length", found, allowed))
    };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return invalid(format!("a file of {} bytes", bytes.len()), "at least 8 bytes".into());
    };
    let length = u64::from_le_bytes(*length);
    if !(2..=MAX_HEADER_BYTES).contains(&length) {
        return invalid(length.to_string(), format!("2 to {MAX_HEADER_BYTES}"));
    }
    let Some(text) = rest.get(..length as usize) else {
        return invalid(
            length.to_string(),
            format!(
                "at most {}, where the file ends; it may be an unfinished download",
                rest.len()
            ),
        );
    };
    if text[0] != b'{' {
        let found = format!("byte {:#04x}", text[0]);
        return Err(Error::invalid(file, Some(8), "header", found, "a JSON object"));
    }
    Ok(text)
}

/// Checks one entry of the header, in data order; the answer's offset counts
/// from the start of the data.
fn check(
    file: &Path,
    number: usize,
    data_len: u64,
    expected: u64,
    name: String,
    entry: Entry,
) -> Result<TensorInfo> {
    let invalid = |found: String, allowed: String| {
        Err(Error::invalid(file, None, format!("tensor {name}"), found, allowed))
    };
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
        return invalid(
            format!("a name of {} bytes", name.len()),
            format!("1 to {MAX_NAME_BYTES} bytes without control characters"),
        );
    }
    let (element, size) = element(file, &name, &entry.dtype)?;
    let (begin, end) = entry.data_offsets;
    let shape = entry.shape.0;
    if shape.contains(&0) {
        return invalid(format!("shape {shape:?}"), "dimensions of at least 1".into());
    }
    let bytes = shape.iter().try_fold(size, |product, &size| product.checked_mul(size));
    let Some(bytes) = bytes.filter(|&bytes| bytes <= i64::MAX as usize) else {
        return invalid(format!("shape {shape:?}"), "fewer than 2^63 bytes".into());
    };
    if begin > end || end > data_len {
        return invalid(
            format!("data offsets [{begin}, {end}]"),
            format!("begin <= end <= {data_len}, where the file ends"),
        );
    }
    if end - begin != bytes as u64 {
        return invalid(
            format!("{} bytes of data", end - begin),
            format!("{bytes} bytes for {} {shape:?}", entry.dtype),
        );
    }
    if begin != expected {
        let problem = if begin < expected { "overlaps the tensor" } else { "leaves a gap" };
        return invalid(
            format!("data offset {begin}, which {problem} before it"),
            expected.to_string(),
        );
    }
    Ok(TensorInfo { name, element, shape, file: number, offset: begin, bytes })
}

/// The element type with its size in bytes.
fn element(file: &Path, tensor: &str, dtype: &str) -> Result<(ElementType, usize)> {
    Ok(match dtype {
        "F32" => (ElementType::Format(Format::F32), 4),
        "F16" => (ElementType::Format(Format::F16), 2),
        "BF16" => (ElementType::Format(Format::Bf16), 2),
        "U8" => (ElementType::U8, 1),
        _ => {
            let advice = if dtype.starts_with("F8_") {
                "; use a BF16 or GGUF version of this FP8 model"
            } else {
                ""
            };
            return Err(Error::Unsupported {
                file: file.to_path_buf(),
                what: "data type",
                found: printable(format!("{dtype} of tensor {tensor}")),
                supported: format!("F32, F16, BF16, U8 (MXFP4 blocks){advice}"),
            });
        }
    })
}

/// A header's tensors as they are written.
struct Entries(Vec<(String, Entry)>);

#[derive(Deserialize)]
struct Entry {
    /// `Box` because there may be a million.
    dtype: Box<str>,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<usize>);

/// The free-form strings under `__metadata__`: checked and dropped.
struct Strings;

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                let mut metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut metadata, true) {
                            return Err(de::Error::custom("a second __metadata__"));
                        }
                        map.next_value::<Option<Strings>>()?;
                        continue;
                    }
                    if entries.len() == MAX_TENSORS {
                        let text = format!("more than {MAX_TENSORS} tensors");
                        return Err(de::Error::custom(text));
                    }
                    entries.push((name, map.next_value()?));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Header)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMENSIONS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = list.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(de::Error::invalid_length(shape.len() + 1, &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                while map.next_entry::<String, String>()?.is_some() {}
                Ok(Strings)
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
