//! The bytes that each token stands for.

use std::borrow::Cow;

/// How a vocabulary writes bytes in its token texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// GPT-2's table of 256 printable characters.
    ByteLevel,
    /// U+2581 for a space; tokens named `<0xXX>` are one byte if
    /// `byte_tokens`.
    Spaces { byte_tokens: bool },
}

/// The byte that a character of GPT-2's table stands for: printable Latin-1
/// characters are themselves, the other bytes follow from U+0100.
fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The value of a `<0xXX>` token.
pub fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let two_digits = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    two_digits.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

impl Spelling {
    /// The bytes of an ordinary token.
    pub fn bytes(self, text: &str) -> Cow<'_, [u8]> {
        match self {
            Self::ByteLevel => match text.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => Cow::Owned(bytes),
                None => Cow::Borrowed(text.as_bytes()),
            },
            Self::Spaces { byte_tokens } => match byte_token(text) {
                Some(byte) if byte_tokens => Cow::Owned(vec![byte]),
                _ if text.contains('\u{2581}') => {
                    Cow::Owned(text.replace('\u{2581}', " ").into_bytes())
                }
                _ => Cow::Borrowed(text.as_bytes()),
            },
        }
    }
}

/// Bytes and kind of every id, holes included.
#[derive(Debug, Default)]
pub struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    special: Vec<bool>,
}

impl Pieces {
    /// Adds the next id.
    pub fn push(&mut self, bytes: &[u8], special: bool) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.special.push(special);
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn get(&self, id: u32) -> Option<&[u8]> {
        let index = id as usize;
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.bytes[start..end])
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_table_is_the_one_of_the_tokenizers_crate() {
        use tokenizers::{NormalizedString, OffsetReferential, OffsetType, PreTokenizer};
        let step = tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, false, false);
        let text: String = (0..0x250).filter_map(char::from_u32).chain("中🙂".chars()).collect();
        let mut pieces = tokenizers::PreTokenizedString::from(NormalizedString::from(&*text));
        step.pre_tokenize(&mut pieces).unwrap();
        let written: String = pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .iter()
            .map(|split| split.0)
            .collect();
        assert_eq!(Spelling::ByteLevel.bytes(&written).as_ref(), text.as_bytes());
        let table: std::collections::HashSet<u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!(table.len(), 256);
    }

    #[test]
    fn byte_tokens_are_two_hex_digits() {
        assert_eq!(byte_token("<0xE2>"), Some(0xE2));
        for text in ["<0x>", "<0x1>", "<0x123>", "0x12", "<0xZZ>", "<0x+1>"] {
            assert_eq!(byte_token(text), None, "{text}");
        }
        let spelling = Spelling::Spaces { byte_tokens: true };
        assert_eq!(spelling.bytes("\u{2581}a").as_ref(), b" a");
        assert_eq!(spelling.bytes("<0x0A>").as_ref(), b"\n");
    }
}
