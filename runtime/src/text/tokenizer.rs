//! One tokenizer for every model file.

use super::{
    engine::Pipeline,
    gguf_tokenizer, json_tokenizer,
    marks::{self, ControlTexts},
    pieces::Pieces,
    specials::REASONING_TAGS,
};
use crate::{
    error::{Error, Result},
    files::Metadata,
};
use std::{borrow::Cow, collections::BTreeSet, path::Path};

/// Bounds on what a tokenizer file may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of `tokenizer.json`.
    pub json_bytes: u64,
    /// Nesting of any JSON file beside it.
    pub json_depth: usize,
    /// Size of one text to encode.
    pub text_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { json_bytes: 64 << 20, json_depth: 64, text_bytes: 64 << 20 }
    }
}

/// What control-token text in a text means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextKind {
    /// Somebody wrote it: control-token text is text.
    Plain,
    /// A template rendered it from protected strings ([`Tokenizer::protect`]):
    /// unbroken control-token text is that token.
    Rendered,
}

/// How a stand-alone document begins and ends.
#[derive(Debug)]
pub(super) enum DocumentRule {
    /// As `tokenizer.json`'s post-processor says; `add_bos_token` overrules.
    PostProcessor { add_bos: Option<bool> },
    /// These ids around the text.
    Affixes { prefix: Option<u32>, suffix: Option<u32> },
}

/// What the two loaders hand over.
pub(super) struct Parts {
    pub pipeline: Pipeline,
    pub pieces: Pieces,
    /// Texts that only a template may turn into tokens.
    pub control_texts: Vec<String>,
    pub bos: Option<u32>,
    pub eos_ids: BTreeSet<u32>,
    pub document: DocumentRule,
    /// The first space of a decoded text is the tokenizer's, not the text's.
    pub strips_first_space: bool,
    /// `bos_token`, `eos_token`, ... for templates.
    pub named: Vec<(String, String)>,
    pub chat_template: Option<String>,
    pub kind: String,
}

/// Turns text into token ids and back.
///
/// Unlike llama.cpp and the `clean_up_tokenization_spaces` option of Hugging
/// Face, decoding never removes spaces before punctuation: the text is what
/// the tokens say. Bytes that are not UTF-8 decode to U+FFFD, one per maximal
/// invalid sequence.
pub struct Tokenizer {
    parts: Parts,
    controls: ControlTexts,
    controls_but_reasoning: ControlTexts,
    limits: Limits,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({}, {} tokens)", self.parts.kind, self.vocab_size())
    }
}

impl Tokenizer {
    fn new(parts: Parts, limits: Limits) -> Self {
        let texts = || parts.control_texts.iter().map(String::as_str);
        let controls = ControlTexts::new(texts());
        let controls_but_reasoning =
            ControlTexts::new(texts().filter(|text| !REASONING_TAGS.contains(text)));
        Self { parts, controls, controls_but_reasoning, limits }
    }

    /// Reads a Hugging Face `tokenizer.json` and, where they lie beside it,
    /// `tokenizer_config.json`, `generation_config.json`, `config.json` and
    /// `chat_template.jinja`.
    pub fn from_json_file(path: &Path, limits: Limits) -> Result<Self> {
        Ok(Self::new(json_tokenizer::load(path, &limits)?, limits))
    }

    /// Builds the tokenizer that a GGUF file's `tokenizer.ggml.*` keys
    /// describe. An unknown model or pre-tokenizer is refused.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self> {
        Ok(Self::new(gguf_tokenizer::load(metadata)?, Limits::default()))
    }

    /// Ids of `text`, nothing added in front or behind.
    pub fn encode(&self, text: &str, kind: TextKind) -> Result<Vec<u32>> {
        self.run(text, kind, false)
    }

    /// Ids of a text that stands alone: the model's BOS and EOS tokens are
    /// added where the model wants them. Control-token text is text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        match self.parts.document {
            DocumentRule::Affixes { prefix, suffix } => {
                let mut ids: Vec<u32> = prefix.into_iter().collect();
                ids.extend(self.run(text, TextKind::Plain, false)?);
                ids.extend(suffix);
                Ok(ids)
            }
            DocumentRule::PostProcessor { add_bos } => {
                let mut ids = self.run(text, TextKind::Plain, true)?;
                let has_bos = ids.first().copied() == self.parts.bos && self.parts.bos.is_some();
                match (add_bos, self.parts.bos) {
                    (Some(true), Some(bos)) if !has_bos => ids.insert(0, bos),
                    (Some(false), Some(_)) if has_bos => {
                        ids.remove(0);
                    }
                    _ => {}
                }
                Ok(ids)
            }
        }
    }

    fn run(&self, text: &str, kind: TextKind, post_process: bool) -> Result<Vec<u32>> {
        if text.len() > self.limits.text_bytes {
            return Err(Error::Request(format!(
                "the text has {} bytes; at most {} are tokenised at once",
                text.len(),
                self.limits.text_bytes
            )));
        }
        let marked = match kind {
            TextKind::Plain => self.controls.protect(text),
            TextKind::Rendered => Cow::Borrowed(text),
        };
        let encoding = self
            .parts
            .pipeline
            .encode_fast(marked.as_ref(), post_process)
            .map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A user's string, made safe for a chat template: the rendered prompt
    /// encoded as [`TextKind::Rendered`] holds no control token that the
    /// string spelled. Strings without control-token text are unchanged; in
    /// others invisible marks break it (see `marks.rs`), which
    /// [`Tokenizer::unprotect`] removes.
    pub fn protect<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.controls.protect(text)
    }

    /// Like [`Tokenizer::protect`] for an earlier answer of the model: tags
    /// around its reasoning stay whole, because templates look for them.
    pub fn protect_answer<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.controls_but_reasoning.protect(text)
    }

    /// A rendered prompt as a person should see it.
    pub fn unprotect<'t>(&self, text: &'t str) -> Cow<'t, str> {
        marks::unmark(text)
    }

    /// The text of `ids`. With `skip_special`, control tokens give nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        let skip = usize::from(self.parts.strips_first_space && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[skip..]).into_owned()
    }

    /// The bytes of one token; none for an id that the vocabulary lacks.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.parts.pieces.get(id).unwrap_or_default()
    }

    /// One token as text, for people: broken UTF-8 shows as U+FFFD.
    pub fn token_text(&self, id: u32) -> Cow<'_, str> {
        String::from_utf8_lossy(self.token_bytes(id))
    }

    /// Whether it is a control token, which [`Tokenizer::decode`] can skip.
    pub fn is_special(&self, id: u32) -> bool {
        self.parts.pieces.is_special(id)
    }

    /// Tokens that end an answer, ascending.
    pub fn eos_ids(&self) -> &BTreeSet<u32> {
        &self.parts.eos_ids
    }

    pub fn is_eos(&self, id: u32) -> bool {
        self.parts.eos_ids.contains(&id)
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.parts.bos
    }

    /// One more than the highest id. A model whose output layer has fewer
    /// rows cannot produce all of it.
    pub fn vocab_size(&self) -> usize {
        self.parts.pieces.len()
    }

    /// `bos_token`, `eos_token`, ... and their texts: what chat templates
    /// expect as variables.
    pub fn named_tokens(&self) -> &[(String, String)] {
        &self.parts.named
    }

    /// The source of the model's chat template, if its files have one.
    pub fn chat_template(&self) -> Option<&str> {
        self.parts.chat_template.as_deref()
    }

    /// What it was built from, such as `gguf gpt2/qwen2`.
    pub fn kind(&self) -> &str {
        &self.parts.kind
    }

    pub(super) fn strips_first_space(&self) -> bool {
        self.parts.strips_first_space
    }
}
