//! `pregate tokenize`: text to ids and back.

use crate::{cli::TokenizeArgs, exit::Failure, model, output};
use pregate_runtime::{
    files::ModelFiles,
    model::read_tokenizer,
    text::{TextKind, Tokenizer},
};
use serde_json::json;
use std::io::{self, IsTerminal, Read, Write};

pub fn run(args: &TokenizeArgs) -> Result<(), Failure> {
    let path = model::path_or_demo(args.model.as_deref())?;
    let tokenizer = read_tokenizer(&ModelFiles::open(&path)?)?;
    if let Some(list) = &args.decode {
        return decode(&tokenizer, &parse_ids(list)?, args.json);
    }
    let text = match &args.text {
        Some(text) => text.clone(),
        None => read_text()?,
    };
    let ids = match (args.document, args.control) {
        (true, _) => tokenizer.encode_document(&text)?,
        (_, true) => tokenizer.encode(&text, TextKind::Rendered)?,
        _ => tokenizer.encode(&text, TextKind::Plain)?,
    };
    let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.token_text(id).into_owned()).collect();
    if args.json {
        return output::json(&json!({
            "tokenizer": tokenizer.kind(),
            "ids": ids,
            "pieces": pieces,
        }));
    }
    let mut out = io::stdout().lock();
    for (id, piece) in ids.iter().zip(&pieces) {
        writeln!(out, "{id:>8}  {piece:?}").map_err(Failure::output)?;
    }
    Ok(())
}

fn decode(tokenizer: &Tokenizer, ids: &[u32], as_json: bool) -> Result<(), Failure> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= tokenizer.vocab_size()) {
        let size = tokenizer.vocab_size();
        return Err(Failure::Usage(format!("token id {id}; allowed: 0 to {}", size - 1)));
    }
    let text = tokenizer.decode(ids, false);
    if as_json { output::json(&json!({ "ids": ids, "text": text })) } else { output::line(&text) }
}

fn parse_ids(list: &str) -> Result<Vec<u32>, Failure> {
    let inner = list.trim().trim_start_matches('[').trim_end_matches(']');
    inner
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            part.parse().map_err(|_| {
                Failure::Usage(format!("--decode: {part:?} is not a token id; allowed: 1,2,3"))
            })
        })
        .collect()
}

/// Standard input as text, refused from a keyboard that nobody announced.
pub fn read_text() -> Result<String, Failure> {
    let mut input = io::stdin();
    if input.is_terminal() {
        return Err(Failure::Usage(
            "no text: give it as an argument or through a pipe".to_string(),
        ));
    }
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).map_err(|error| Failure::io("standard input", error))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::Usage(format!("standard input is not UTF-8 at byte {at}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_both_spellings() {
        assert_eq!(parse_ids("1, 2,3").unwrap(), [1, 2, 3]);
        assert_eq!(parse_ids("[7,8]").unwrap(), [7, 8]);
        for bad in ["x", "-1", "1 2", "4294967296", "1.5"] {
            assert!(parse_ids(bad).is_err(), "{bad}");
        }
    }
}
