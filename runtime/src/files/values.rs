//! The values of GGUF keys.

use super::{
    cursor::Cursor,
    metadata::{Array, Value},
};
use crate::error::Result;

const UINT8: u32 = 0;
const INT8: u32 = 1;
const UINT16: u32 = 2;
const INT16: u32 = 3;
pub(super) const UINT32: u32 = 4;
const INT32: u32 = 5;
const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const UINT64: u32 = 10;
const INT64: u32 = 11;
const FLOAT64: u32 = 12;

const MAX_STRING_BYTES: u64 = 16 << 20;

/// A value type for messages.
pub(super) fn type_name(kind: u32) -> String {
    const NAMES: [&str; 13] = [
        "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string",
        "array", "uint64", "int64", "float64",
    ];
    match usize::try_from(kind).ok().and_then(|kind| NAMES.get(kind)) {
        Some(name) => name.to_string(),
        None => format!("number {kind}"),
    }
}

/// Reads a value of type number `kind` for `key`.
pub(super) fn read(cursor: &mut Cursor, key: &str, kind: u32) -> Result<Value> {
    Ok(match kind {
        UINT8 => Value::Unsigned(u8::from_le_bytes(cursor.array(key)?).into()),
        INT8 => Value::Signed(i8::from_le_bytes(cursor.array(key)?).into()),
        UINT16 => Value::Unsigned(u16::from_le_bytes(cursor.array(key)?).into()),
        INT16 => Value::Signed(i16::from_le_bytes(cursor.array(key)?).into()),
        UINT32 => Value::Unsigned(cursor.u32(key)?.into()),
        INT32 => Value::Signed(i32::from_le_bytes(cursor.array(key)?).into()),
        FLOAT32 => Value::Float(f32::from_le_bytes(cursor.array(key)?).into()),
        BOOL => {
            let at = cursor.offset();
            let [byte] = cursor.array(key)?;
            Value::Bool(boolean(cursor, at, key, byte)?)
        }
        STRING => Value::String(cursor.string(key, MAX_STRING_BYTES)?),
        ARRAY => Value::Array(array(cursor, key)?),
        UINT64 => Value::Unsigned(cursor.u64(key)?),
        INT64 => Value::Signed(i64::from_le_bytes(cursor.array(key)?)),
        FLOAT64 => Value::Float(f64::from_le_bytes(cursor.array(key)?)),
        _ => {
            let at = cursor.offset().saturating_sub(4);
            let found = format!("value type {}", type_name(kind));
            return Err(cursor.invalid_at(at, key, found, "types 0 to 12"));
        }
    })
}

fn boolean(cursor: &Cursor, at: u64, key: &str, byte: u8) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(cursor.invalid_at(at, key, format!("{byte} as a bool"), "0 or 1")),
    }
}

fn array(cursor: &mut Cursor, key: &str) -> Result<Array> {
    let kind_at = cursor.offset();
    let kind = cursor.u32(key)?;
    // Bytes of an element in the file (strings: the least) and in memory.
    let (stored, kept) = match kind {
        UINT8 | INT8 => (1, 8),
        UINT16 | INT16 => (2, 8),
        UINT32 | INT32 => (4, 8),
        UINT64 | INT64 => (8, 8),
        FLOAT32 => (4, 4),
        FLOAT64 => (8, 4),
        BOOL => (1, 1),
        STRING => (8, size_of::<String>() as u64),
        _ => {
            let found = format!("an array of {}", type_name(kind));
            let allowed = "an array of numbers, bools or strings";
            return Err(cursor.invalid_at(kind_at, key, found, allowed));
        }
    };
    let count_at = cursor.offset();
    let count = cursor.u64(key)?;
    let most = cursor.left() / stored;
    if count > most {
        let found = format!("{count} array elements");
        let allowed = format!("at most {most}, what the {} bytes left can hold", cursor.left());
        return Err(cursor.invalid_at(count_at, key, found, allowed));
    }
    cursor.charge(count, kept, key)?;
    if kind == STRING {
        let mut list = Vec::with_capacity(count as usize);
        for _ in 0..count {
            list.push(cursor.string(key, MAX_STRING_BYTES)?);
        }
        return Ok(Array::String(list));
    }
    let at = cursor.offset();
    // No overflow: `count * stored` bytes are left in the file.
    let bytes = cursor.take(count * stored, key)?;
    Ok(match kind {
        UINT8 => Array::Unsigned(numbers(bytes, |b| u8::from_le_bytes(b).into())),
        INT8 => Array::Signed(numbers(bytes, |b| i8::from_le_bytes(b).into())),
        UINT16 => Array::Unsigned(numbers(bytes, |b| u16::from_le_bytes(b).into())),
        INT16 => Array::Signed(numbers(bytes, |b| i16::from_le_bytes(b).into())),
        UINT32 => Array::Unsigned(numbers(bytes, |b| u32::from_le_bytes(b).into())),
        INT32 => Array::Signed(numbers(bytes, |b| i32::from_le_bytes(b).into())),
        UINT64 => Array::Unsigned(numbers(bytes, u64::from_le_bytes)),
        INT64 => Array::Signed(numbers(bytes, i64::from_le_bytes)),
        FLOAT32 => Array::Float(numbers(bytes, f32::from_le_bytes)),
        FLOAT64 => Array::Float(numbers(bytes, |b| f64::from_le_bytes(b) as f32)),
        _ => {
            let mut list = Vec::with_capacity(bytes.len());
            for (index, &byte) in bytes.iter().enumerate() {
                list.push(boolean(cursor, at + index as u64, key, byte)?);
            }
            Array::Bool(list)
        }
    })
}

fn numbers<const N: usize, T>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|&chunk| convert(chunk)).collect()
}
