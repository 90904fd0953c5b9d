//! The key-value section of a GGUF file, typed once.

use crate::error::{Error, Result};
use std::{collections::HashMap, path::PathBuf};

/// A value as the file holds it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array; integer widths are kept apart only where a reader must refuse
/// the wrong one.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    Unsigned(Vec<u64>),
    Signed(Vec<i64>),
    Float(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

impl Value {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) => "unsigned integer",
            Value::Signed(_) => "signed integer",
            Value::Float(_) => "float",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(Array::Unsigned(_)) => "array of unsigned integers",
            Value::Array(Array::Signed(_)) => "array of signed integers",
            Value::Array(Array::Float(_)) => "array of floats",
            Value::Array(Array::Bool(_)) => "array of bools",
            Value::Array(Array::String(_)) => "array of strings",
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    offset: u64,
    value: Value,
}

/// All keys of a GGUF file. Getters answer `Ok(None)` for an absent key and
/// an error that names file, offset and key for one of the wrong type.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: PathBuf,
    entries: HashMap<String, Entry>,
    order: Vec<String>,
}

impl Metadata {
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self { file: file.into(), entries: HashMap::new(), order: Vec::new() }
    }

    pub fn file(&self) -> &PathBuf {
        &self.file
    }

    /// False if the key is there already.
    pub fn insert(&mut self, key: String, offset: u64, value: Value) -> bool {
        if self.entries.contains_key(&key) {
            return false;
        }
        self.order.push(key.clone());
        self.entries.insert(key, Entry { offset, value });
        true
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    /// Keys in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.order.iter().map(|key| (key.as_str(), &self.entries[key].value))
    }

    /// The error for a key whose value is not allowed.
    pub fn invalid(
        &self,
        key: &str,
        found: impl Into<String>,
        allowed: impl Into<String>,
    ) -> Error {
        let offset = self.entries.get(key).map(|entry| entry.offset);
        Error::invalid(&self.file, offset, key, found, allowed)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        allowed: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.invalid(key, value.kind(), allowed)),
        }
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A count or size: a non-negative integer.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", |value| match value {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    /// A finite float.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite float", |value| match value {
            Value::Float(number) if number.is_finite() => Some(*number),
            _ => None,
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(list)) => Some(list.as_slice()),
            _ => None,
        })
    }

    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of floats", |value| match value {
            Value::Array(Array::Float(list)) => Some(list.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of either sign.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, "an array of integers", |value| match value {
            Value::Array(Array::Signed(list)) => Some(list.clone()),
            Value::Array(Array::Unsigned(list)) => {
                list.iter().map(|&number| i64::try_from(number).ok()).collect()
            }
            _ => None,
        })
    }

    pub fn bools(&self, key: &str) -> Result<Option<&[bool]>> {
        self.typed(key, "an array of bools", |value| match value {
            Value::Array(Array::Bool(list)) => Some(list.as_slice()),
            _ => None,
        })
    }
}
