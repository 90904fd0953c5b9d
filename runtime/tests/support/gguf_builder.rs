//! Builds GGUF files in memory, good ones and bad ones. Nothing is checked:
//! whatever a test asks for is written.
#![allow(dead_code, reason = "each test binary uses a part")]

use pregate_kernels::Format;
use pregate_runtime::files::{Array, ElementType, TensorTable, Value, gguf};
use std::path::Path;

/// A value with its type number, as bytes of the file.
#[derive(Clone, Debug)]
pub struct Val {
    pub kind: u32,
    pub bytes: Vec<u8>,
}

pub fn raw(kind: u32, bytes: impl Into<Vec<u8>>) -> Val {
    Val { kind, bytes: bytes.into() }
}

pub fn u32(value: u32) -> Val {
    raw(4, value.to_le_bytes())
}

pub fn i32(value: i32) -> Val {
    raw(5, value.to_le_bytes())
}

pub fn u64(value: u64) -> Val {
    raw(10, value.to_le_bytes())
}

pub fn f32(value: f32) -> Val {
    raw(6, value.to_le_bytes())
}

pub fn bool(value: bool) -> Val {
    raw(7, [u8::from(value)])
}

pub fn string(value: &str) -> Val {
    raw(8, text(value.as_bytes()))
}

pub fn strings<S: AsRef<str>>(values: &[S]) -> Val {
    let list: Vec<Vec<u8>> = values.iter().map(|value| text(value.as_ref().as_bytes())).collect();
    array(8, values.len() as u64, list.concat())
}

pub fn i32s(values: &[i32]) -> Val {
    array(5, values.len() as u64, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

pub fn f32s(values: &[f32]) -> Val {
    array(6, values.len() as u64, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

pub fn bools(values: &[bool]) -> Val {
    array(7, values.len() as u64, values.iter().map(|&v| u8::from(v)).collect::<Vec<_>>())
}

/// An array that says it has `count` elements of type number `kind`.
pub fn array(kind: u32, count: u64, bytes: impl AsRef<[u8]>) -> Val {
    raw(9, [&kind.to_le_bytes()[..], &count.to_le_bytes(), bytes.as_ref()].concat())
}

/// A length and the bytes.
pub fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: Vec<u8>,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// What to write instead of the right offset.
    pub offset: Option<u64>,
    /// What to write instead of `dims.len()`.
    pub n_dims: Option<u32>,
}

#[derive(Clone, Debug)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub n_tensors: Option<u64>,
    pub n_keys: Option<u64>,
    pub keys: Vec<(Vec<u8>, Val)>,
    pub tensors: Vec<Tensor>,
    /// Where data starts and tensors follow each other.
    pub alignment: usize,
}

impl Default for Gguf {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_keys: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }
}

impl Gguf {
    pub fn new() -> Self {
        Self::default()
    }

    /// A file taken apart, to be changed and written again. Numbers come back
    /// as 32 bits where they fit, arrays of integers as 64.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut table = TensorTable::new();
        let header = gguf::parse(Path::new("template"), 0, bytes, &mut table).expect("a good file");
        let mut file = Self::new();
        for (key, value) in header.metadata.iter() {
            if key != "general.alignment" {
                file = file.key(key, value_bytes(value));
            }
        }
        for tensor in table.all() {
            let ElementType::Format(format) = tensor.element else {
                unreachable!("GGUF has formats")
            };
            let start = tensor.offset as usize;
            let data = bytes[start..start + tensor.bytes].to_vec();
            file = file.tensor(&tensor.name, format, &tensor.shape, data);
        }
        file
    }

    /// Adds a key.
    pub fn key(mut self, key: &str, value: Val) -> Self {
        self.keys.push((key.as_bytes().to_vec(), value));
        self
    }

    /// Replaces the value of a key that is there.
    pub fn replace(mut self, key: &str, value: Val) -> Self {
        let entry = self.keys.iter_mut().find(|(name, _)| name == key.as_bytes());
        entry.unwrap_or_else(|| panic!("no key {key}")).1 = value;
        self
    }

    pub fn remove(mut self, key: &str) -> Self {
        let before = self.keys.len();
        self.keys.retain(|(name, _)| name != key.as_bytes());
        assert_ne!(before, self.keys.len(), "no key {key}");
        self
    }

    /// Adds a tensor; `shape` has the outermost dimension first.
    pub fn tensor(self, name: &str, format: Format, shape: &[usize], data: Vec<u8>) -> Self {
        let dims: Vec<u64> = shape.iter().rev().map(|&size| size as u64).collect();
        self.raw_tensor(name, format.ggml_type(), &dims, data)
    }

    pub fn f32_tensor(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, Format::F32, shape, data)
    }

    pub fn raw_tensor(mut self, name: &str, kind: u32, dims: &[u64], data: Vec<u8>) -> Self {
        let (name, dims) = (name.as_bytes().to_vec(), dims.to_vec());
        self.tensors.push(Tensor { name, dims, kind, data, offset: None, n_dims: None });
        self
    }

    /// The tensor of that name, to be changed.
    pub fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes());
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The file up to the data, without padding.
    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(text(key));
            out.extend(value.kind.to_le_bytes());
            out.extend(&value.bytes);
        }
        let mut next = 0_u64;
        for tensor in &self.tensors {
            out.extend(text(&tensor.name));
            out.extend(tensor.n_dims.unwrap_or(tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(next).to_le_bytes());
            next += tensor.data.len().next_multiple_of(self.alignment) as u64;
        }
        out
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = self.header();
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out
    }
}

fn value_bytes(value: &Value) -> Val {
    match value {
        Value::Unsigned(number) => match u32::try_from(*number) {
            Ok(small) => u32(small),
            Err(_) => u64(*number),
        },
        Value::Signed(number) => match i32::try_from(*number) {
            Ok(small) => i32(small),
            Err(_) => raw(11, number.to_le_bytes()),
        },
        Value::Float(number) if f64::from(*number as f32) == *number => f32(*number as f32),
        Value::Float(number) => raw(12, number.to_le_bytes()),
        Value::Bool(flag) => bool(*flag),
        Value::String(text) => string(text),
        Value::Array(Array::Unsigned(list)) => array(
            10,
            list.len() as u64,
            list.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(),
        ),
        Value::Array(Array::Signed(list)) => array(
            11,
            list.len() as u64,
            list.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(),
        ),
        Value::Array(Array::Float(list)) => f32s(list),
        Value::Array(Array::Bool(list)) => bools(list),
        Value::Array(Array::String(list)) => strings(list),
    }
}
