//! `[tokens, layers, top_k]` in the forms that servers give it.

use crate::import::Hints;
use serde_json::Value;

/// Row-major ids; negative ones are none.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub tokens: usize,
    pub layers: usize,
    pub top_k: usize,
    /// Tokens of the sequence that were left out before.
    pub start: usize,
    pub ids: Vec<i32>,
}

impl Array {
    pub fn of(value: &Value, hints: &Hints) -> Result<Self, String> {
        match value {
            Value::Array(tokens) => Self::of_lists(tokens),
            Value::String(text) => Self::of_bytes(&base64(text)?, hints),
            Value::Object(fields) => {
                let text = fields.get("data").and_then(Value::as_str).ok_or("no data")?;
                let shape: Vec<usize> = fields
                    .get("shape")
                    .and_then(Value::as_array)
                    .and_then(|list| list.iter().map(|n| Some(n.as_u64()? as usize)).collect())
                    .ok_or("no shape")?;
                let kind = fields.get("dtype").and_then(Value::as_str).unwrap_or("int32");
                let start = fields.get("start").and_then(Value::as_u64).unwrap_or(0);
                let array = Self::shaped(numbers(&base64(text)?, kind)?, &shape)?;
                Ok(Self { start: usize::try_from(start).map_err(|_| "start")?, ..array })
            }
            _ => Err("routed_experts is neither text nor a list".into()),
        }
    }

    pub fn ids(&self, token: usize, layer: usize) -> &[i32] {
        &self.ids[(token * self.layers + layer) * self.top_k..][..self.top_k]
    }

    pub fn followed_by(&self, next: &Self) -> Result<Self, String> {
        if (self.layers, self.top_k) != (next.layers, next.top_k) {
            return Err("prompt and answer have arrays of two shapes".into());
        }
        let ids = [&self.ids[..], &next.ids].concat();
        Ok(Self { tokens: self.tokens + next.tokens, ids, ..*self })
    }

    fn shaped(ids: Vec<i32>, shape: &[usize]) -> Result<Self, String> {
        let &[tokens, layers, top_k] = shape else {
            return Err(format!("the shape {shape:?}; [tokens, layers, top_k] is needed"));
        };
        let wanted = tokens.checked_mul(layers).and_then(|count| count.checked_mul(top_k));
        match wanted == Some(ids.len()) && layers > 0 && top_k > 0 {
            true => Ok(Self { tokens, layers, top_k, start: 0, ids }),
            false => Err(format!("{} ids in the shape {shape:?}", ids.len())),
        }
    }

    fn of_lists(tokens: &[Value]) -> Result<Self, String> {
        let list = |value: &Value| value.as_array().map_or(0, Vec::len);
        let layers = tokens.first().map_or(1, list);
        let top_k = tokens.first().and_then(|token| token.get(0)).map_or(1, list);
        let mut ids = Vec::new();
        for token in tokens {
            let rows = token.as_array().filter(|rows| rows.len() == layers);
            for row in rows.ok_or("tokens of different numbers of layers")? {
                let row = row.as_array().filter(|row| row.len() == top_k);
                for id in row.ok_or("layers of different top-k")? {
                    let id = id.as_i64().and_then(|id| i32::try_from(id).ok());
                    ids.push(id.ok_or("an id that is no number")?);
                }
            }
        }
        Self::shaped(ids, &[tokens.len(), layers, top_k])
    }

    /// An `.npy` file, or bare numbers of 32 bits.
    fn of_bytes(bytes: &[u8], hints: &Hints) -> Result<Self, String> {
        if bytes.starts_with(b"\x93NUMPY") {
            return Self::of_npy(bytes);
        }
        let (Some(layers), Some(top_k)) = (hints.layers, hints.top_k) else {
            return Err("ids without a shape: --layers and --top-k are needed".into());
        };
        let ids = numbers(bytes, "int32")?;
        let width = layers.checked_mul(top_k).filter(|&width| width > 0).ok_or("0 layers")?;
        let tokens = ids.len() / width;
        Self::shaped(ids, &[tokens, layers, top_k])
    }

    /// Versions 1 to 3 of NumPy's format (numpy.org, `numpy.lib.format`).
    fn of_npy(bytes: &[u8]) -> Result<Self, String> {
        const SHORT: &str = "an .npy file that ends within its head";
        let version = *bytes.get(6).ok_or(SHORT)?;
        let (length, start) = match version {
            1 => (u32::from(u16::from_le_bytes(part(bytes, 8).ok_or(SHORT)?)), 10),
            2 | 3 => (u32::from_le_bytes(part(bytes, 8).ok_or(SHORT)?), 12),
            _ => return Err(format!("version {version} of .npy")),
        };
        let end = start + length as usize;
        let head = bytes.get(start..end).ok_or(SHORT)?;
        let head = std::str::from_utf8(head).map_err(|_| SHORT)?;
        let value = |key: &str| {
            let rest = head.split_once(&format!("'{key}'"))?.1;
            rest.trim_start().strip_prefix(':').map(str::trim_start)
        };
        let kind = value("descr").and_then(|rest| rest.split('\'').nth(1)).ok_or(SHORT)?;
        if value("fortran_order").is_none_or(|rest| !rest.starts_with("False")) {
            return Err("an .npy file in the order of Fortran".into());
        }
        let shape = value("shape").and_then(|rest| rest.strip_prefix('(')?.split(')').next());
        let shape = shape.ok_or(SHORT)?.split(',').map(str::trim).filter(|part| !part.is_empty());
        let shape: Result<Vec<usize>, _> = shape.map(str::parse).collect();
        Self::shaped(numbers(&bytes[end..], kind)?, &shape.map_err(|_| SHORT)?)
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Little-endian numbers of a NumPy type.
fn numbers(bytes: &[u8], kind: &str) -> Result<Vec<i32>, String> {
    let width = match kind {
        "|u1" | "uint8" | "|i1" | "int8" => 1,
        "<u2" | "uint16" | "<i2" | "int16" => 2,
        "<i4" | "int32" | "<u4" | "uint32" => 4,
        "<i8" | "int64" => 8,
        _ => return Err(format!("ids of type {kind:?}")),
    };
    if !bytes.len().is_multiple_of(width) {
        return Err(format!("{} bytes of ids of {width}", bytes.len()));
    }
    let is_signed = kind.contains('i') && !kind.contains("ui");
    let number = |bytes: &[u8]| {
        let mut wide = [if is_signed && bytes[width - 1] & 0x80 != 0 { 0xff } else { 0 }; 8];
        wide[..width].copy_from_slice(bytes);
        i32::try_from(i64::from_le_bytes(wide))
            .map_err(|_| "an id of more than 31 bits".to_string())
    };
    bytes.chunks_exact(width).map(number).collect()
}

/// RFC 4648, with either alphabet; line ends and filling are skipped.
fn base64(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut held, mut count) = (0u32, 0);
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            b'=' | b'\n' | b'\r' => continue,
            _ => return Err(format!("{:?} in base64", char::from(byte))),
        };
        held = held << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((held >> count) as u8);
        }
    }
    Ok(bytes)
}
