//! A tokenizer from Hugging Face's `tokenizer.json` and the small files
//! beside it.

use super::{
    engine::{Pipeline, Unmark},
    pieces::{Pieces, Spelling},
    specials::{end_of_turn_ids, looks_like_control},
    tokenizer::{DocumentRule, Limits, Parts},
};
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::Path,
};
use tokenizers::AddedToken;

/// More ids than any published vocabulary has, and few enough to index.
pub const MOST_TOKENS: usize = 1 << 22;

/// The parts of the file that the crate keeps to itself.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: ModelOutline,
}

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Default, Deserialize)]
struct ModelOutline {
    #[serde(default, rename = "type")]
    kind: Option<String>,
}

pub fn load(path: &Path, limits: &Limits) -> Result<Parts> {
    let bytes = read(path, limits)?;
    let outline: Outline =
        serde_json::from_slice(&bytes).map_err(|error| invalid(path, "tokenizer.json", error))?;
    let mut pipeline: Pipeline =
        serde_json::from_slice(&bytes).map_err(|error| invalid(path, "tokenizer.json", error))?;
    drop(bytes);
    pipeline.with_padding(None);
    pipeline.with_truncation(None).map_err(|error| invalid(path, "truncation", error))?;
    if pipeline.get_normalizer().is_none() {
        pipeline
            .with_normalizer(Some(Unmark::default()))
            .map_err(|error| invalid(path, "normalizer", error))?;
    }
    match_control_tokens_before_normalising(&mut pipeline, path)?;

    let decoding = decoding(path, &outline.decoder)?;
    let ids = ids(path, &pipeline, &outline)?;
    let added: HashMap<u32, &Added> =
        outline.added_tokens.iter().map(|token| (token.id as u32, token)).collect();
    let mut pieces = Pieces::default();
    for (id, text) in ids.iter().enumerate() {
        match (added.get(&(id as u32)), text) {
            (Some(token), _) => pieces.push(token.content.as_bytes(), token.special),
            (None, Some(text)) => pieces.push(&decoding.spelling.bytes(text), false),
            (None, None) => pieces.push(&[], false),
        }
    }

    let beside = Beside::read(path, limits)?;
    let id_of = |text: &str| pipeline.token_to_id(text);
    let bos = beside.named("bos_token").and_then(|text| id_of(&text)).or(beside.bos_id);
    let mut eos_ids = beside.eos_ids.clone();
    eos_ids.extend(beside.named("eos_token").and_then(|text| id_of(&text)));
    let present: Vec<(&str, u32)> =
        added.iter().map(|(&id, token)| (token.content.as_str(), id)).collect();
    eos_ids.extend(end_of_turn_ids(&present));
    eos_ids.retain(|&id| (id as usize) < pieces.len());
    let bos = bos.filter(|&id| (id as usize) < pieces.len());

    let control = |token: &&Added| token.special || looks_like_control(&token.content);
    let control_texts =
        outline.added_tokens.iter().filter(control).map(|token| token.content.clone()).collect();
    Ok(Parts {
        pipeline,
        pieces,
        control_texts,
        bos,
        eos_ids,
        document: DocumentRule::PostProcessor {
            add_bos: beside.tokenizer_config.get("add_bos_token").and_then(Value::as_bool),
        },
        strips_first_space: decoding.strips_first_space,
        named: beside.all_named(),
        chat_template: beside.chat_template,
        kind: format!("tokenizer.json {}", outline.model.kind.as_deref().unwrap_or("BPE")),
    })
}

/// A control token whose text is searched for after normalisation would match
/// after marks are gone, so all of them are searched for before. Libraries
/// that load the same files do that too: `tokenizer_config.json` says
/// `normalized: false` for control tokens.
fn match_control_tokens_before_normalising(pipeline: &mut Pipeline, path: &Path) -> Result<()> {
    let mut changed: Vec<(u32, AddedToken)> = pipeline
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(_, token)| token.normalized)
        .filter(|(_, token)| token.special || looks_like_control(&token.content))
        .map(|(id, token)| (id, token.normalized(false)))
        .collect();
    changed.sort_by_key(|(id, _)| *id);
    pipeline
        .add_tokens(changed.into_iter().map(|(_, token)| token))
        .map_err(|error| invalid(path, "added_tokens", error))?;
    Ok(())
}

fn invalid(path: &Path, field: &str, error: impl std::fmt::Display) -> Error {
    Error::invalid(path, None, field, error.to_string(), "a valid tokenizer description")
}

/// The text of every id; `None` where the vocabulary has a hole.
fn ids(path: &Path, pipeline: &Pipeline, outline: &Outline) -> Result<Vec<Option<String>>> {
    let vocabulary = pipeline.get_vocab(true);
    for token in &outline.added_tokens {
        let given = vocabulary.get(&token.content).copied().map(u64::from);
        if given != Some(token.id) && !token.content.is_empty() {
            return Err(Error::invalid(
                path,
                None,
                format!("added_tokens: {:?}", token.content),
                format!("id {}", token.id),
                match given {
                    Some(id) => format!("{id}, which the vocabulary gives it"),
                    None => "the next free id".to_string(),
                },
            ));
        }
    }
    let highest = vocabulary.values().copied().max().unwrap_or(0) as usize;
    if vocabulary.is_empty() || highest >= MOST_TOKENS {
        return Err(Error::invalid(
            path,
            None,
            "model.vocab",
            format!("{} tokens, highest id {highest}", vocabulary.len()),
            format!("1 to {MOST_TOKENS} tokens with ids below {MOST_TOKENS}"),
        ));
    }
    let mut texts = vec![None; highest + 1];
    for (text, id) in vocabulary {
        if let Some(other) = texts[id as usize].replace(text) {
            let two = [other, texts[id as usize].clone().unwrap_or_default()];
            return Err(Error::invalid(
                path,
                None,
                format!("id {id}"),
                format!("{:?} and {:?}", two[0], two[1]),
                "one token per id",
            ));
        }
    }
    Ok(texts)
}

struct Decoding {
    spelling: Spelling,
    strips_first_space: bool,
}

/// Reads the `decoder` section. Only what can be undone token by token is
/// supported, which is all that language models use.
fn decoding(path: &Path, decoder: &Value) -> Result<Decoding> {
    let kind = |step: &Value| step.get("type").and_then(Value::as_str).map(str::to_string);
    let unsupported = |found: String| Error::Unsupported {
        file: path.to_path_buf(),
        what: "decoder",
        found,
        supported: "ByteLevel; Metaspace; a Sequence of Replace (U+2581 by a space), \
                    ByteFallback, Fuse, Strip (one leading space), ByteLevel"
            .to_string(),
    };
    let steps = match kind(decoder).as_deref() {
        Some("Sequence") => {
            decoder.get("decoders").and_then(Value::as_array).cloned().unwrap_or_default()
        }
        _ => vec![decoder.clone()],
    };
    let mut byte_level = false;
    let mut spaces = false;
    let mut byte_tokens = false;
    let mut strips_first_space = false;
    for step in &steps {
        let text = |value: &Value, key: &str| {
            value.get(key).and_then(Value::as_str).unwrap_or_default().to_string()
        };
        match kind(step).as_deref() {
            Some("ByteLevel") => byte_level = true,
            Some("Fuse") => {}
            Some("ByteFallback") => byte_tokens = true,
            Some("Metaspace") if text(step, "replacement") == "\u{2581}" => {
                spaces = true;
                let scheme = step.get("prepend_scheme").and_then(Value::as_str);
                let prefix = step.get("add_prefix_space").and_then(Value::as_bool);
                strips_first_space |= scheme.map_or(prefix != Some(false), |name| name != "never");
            }
            Some("Replace")
                if step.pointer("/pattern/String").and_then(Value::as_str) == Some("\u{2581}")
                    && text(step, "content") == " " =>
            {
                spaces = true;
            }
            Some("Strip")
                if text(step, "content") == " "
                    && step.get("start").and_then(Value::as_u64) == Some(1)
                    && step.get("stop").and_then(Value::as_u64) == Some(0) =>
            {
                strips_first_space = true;
            }
            Some(other) => return Err(unsupported(crate::error::printable(other.to_string()))),
            None => return Err(unsupported("none".to_string())),
        }
    }
    let spelling = match (byte_level, spaces || byte_tokens) {
        (true, false) => Spelling::ByteLevel,
        (false, true) => Spelling::Spaces { byte_tokens },
        _ => return Err(unsupported("this combination of steps".to_string())),
    };
    Ok(Decoding { spelling, strips_first_space })
}

/// What the files beside `tokenizer.json` say.
#[derive(Default)]
struct Beside {
    tokenizer_config: serde_json::Map<String, Value>,
    bos_id: Option<u32>,
    eos_ids: BTreeSet<u32>,
    chat_template: Option<String>,
}

impl Beside {
    fn read(path: &Path, limits: &Limits) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut found = Self {
            tokenizer_config: object(&folder.join("tokenizer_config.json"), limits)?,
            ..Self::default()
        };
        let config = object(&folder.join("config.json"), limits)?;
        let generation = object(&folder.join("generation_config.json"), limits)?;
        let text = config.get("text_config").and_then(Value::as_object);
        for source in [Some(&generation), Some(&config), text].into_iter().flatten() {
            match source.get("eos_token_id") {
                Some(Value::Array(list)) => found.eos_ids.extend(list.iter().filter_map(id)),
                Some(value) => found.eos_ids.extend(id(value)),
                None => {}
            }
            let bos = source.get("bos_token_id").and_then(id);
            found.bos_id = found.bos_id.or(bos);
        }
        let file = folder.join("chat_template.jinja");
        found.chat_template = match file.is_file() {
            true => Some(String::from_utf8(read_bytes(&file, 1 << 20)?).map_err(|error| {
                Error::invalid(&file, None, "encoding", error.to_string(), "UTF-8")
            })?),
            false => template_of(found.tokenizer_config.get("chat_template")),
        };
        Ok(found)
    }

    /// `bos_token` and the like: a string, or an object with `content`.
    fn named(&self, key: &str) -> Option<String> {
        let value = self.tokenizer_config.get(key)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
    }

    fn all_named(&self) -> Vec<(String, String)> {
        let keys = self.tokenizer_config.keys().filter(|key| key.ends_with("_token"));
        keys.filter_map(|key| Some((key.clone(), self.named(key)?))).collect()
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A template is a string, or a list of named ones, of which `default` counts.
fn template_of(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(source) => Some(source.clone()),
        Value::Array(list) => {
            let named = |name: &str| list.iter().find(|entry| entry["name"] == name);
            named("default")?.get("template")?.as_str().map(str::to_string)
        }
        _ => None,
    }
}

fn object(path: &Path, limits: &Limits) -> Result<serde_json::Map<String, Value>> {
    if !path.is_file() {
        return Ok(serde_json::Map::new());
    }
    let bytes = read(path, limits)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::invalid(path, None, "the file", "another JSON value", "an object")),
        Err(error) => Err(invalid(path, "the file", error)),
    }
}

fn read(path: &Path, limits: &Limits) -> Result<Vec<u8>> {
    let bytes = read_bytes(path, limits.json_bytes)?;
    match too_deep(&bytes, limits.json_depth) {
        None => Ok(bytes),
        Some(offset) => Err(Error::invalid(
            path,
            Some(offset as u64),
            "nesting",
            format!("more than {}", limits.json_depth),
            format!("at most {}", limits.json_depth),
        )),
    }
}

fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let io = |action| move |source| Error::Io { file: path.to_path_buf(), action, source };
    let size = fs::metadata(path).map_err(io("cannot look at it"))?.len();
    if size > limit {
        let found = format!("{size} bytes");
        return Err(Error::invalid(path, None, "size", found, format!("at most {limit} bytes")));
    }
    fs::read(path).map_err(io("cannot read it"))
}

/// Where brackets nest deeper than `limit`, outside strings.
fn too_deep(json: &[u8], limit: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut escaped = false;
    for (offset, &byte) in json.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > limit {
                    return Some(offset);
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_in_strings_do_not_count() {
        assert_eq!(too_deep(br#"{"a": "[[[[\"[[[", "b": [1]}"#, 2), None);
        assert_eq!(too_deep(br#"{"a": [[1]]}"#, 2), Some(7));
    }

    #[test]
    fn the_default_template_of_a_list_counts() {
        let list = serde_json::json!([
            {"name": "tool_use", "template": "t"},
            {"name": "default", "template": "d"},
        ]);
        assert_eq!(template_of(Some(&list)).as_deref(), Some("d"));
        assert_eq!(template_of(Some(&serde_json::json!("s"))).as_deref(), Some("s"));
        assert_eq!(template_of(Some(&serde_json::json!(3))), None);
    }
}
