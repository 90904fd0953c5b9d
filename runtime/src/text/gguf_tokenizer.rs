//! A tokenizer from GGUF metadata alone.
//!
//! Keys: `tokenizer.ggml.*` of the GGUF specification
//! (github.com/ggml-org/ggml/blob/master/docs/gguf.md).

use super::{
    engine::{Normalization, Pipeline, PreSplit, TextModel, Unmark},
    gguf_vocabulary::{Class, TOKENS, Vocabulary},
    pieces::{Spelling, byte_token},
    pretokenizers::{self, Pre},
    specials::{end_of_turn_ids, looks_like_control},
    spm::Spm,
    tokenizer::{DocumentRule, Parts},
};
use crate::{
    error::{Error, Result},
    files::Metadata,
};
use std::collections::HashMap;
use tokenizers::{
    AddedToken, ModelWrapper, TokenizerBuilder,
    models::{bpe::BPE, wordpiece::WordPiece},
    normalizers::BertNormalizer,
    pre_tokenizers::bert::BertPreTokenizer,
};

const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const MODELS: &str = "gpt2, llama, gemma4, bert";

/// The pieces of a pipeline that depend on the kind of tokenizer.
struct Design {
    model: TextModel,
    normalization: Normalization,
    pre: Option<PreSplit>,
    spelling: Spelling,
    strips_first_space: bool,
    add_bos: bool,
    kind: String,
}

pub fn load(metadata: &Metadata) -> Result<Parts> {
    const MODEL: &str = "tokenizer.ggml.model";
    let Some(model) = metadata.string(MODEL)? else {
        return Err(metadata.invalid(MODEL, "no such key", MODELS));
    };
    if !["gpt2", "llama", "gemma4", "bert"].contains(&model) {
        return Err(Error::Unsupported {
            file: metadata.file().clone(),
            what: "tokenizer model",
            found: crate::error::printable(model.to_string()),
            supported: MODELS.to_string(),
        });
    }
    let vocabulary = Vocabulary::read(metadata)?;
    let design = match model {
        "llama" => spm(metadata, &vocabulary)?,
        "bert" => bert(metadata, &vocabulary)?,
        "gemma4" => bpe(metadata, &vocabulary, "gemma4")?,
        _ => {
            const PRE: &str = "tokenizer.ggml.pre";
            let Some(pre) = metadata.string(PRE)? else {
                return Err(metadata.invalid(
                    PRE,
                    "no such key",
                    format!("one of: {}; convert the model again", pretokenizers::supported()),
                ));
            };
            bpe(metadata, &vocabulary, pre)?
        }
    };
    assemble(metadata, &vocabulary, design)
}

fn tokenizer_error(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer(crate::error::printable(error.to_string()))
}

fn bpe(metadata: &Metadata, vocabulary: &Vocabulary, name: &str) -> Result<Design> {
    let Some(pre) = pretokenizers::find(name) else {
        return Err(Error::Unsupported {
            file: metadata.file().clone(),
            what: "pre-tokenizer",
            found: crate::error::printable(name.to_string()),
            supported: pretokenizers::supported(),
        });
    };
    let Some(merges) = metadata.strings(MERGES)? else {
        return Err(metadata.invalid(MERGES, "no such key", "an array of strings"));
    };
    let ids: HashMap<&str, u32> =
        vocabulary.mergeable().map(|(id, text)| (text.as_str(), id)).collect();
    let others = vocabulary.others();
    let mut pairs = Vec::with_capacity(merges.len());
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let Some((left, right)) = two_parts(merge) else {
            return Err(unknown_merge(metadata, rank, merge));
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        let texts = [left, right, joined.as_str()];
        if texts.iter().all(|text| ids.contains_key(text)) {
            pairs.push((left.to_string(), right.to_string()));
        } else if !texts.iter().all(|text| ids.contains_key(text) || others.contains_key(*text)) {
            return Err(unknown_merge(metadata, rank, merge));
        }
        // What is left would make a control token out of text.
    }
    let Pre { whole_words, add_bos, byte_level, .. } = *pre;
    let model = BPE::builder()
        .vocab_and_merges(
            ids.into_iter().map(|(text, id)| (text.to_string(), id)).collect::<ahash_map::Map>(),
            pairs,
        )
        .ignore_merges(whole_words)
        .byte_fallback(!byte_level)
        .build()
        .map_err(tokenizer_error)?;
    let steps = pre.compile().map_err(tokenizer_error)?;
    Ok(Design {
        model: TextModel::Table {
            model: Box::new(ModelWrapper::BPE(model)),
            others,
            vocabulary: vocabulary.texts.len(),
        },
        normalization: match byte_level {
            true => Normalization::None,
            false => Normalization::Spaces { prefix: false },
        },
        pre: Some(PreSplit::Steps(steps)),
        spelling: match byte_level {
            true => Spelling::ByteLevel,
            false => Spelling::Spaces { byte_tokens: true },
        },
        strips_first_space: false,
        add_bos: add_bos || name == "gemma4",
        kind: format!("gguf gpt2/{name}"),
    })
}

/// Both sides of a merge. A token may begin with a space, so the separator is
/// the first one after the first character.
fn two_parts(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge[first..].find(' ')?;
    Some((&merge[..at], &merge[at + 1..]))
}

fn unknown_merge(metadata: &Metadata, rank: usize, merge: &str) -> Error {
    metadata.invalid(
        MERGES,
        format!("merge {rank}: {merge:?}"),
        "two tokens of the vocabulary whose joined text is one too",
    )
}

/// The map type of the `tokenizers` crate's vocabularies, by inference.
mod ahash_map {
    pub type Map = tokenizers::models::bpe::Vocab;
}

fn spm(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Design> {
    let count = vocabulary.texts.len();
    let Some(scores) = metadata.floats(SCORES)? else {
        return Err(metadata.invalid(SCORES, "no such key", "an array of floats"));
    };
    if scores.len() != count {
        let found = format!("{} entries", scores.len());
        return Err(metadata.invalid(SCORES, found, format!("{count}, one per token")));
    }
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(metadata.invalid(SCORES, format!("{} for token {id}", scores[id]), "finite"));
    }
    let mut byte_ids = [None; 256];
    let mut ids = HashMap::with_capacity(count);
    for (id, text) in vocabulary.mergeable() {
        match byte_token(text) {
            Some(byte) if vocabulary.classes[id as usize] == Class::Byte => {
                byte_ids[byte as usize] = Some(id);
            }
            _ => {
                ids.insert(text.as_str().into(), id);
            }
        }
    }
    let unknown = vocabulary.named(metadata, "unknown")?.or_else(|| {
        vocabulary.classes.iter().position(|class| *class == Class::Unknown).map(|id| id as u32)
    });
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok(Design {
        model: TextModel::Spm {
            spm: Box::new(Spm::new(ids, scores.to_vec(), byte_ids, unknown)),
            others: vocabulary.others(),
            vocabulary: count,
        },
        normalization: Normalization::Spaces { prefix },
        pre: None,
        spelling: Spelling::Spaces { byte_tokens: true },
        strips_first_space: prefix,
        add_bos: true,
        kind: "gguf llama".to_string(),
    })
}

/// WordPiece. GGUF writes a word's first piece with U+2581 in front and the
/// others bare, Hugging Face the others with `##`.
fn bert(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Design> {
    let mut ids = ahash_map::Map::default();
    for (id, text) in vocabulary.mergeable() {
        let written = match text.strip_prefix('\u{2581}') {
            Some(word) if !word.is_empty() => word.to_string(),
            _ => format!("##{text}"),
        };
        ids.insert(written, id);
    }
    let unknown = vocabulary.named(metadata, "unknown")?.unwrap_or(100);
    let Some(unknown_text) = vocabulary.texts.get(unknown as usize) else {
        return Err(metadata.invalid(TOKENS, "no unknown token", "one, such as [UNK]"));
    };
    ids.insert(unknown_text.clone(), unknown);
    let model = WordPiece::builder()
        .vocab(ids)
        .unk_token(unknown_text.clone())
        .continuing_subword_prefix("##".to_string())
        .build()
        .map_err(tokenizer_error)?;
    let lowercase = metadata.bool("tokenizer.ggml.normalizer.lowercase")?.unwrap_or(true);
    let strip_accents =
        metadata.bool("tokenizer.ggml.normalizer.strip_accents")?.unwrap_or(lowercase);
    let normalizer = BertNormalizer::new(true, true, Some(strip_accents), lowercase);
    Ok(Design {
        model: TextModel::Table {
            model: Box::new(ModelWrapper::WordPiece(model)),
            others: vocabulary.others(),
            vocabulary: vocabulary.texts.len(),
        },
        normalization: Normalization::Json(Box::new(normalizer.into())),
        pre: Some(PreSplit::Json(Box::new(BertPreTokenizer.into()))),
        spelling: Spelling::Spaces { byte_tokens: false },
        strips_first_space: true,
        add_bos: true,
        kind: "gguf bert".to_string(),
    })
}

fn assemble(metadata: &Metadata, vocabulary: &Vocabulary, design: Design) -> Result<Parts> {
    let is_bert = design.kind == "gguf bert";
    let is_spm = design.kind == "gguf llama";
    let mut pipeline: Pipeline = TokenizerBuilder::new()
        .with_model(design.model)
        .with_normalizer(Some(Unmark { then: design.normalization }))
        .with_pre_tokenizer(design.pre)
        .with_post_processor(None)
        .with_decoder(None)
        .build()
        .map_err(tokenizer_error)?;

    // Phi-3's control tokens swallow the white space behind them; GGUF has no
    // key for that, so the model's name has to say it.
    let name = metadata.string("general.name")?.unwrap_or_default().to_lowercase();
    let swallows = is_spm && ["phi-3", "phi3", "phi 3"].iter().any(|part| name.contains(part));
    let keeps = ["<unk>", "<s>", "<|endoftext|>"];
    let mut added = Vec::new();
    let mut control_texts = Vec::new();
    for (id, text) in vocabulary.texts.iter().enumerate() {
        let special = vocabulary.is_special(id);
        if text.is_empty() || !(special || vocabulary.classes[id] == Class::UserDefined) {
            continue;
        }
        if special || looks_like_control(text) {
            control_texts.push(text.clone());
        }
        let rstrip = swallows && !keeps.contains(&text.as_str());
        added.push(AddedToken::from(text, special).normalized(false).rstrip(rstrip));
    }
    pipeline.add_tokens(added).map_err(tokenizer_error)?;

    let or_default = |id: Option<u32>, default: u32| {
        let fits = is_spm && vocabulary.texts.len() > default as usize;
        id.or(fits.then_some(default))
    };
    let bert_default = |id: Option<u32>, text: &str| {
        let find = || vocabulary.texts.iter().position(|found| found == text);
        id.or_else(|| if is_bert { find().map(|id| id as u32) } else { None })
    };
    let bos = bert_default(or_default(vocabulary.named(metadata, "bos")?, 1), "[CLS]");
    let eos = or_default(vocabulary.named(metadata, "eos")?, 2);
    let separator = bert_default(vocabulary.named(metadata, "seperator")?, "[SEP]");
    let add_bos = metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(design.add_bos);
    let add_bos = add_bos || design.kind == "gguf gpt2/gemma4";
    let add_eos = metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);

    let present: Vec<(&str, u32)> = (0..vocabulary.texts.len())
        .filter(|&id| vocabulary.is_special(id) || vocabulary.classes[id] == Class::UserDefined)
        .map(|id| (vocabulary.texts[id].as_str(), id as u32))
        .collect();
    let mut eos_ids: std::collections::BTreeSet<u32> =
        end_of_turn_ids(&present).into_iter().collect();
    eos_ids.extend(eos);
    for key in ["eot", "eom"] {
        eos_ids.extend(vocabulary.named(metadata, key)?);
    }

    let mut named = Vec::new();
    let unknown = vocabulary.named(metadata, "unknown")?;
    let padding = vocabulary.named(metadata, "padding")?;
    for (key, id) in
        [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", padding)]
    {
        if let Some(id) = id {
            named.push((key.to_string(), vocabulary.texts[id as usize].clone()));
        }
    }
    Ok(Parts {
        pipeline,
        pieces: vocabulary.pieces(design.spelling),
        control_texts,
        bos,
        eos_ids,
        document: DocumentRule::Affixes {
            prefix: bos.filter(|_| add_bos),
            suffix: if is_bert { separator } else { eos.filter(|_| add_eos) },
        },
        strips_first_space: design.strips_first_space,
        named,
        chat_template: metadata.string("tokenizer.chat_template")?.map(str::to_string),
        kind: design.kind,
    })
}
