//! Our own parts inside the `tokenizers` pipeline: a normaliser that takes
//! marks off first, models that keep control tokens out of reach of text,
//! and the splitting steps of GGUF pre-tokenizers.

use super::{
    marks::{MARK, Unmarker},
    pretokenizers::Step,
    spm::Spm,
};
use serde::{Deserialize, Deserializer};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};
use tokenizers::{
    Model, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Result, Token, TokenizerImpl,
    models::{TrainerWrapper, bpe::BpeTrainer},
};

/// The pipeline of the `tokenizers` crate with our parts in it. Its decoder
/// is not used: [`super::pieces`] decodes.
pub type Pipeline =
    TokenizerImpl<TextModel, Unmark, PreSplit, PostProcessorWrapper, tokenizers::DecoderWrapper>;

/// Turns one word into ids.
pub enum TextModel {
    /// Whatever `tokenizer.json` says.
    Json(Box<ModelWrapper>),
    /// Built from GGUF metadata; `others` are the control and user-defined
    /// tokens, which merges never produce.
    Table {
        model: Box<ModelWrapper>,
        others: HashMap<Box<str>, u32>,
        vocabulary: usize,
    },
    Spm {
        spm: Box<Spm>,
        others: HashMap<Box<str>, u32>,
        vocabulary: usize,
    },
}

impl<'de> Deserialize<'de> for TextModel {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        Ok(Self::Json(Box::new(ModelWrapper::deserialize(from)?)))
    }
}

fn with_offsets(sequence: &str, tokens: Vec<(u32, u32)>) -> Vec<Token> {
    let mut start = 0;
    tokens
        .into_iter()
        .map(|(id, bytes)| {
            let end = (start + bytes as usize).min(sequence.len());
            let token = Token::new(id, String::new(), (start, end));
            start = end;
            token
        })
        .collect()
}

impl Model for TextModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        match self {
            Self::Json(model) => model.tokenize(sequence),
            Self::Table { model, .. } => model.tokenize(sequence),
            Self::Spm { spm, .. } => Ok(with_offsets(sequence, spm.tokenize(sequence))),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Json(model) => model.token_to_id(token),
            Self::Table { model, others, .. } => {
                others.get(token).copied().or_else(|| model.token_to_id(token))
            }
            Self::Spm { spm, others, .. } => others.get(token).copied().or_else(|| spm.id(token)),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Json(model) => model.id_to_token(id),
            // Pieces come from the metadata, not from here.
            _ => None,
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Self::Json(model) => model.get_vocab(),
            _ => HashMap::new(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Self::Json(model) => model.get_vocab_size(),
            Self::Table { vocabulary, .. } | Self::Spm { vocabulary, .. } => *vocabulary,
        }
    }

    fn save(&self, _: &Path, _: Option<&str>) -> Result<Vec<PathBuf>> {
        Err("this tokenizer cannot be saved".into())
    }

    fn get_trainer(&self) -> Self::Trainer {
        BpeTrainer::default().into()
    }
}

/// Takes marks off, then normalises as the model wants.
#[derive(Default)]
pub struct Unmark {
    pub then: Normalization,
}

#[derive(Default)]
pub enum Normalization {
    #[default]
    None,
    /// What `tokenizer.json` says, or one of the crate's.
    Json(Box<NormalizerWrapper>),
    /// Spaces become U+2581; `prefix` adds one in front of every text run.
    Spaces { prefix: bool },
}

impl<'de> Deserialize<'de> for Unmark {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let inner = NormalizerWrapper::deserialize(from)?;
        Ok(Self { then: Normalization::Json(Box::new(inner)) })
    }
}

impl Normalizer for Unmark {
    fn normalize(&self, text: &mut NormalizedString) -> Result<()> {
        if text.get().contains(MARK) {
            let unmarker = Unmarker::default();
            text.filter(|c| unmarker.keeps(c));
        }
        match &self.then {
            Normalization::None => {}
            Normalization::Json(inner) => inner.normalize(text)?,
            Normalization::Spaces { prefix } => {
                if *prefix {
                    text.prepend(" ");
                }
                if text.get().contains(' ') {
                    text.map(|c| if c == ' ' { '\u{2581}' } else { c });
                }
            }
        }
        Ok(())
    }
}

/// Splits text into words.
pub enum PreSplit {
    Json(Box<PreTokenizerWrapper>),
    Steps(Vec<Step>),
}

impl<'de> Deserialize<'de> for PreSplit {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        Ok(Self::Json(Box::new(PreTokenizerWrapper::deserialize(from)?)))
    }
}

impl PreTokenizer for PreSplit {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        match self {
            Self::Json(inner) => inner.pre_tokenize(text),
            Self::Steps(steps) => steps.iter().try_for_each(|step| step.pre_tokenize(text)),
        }
    }
}
