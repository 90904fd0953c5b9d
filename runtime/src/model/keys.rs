//! One way to read hyper-parameters, from GGUF metadata or `config.json`,
//! with every range checked where the number enters.

use crate::error::{Error, Result};
use crate::files::Metadata;
use serde_json::{Map, Value};
use std::{ops::RangeInclusive, path::Path, path::PathBuf};

/// A source of named hyper-parameters.
pub enum Keys<'a> {
    /// Keys get the architecture's prefix: `heads` is `qwen3moe.heads`.
    Gguf { metadata: &'a Metadata, prefix: &'a str },
    /// `path` names the object inside the file, for messages.
    Json { file: PathBuf, path: &'static str, map: &'a Map<String, Value> },
}

/// Bounds that no real model reaches and that keep products far from
/// overflow.
pub mod bounds {
    use std::ops::RangeInclusive;

    pub const LAYERS: RangeInclusive<usize> = 1..=1024;
    pub const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
    pub const HEADS: RangeInclusive<usize> = 1..=4096;
    pub const EXPERTS: RangeInclusive<usize> = 1..=1 << 16;
    pub const VOCAB: RangeInclusive<usize> = 1..=1 << 22;
    pub const CONTEXT: RangeInclusive<usize> = 1..=1 << 28;
    pub const EPSILON: RangeInclusive<f64> = 1e-30..=1.0;
    pub const FACTOR: RangeInclusive<f64> = 1e-6..=1e6;
    pub const ROPE_BASE: RangeInclusive<f64> = 1.0001..=1e15;
}

impl<'a> Keys<'a> {
    fn name(&self, key: &str) -> String {
        match self {
            Keys::Gguf { prefix, .. } => format!("{prefix}.{key}"),
            Keys::Json { path: "", .. } => key.to_string(),
            Keys::Json { path, .. } => format!("{path}.{key}"),
        }
    }

    fn file(&self) -> &Path {
        match self {
            Keys::Gguf { metadata, .. } => metadata.file(),
            Keys::Json { file, .. } => file,
        }
    }

    /// The error for `key`.
    pub fn invalid(
        &self,
        key: &str,
        found: impl Into<String>,
        allowed: impl Into<String>,
    ) -> Error {
        match self {
            Keys::Gguf { metadata, .. } => metadata.invalid(&self.name(key), found, allowed),
            Keys::Json { file, .. } => Error::invalid(file, None, self.name(key), found, allowed),
        }
    }

    /// The value of `key` unless it is absent or null.
    fn json(&self, key: &str) -> Option<&'a Value> {
        match self {
            Keys::Json { map, .. } => map.get(key).filter(|value| !value.is_null()),
            Keys::Gguf { .. } => None,
        }
    }

    /// A whole number, range-checked; `None` if absent.
    pub fn optional_size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let allowed = || format!("a whole number in {}..={}", range.start(), range.end());
        let number = match self {
            Keys::Gguf { metadata, .. } => metadata.unsigned(&self.name(key))?,
            Keys::Json { .. } => match self.json(key) {
                None => None,
                Some(value) => {
                    let number = value.as_u64();
                    Some(number.ok_or_else(|| self.invalid(key, value.to_string(), allowed()))?)
                }
            },
        };
        let Some(number) = number else { return Ok(None) };
        match usize::try_from(number) {
            Ok(size) if range.contains(&size) => Ok(Some(size)),
            _ => Err(self.invalid(key, number.to_string(), allowed())),
        }
    }

    pub fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let allowed = format!("a whole number in {}..={}", range.start(), range.end());
        self.optional_size(key, range)?.ok_or_else(|| self.invalid(key, "nothing", allowed))
    }

    pub fn optional_float(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let allowed = || format!("a number in {:e}..={:e}", range.start(), range.end());
        let number = match self {
            Keys::Gguf { metadata, .. } => metadata.float(&self.name(key))?,
            Keys::Json { .. } => match self.json(key) {
                None => None,
                Some(value) => {
                    let number = value.as_f64();
                    Some(number.ok_or_else(|| self.invalid(key, value.to_string(), allowed()))?)
                }
            },
        };
        match number {
            None => Ok(None),
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(number) => Err(self.invalid(key, number.to_string(), allowed())),
        }
    }

    pub fn float(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let allowed = format!("a number in {:e}..={:e}", range.start(), range.end());
        self.optional_float(key, range)?.ok_or_else(|| self.invalid(key, "nothing", allowed))
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self {
            Keys::Gguf { metadata, .. } => metadata.bool(&self.name(key)),
            Keys::Json { .. } => match self.json(key) {
                None => Ok(None),
                Some(Value::Bool(flag)) => Ok(Some(*flag)),
                Some(value) => Err(self.invalid(key, value.to_string(), "true or false")),
            },
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self {
            Keys::Gguf { metadata, .. } => metadata.string(&self.name(key)),
            Keys::Json { .. } => match self.json(key) {
                None => Ok(None),
                Some(Value::String(text)) => Ok(Some(text.as_str())),
                Some(value) => Err(self.invalid(key, value.to_string(), "a string")),
            },
        }
    }

    /// Finite floats.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let list: Option<Vec<f64>> = match self {
            Keys::Gguf { metadata, .. } => metadata
                .floats(&self.name(key))?
                .map(|list| list.iter().map(|&number| f64::from(number)).collect()),
            Keys::Json { .. } => match self.json(key) {
                None => None,
                Some(value) => Some(
                    value
                        .as_array()
                        .and_then(|list| list.iter().map(Value::as_f64).collect())
                        .ok_or_else(|| self.invalid(key, kind(value), "an array of numbers"))?,
                ),
            },
        };
        match list {
            Some(list) if list.iter().any(|number| !number.is_finite()) => {
                Err(self.invalid(key, "a number that is not finite", "finite numbers"))
            }
            list => Ok(list),
        }
    }

    /// Whole numbers.
    pub fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let allowed = "an array of whole numbers";
        match self {
            Keys::Gguf { metadata, .. } => match metadata.integers(&self.name(key))? {
                None => Ok(None),
                Some(list) => list
                    .iter()
                    .map(|&number| usize::try_from(number).ok())
                    .collect::<Option<Vec<_>>>()
                    .map(Some)
                    .ok_or_else(|| self.invalid(key, "a negative number", allowed)),
            },
            Keys::Json { .. } => match self.json(key) {
                None => Ok(None),
                Some(value) => value
                    .as_array()
                    .and_then(|list| {
                        list.iter()
                            .map(|item| item.as_u64().and_then(|n| usize::try_from(n).ok()))
                            .collect::<Option<Vec<_>>>()
                    })
                    .map(Some)
                    .ok_or_else(|| self.invalid(key, kind(value), allowed)),
            },
        }
    }

    /// Strings of a JSON array; GGUF has none that we need.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.json(key) else { return Ok(None) };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>())
            .map(Some)
            .ok_or_else(|| self.invalid(key, kind(value), "an array of strings"))
    }

    /// A nested JSON object.
    pub fn object(&self, key: &'static str) -> Result<Option<Keys<'a>>> {
        match self.json(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Keys::Json { file: self.file().to_path_buf(), path: key, map }))
            }
            Some(value) => Err(self.invalid(key, kind(value), "an object")),
        }
    }

    pub fn has(&self, key: &str) -> bool {
        match self {
            Keys::Gguf { metadata, .. } => metadata.get(&self.name(key)).is_some(),
            Keys::Json { .. } => self.json(key).is_some(),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a bool",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array of something else",
        Value::Object(_) => "an object",
    }
}
