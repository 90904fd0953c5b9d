//! Texts and classes of a GGUF file's tokens, checked.

use super::{
    json_tokenizer::MOST_TOKENS,
    pieces::{Pieces, Spelling},
    specials::END_OF_TURN,
};
use crate::{error::Result, files::Metadata};
use std::collections::{HashMap, HashSet};

pub const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Ordinary,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

/// Text and class of every id, checked.
pub struct Vocabulary {
    pub texts: Vec<String>,
    pub classes: Vec<Class>,
}

impl Vocabulary {
    pub fn read(metadata: &Metadata) -> Result<Self> {
        let Some(tokens) = metadata.strings(TOKENS)? else {
            return Err(metadata.invalid(TOKENS, "no such key", "an array of strings"));
        };
        if tokens.is_empty() || tokens.len() > MOST_TOKENS {
            return Err(metadata.invalid(
                TOKENS,
                format!("{} tokens", tokens.len()),
                format!("1 to {}", MOST_TOKENS),
            ));
        }
        let mut seen = HashSet::with_capacity(tokens.len());
        for (id, text) in tokens.iter().enumerate() {
            if !text.is_empty() && !seen.insert(text.as_str()) {
                return Err(metadata.invalid(
                    TOKENS,
                    format!("token {id} repeats {text:?}"),
                    "every text once",
                ));
            }
        }
        let classes = match metadata.integers(TYPES)? {
            None => vec![Class::Ordinary; tokens.len()],
            Some(types) if types.len() != tokens.len() => {
                return Err(metadata.invalid(
                    TYPES,
                    format!("{} entries", types.len()),
                    format!("{}, one per token", tokens.len()),
                ));
            }
            Some(types) => types
                .iter()
                .map(|kind| match kind {
                    // 0 is "undefined", 5 is "unused".
                    0 | 1 | 5 => Ok(Class::Ordinary),
                    2 => Ok(Class::Unknown),
                    3 => Ok(Class::Control),
                    4 => Ok(Class::UserDefined),
                    6 => Ok(Class::Byte),
                    other => Err(metadata.invalid(TYPES, other.to_string(), "0 to 6")),
                })
                .collect::<Result<_>>()?,
        };
        let mut vocabulary = Self { texts: tokens.to_vec(), classes };
        vocabulary.mark_ends_of_turns(metadata)?;
        Ok(vocabulary)
    }

    /// Files without token types, and files that call their own end-of-turn
    /// token ordinary.
    fn mark_ends_of_turns(&mut self, metadata: &Metadata) -> Result<()> {
        if metadata.get(TYPES).is_none() {
            for (text, class) in self.texts.iter().zip(&mut self.classes) {
                if END_OF_TURN.contains(&text.as_str()) {
                    *class = Class::Control;
                }
            }
        }
        for name in ["bos", "eos", "eot", "eom"] {
            if let Some(id) = self.named(metadata, name)? {
                let class = &mut self.classes[id as usize];
                if *class == Class::Ordinary {
                    *class = Class::Control;
                }
            }
        }
        Ok(())
    }

    /// The id under `tokenizer.ggml.<name>_token_id`. Files exist that say
    /// 2^32-1 for "none".
    pub fn named(&self, metadata: &Metadata, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match metadata.unsigned(&key)? {
            None | Some(0xFFFF_FFFF) => Ok(None),
            Some(id) if id < self.texts.len() as u64 => Ok(Some(id as u32)),
            Some(id) => Err(metadata.invalid(
                &key,
                id.to_string(),
                format!("an id below {}", self.texts.len()),
            )),
        }
    }

    pub fn is_special(&self, id: usize) -> bool {
        matches!(self.classes[id], Class::Control | Class::Unknown)
    }

    /// Texts that merges may produce.
    pub fn mergeable(&self) -> impl Iterator<Item = (u32, &String)> {
        let fits = |id: &usize| !self.is_special(*id) && !self.texts[*id].is_empty();
        (0..self.texts.len()).filter(fits).map(|id| (id as u32, &self.texts[id]))
    }

    /// Texts that are matched as they are.
    pub fn others(&self) -> HashMap<Box<str>, u32> {
        let matched = |id: &usize| {
            (self.is_special(*id) || self.classes[*id] == Class::UserDefined)
                && !self.texts[*id].is_empty()
        };
        let all = (0..self.texts.len()).filter(matched);
        all.map(|id| (self.texts[id].as_str().into(), id as u32)).collect()
    }

    pub fn pieces(&self, spelling: Spelling) -> Pieces {
        let mut pieces = Pieces::default();
        for (id, text) in self.texts.iter().enumerate() {
            match self.classes[id] {
                Class::Control | Class::Unknown => pieces.push(text.as_bytes(), true),
                Class::UserDefined if spelling == Spelling::ByteLevel => {
                    pieces.push(text.as_bytes(), false);
                }
                _ => pieces.push(&spelling.bytes(text), false),
            }
        }
        pieces
    }
}
