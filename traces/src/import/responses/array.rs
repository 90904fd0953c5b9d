//! `[tokens, layers, top_k]` in the forms that servers give it.

use crate::import::Hints;
use crate::limits::MAX_EXPERTS;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// A place where there is no expert.
pub const NONE: u16 = u16::MAX;

/// Row-major ids; `NONE` where servers have negative ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Array {
    pub tokens: usize,
    pub layers: usize,
    pub top_k: usize,
    /// Tokens of the sequence that were left out before.
    pub start: usize,
    pub ids: Vec<u16>,
}

/// What stands in an answer.
pub enum Routed {
    /// An `.npy` file, or bare numbers.
    Bytes(Vec<u8>),
    Array(Array),
}

impl Routed {
    /// # Errors
    /// Bytes that are no array of three dimensions, or whose shape nobody says.
    pub fn array(self, hints: &Hints) -> Result<Array, String> {
        match self {
            Self::Bytes(bytes) => Array::of_bytes(&bytes, hints),
            Self::Array(array) => Ok(array),
        }
    }
}

/// Dynamo's form.
#[derive(Deserialize)]
struct Tensor {
    data: Base64,
    shape: Vec<usize>,
    #[serde(default)]
    dtype: Option<String>,
    #[serde(default)]
    start: Option<u32>,
}

impl Tensor {
    fn array(self) -> Result<Array, String> {
        let kind = self.dtype.as_deref().unwrap_or("int32");
        let array = Array::shaped(numbers(&self.data.0, kind)?, &self.shape)?;
        Ok(Array { start: self.start.unwrap_or(0) as usize, ..array })
    }
}

struct Base64(Vec<u8>);

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match from.deserialize_any(RoutedVisitor)? {
            Routed::Bytes(bytes) => Ok(Self(bytes)),
            Routed::Array(_) => Err(D::Error::custom("data that is no text")),
        }
    }
}

impl<'de> Deserialize<'de> for Routed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(RoutedVisitor)
    }
}

struct RoutedVisitor;

impl<'de> Visitor<'de> for RoutedVisitor {
    type Value = Routed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("routed experts: base64, lists [token][layer][rank], or data and shape")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Routed, E> {
        base64(text).map(Routed::Bytes).map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Routed, A::Error> {
        let tensor = Tensor::deserialize(MapAccessDeserializer::new(map))?;
        tensor.array().map(Routed::Array).map_err(A::Error::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Routed, A::Error> {
        let mut array = Array::default();
        while list.next_element_seed(Level::Layers(&mut array))?.is_some() {
            array.tokens += 1;
        }
        Ok(Routed::Array(array))
    }
}

/// A list in a list of tokens: its ids go straight to the array.
enum Level<'a> {
    Layers(&'a mut Array),
    Ranks(&'a mut Array),
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lists [token][layer][rank]")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        match self {
            Self::Layers(array) => {
                let mut count = 0;
                while list.next_element_seed(Level::Ranks(&mut *array))?.is_some() {
                    count += 1;
                }
                let what = "tokens of different numbers of layers, or of none";
                same(&mut array.layers, count, what)
            }
            Self::Ranks(array) => {
                let mut count = 0;
                while let Some(number) = list.next_element::<i64>()? {
                    array.ids.push(id(number).map_err(A::Error::custom)?);
                    count += 1;
                }
                same(&mut array.top_k, count, "layers of different top-k, or of none")
            }
        }
    }
}

/// The first list says how long all are.
fn same<E: Error>(length: &mut usize, found: usize, what: &str) -> Result<(), E> {
    if *length == 0 {
        *length = found;
    }
    if *length == found && found > 0 { Ok(()) } else { Err(E::custom(what)) }
}

/// # Errors
/// An id that no model has.
fn id(number: i64) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(id) if usize::from(id) < MAX_EXPERTS => Ok(id),
        _ if number < 0 => Ok(NONE),
        _ => Err(format!("expert {number}; {MAX_EXPERTS} experts are allowed")),
    }
}

impl Array {
    pub fn ids(&self, token: usize, layer: usize) -> &[u16] {
        &self.ids[(token * self.layers + layer) * self.top_k..][..self.top_k]
    }

    fn shaped(ids: Vec<u16>, shape: &[usize]) -> Result<Self, String> {
        let &[tokens, layers, top_k] = shape else {
            return Err(format!("the shape {shape:?}; [tokens, layers, top_k] is needed"));
        };
        let wanted = tokens.checked_mul(layers).and_then(|count| count.checked_mul(top_k));
        match wanted == Some(ids.len()) && layers > 0 && top_k > 0 {
            true => Ok(Self { tokens, layers, top_k, start: 0, ids }),
            false => Err(format!("{} ids in the shape {shape:?}", ids.len())),
        }
    }

    /// An `.npy` file, or bare numbers of 32 bits.
    fn of_bytes(bytes: &[u8], hints: &Hints) -> Result<Self, String> {
        if bytes.starts_with(b"\x93NUMPY") {
            return Self::of_npy(bytes);
        }
        let (Some(layers), Some(top_k)) = (hints.layers, hints.top_k) else {
            let what = "ids without a shape: pregate trace import needs --layers and --top-k";
            return Err(what.into());
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
fn numbers(bytes: &[u8], kind: &str) -> Result<Vec<u16>, String> {
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
        id(i64::from_le_bytes(wide))
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
