//! How Python writes values: `str()`, `repr()`, `json.dumps()`.
//! Chat templates were written against it, so prompts must look like it.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Tuple, ValueKind},
};
use std::fmt::Write;

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The deepest value that is written.
const MOST_NESTING: usize = 100;

/// `str(value)`: strings as they are, everything else as `repr`; undefined
/// is empty, as in Jinja2.
pub fn text(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_string());
    }
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut out = String::new();
    repr(&mut out, value, 0)?;
    Ok(out)
}

/// `repr(value)`.
fn repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MOST_NESTING {
        return Err(invalid("the value nests too deep"));
    }
    let list = |out: &mut String, open: char, close: char| -> Result<usize, Error> {
        out.push(open);
        let mut count = 0;
        for item in value.try_iter()? {
            if count > 0 {
                out.push_str(", ");
            }
            repr(out, &item, depth + 1)?;
            count += 1;
        }
        if open == '(' && count == 1 {
            out.push(',');
        }
        out.push(close);
        Ok(count)
    };
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => repr_string(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq if value.downcast_object_ref::<Tuple>().is_some() => {
            list(out, '(', ')')?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            list(out, '[', ']')?;
        }
        ValueKind::Map => {
            out.push('{');
            for (count, key) in value.try_iter()?.enumerate() {
                if count > 0 {
                    out.push_str(", ");
                }
                repr(out, &key, depth + 1)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn repr_string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7F..=0xA0).contains(&(c as u32)) || c == '\u{AD}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// A number as Python prints it: floats in their shortest form, with an
/// exponent outside of 1e-4..1e16.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(number) if number.is_nan() => "nan".to_string(),
        Ok(number) if number.is_infinite() => if number > 0.0 { "inf" } else { "-inf" }.to_string(),
        Ok(number) => {
            let scientific = format!("{number:e}");
            let exponent: i32 =
                scientific.split_once('e').and_then(|parts| parts.1.parse().ok()).unwrap_or(0);
            if number != 0.0 && !(-4..16).contains(&exponent) {
                let mantissa = scientific.split('e').next().unwrap_or_default();
                let sign = if exponent < 0 { '-' } else { '+' };
                format!("{mantissa}e{sign}{:02}", exponent.abs())
            } else {
                format!("{number:?}")
            }
        }
        Err(_) => value.to_string(),
    }
}

/// `json.dumps` with the options that the `tojson` filter of Hugging Face
/// takes.
#[derive(Clone, Debug)]
pub struct Json {
    pub ensure_ascii: bool,
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl Json {
    pub fn write(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.value(&mut out, value, 0)?;
        Ok(out)
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }

    fn value(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MOST_NESTING {
            return Err(invalid("the value nests too deep"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(match number(value).as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                finite => finite,
            }),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable
                if !super::template_functions::is_generator(value) =>
            {
                let items: Vec<Value> = value.try_iter()?.collect();
                out.push('[');
                for (count, item) in items.iter().enumerate() {
                    if count > 0 {
                        out.push_str(&self.item_separator);
                    }
                    self.line(out, depth + 1);
                    self.value(out, item, depth + 1)?;
                }
                if !items.is_empty() {
                    self.line(out, depth);
                }
                out.push(']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                out.push('{');
                for (count, key) in keys.iter().enumerate() {
                    if count > 0 {
                        out.push_str(&self.item_separator);
                    }
                    self.line(out, depth + 1);
                    match key.kind() {
                        ValueKind::String => self.string(out, key.as_str().unwrap_or_default()),
                        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                            let mut plain = String::new();
                            self.value(&mut plain, key, depth + 1)?;
                            self.string(out, &plain);
                        }
                        _ => return Err(invalid("keys of JSON objects must be simple values")),
                    }
                    out.push_str(&self.key_separator);
                    self.value(out, &value.get_item(key)?, depth + 1)?;
                }
                if !keys.is_empty() {
                    self.line(out, depth);
                }
                out.push('}');
            }
            kind => return Err(invalid(format!("{kind} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 => {
                    let _ = write!(out, "\\u{:04x}", c as u32);
                }
                c if self.ensure_ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                // Python leaves DEL alone, with and without ensure_ascii.
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(value: serde_json::Value) -> Value {
        Value::from(minijinja::value::Serde(value))
    }

    #[test]
    fn values_print_as_in_python() {
        for (value, expected) in [
            (json!({"a": [1, 2.0, null, true]}), "{'a': [1, 2.0, None, True]}"),
            (json!("it's\n"), "it's\n"),
            (json!(["it's", "\"", "a\\b\n\u{7f}é"]), r#"["it's", '"', 'a\\b\n\x7fé']"#),
            (json!(1e16), "1e+16"),
            (json!(123456789.125), "123456789.125"),
            (json!(0.00001), "1e-05"),
            (json!(0.0001), "0.0001"),
            (json!(1.5e300), "1.5e+300"),
            (json!(0.0), "0.0"),
            (json!(9007199254740993_u64), "9007199254740993"),
        ] {
            assert_eq!(text(&of(value)).unwrap(), expected);
        }
        assert_eq!(text(&Value::UNDEFINED).unwrap(), "");
        assert_eq!(text(&Value::from(Tuple::from(vec![Value::from(1)]))).unwrap(), "(1,)");
    }

    #[test]
    fn json_is_written_as_json_dumps_writes_it() {
        let plain = Json {
            ensure_ascii: false,
            indent: None,
            item_separator: ", ".to_string(),
            key_separator: ": ".to_string(),
            sort_keys: false,
        };
        let value = of(json!({"b": [1, "é\u{1f}\"</"], "a": {}, "c": []}));
        assert_eq!(
            plain.write(&value).unwrap(),
            "{\"b\": [1, \"é\\u001f\\\"</\"], \"a\": {}, \"c\": []}"
        );
        let pretty = Json {
            ensure_ascii: true,
            indent: Some("  ".to_string()),
            item_separator: ",".to_string(),
            sort_keys: true,
            ..plain.clone()
        };
        assert_eq!(
            pretty.write(&value).unwrap(),
            "{\n  \"a\": {},\n  \"b\": [\n    1,\n    \"\\u00e9\\u001f\\\"</\"\n  ],\n  \"c\": []\n}"
        );
        assert!(plain.write(&Value::UNDEFINED).is_err());
    }
}
