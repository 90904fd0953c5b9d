//! Control-token text inside a user's string must stay text.
//!
//! The rule: [`protect`] writes a [`MARK`] after the first character of every
//! occurrence of a control token's text, and doubles every mark that the text
//! already had. The marked string goes through the chat template like any
//! other. In the rendered prompt a control token matches only where its text
//! is unbroken, which is where the template wrote it. [`unmark`] then removes
//! single marks and halves double ones, before normalisation, splitting and
//! merging, so that everything around is tokenised as if the mark had never
//! been there. A string without control-token text is never touched.

use std::{borrow::Cow, collections::HashMap};

/// A Unicode noncharacter: valid in strings, reserved for use inside a
/// program, assigned to nothing.
pub const MARK: char = '\u{FDD0}';

/// Finds control-token texts; built once per tokenizer.
#[derive(Debug, Default)]
pub struct ControlTexts {
    /// Children by (node, byte); node 0 is the root.
    edges: HashMap<(u32, u8), u32>,
    /// Whether a text ends at the node.
    ends: Vec<bool>,
}

impl ControlTexts {
    /// Texts of fewer than two characters cannot be broken and are left out.
    pub fn new<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut found = Self { edges: HashMap::new(), ends: vec![false] };
        for text in texts {
            if text.chars().nth(1).is_none() || text.contains(MARK) {
                continue;
            }
            let mut node = 0;
            for &byte in text.as_bytes() {
                let next = found.ends.len() as u32;
                node = *found.edges.entry((node, byte)).or_insert(next);
                if node == next {
                    found.ends.push(false);
                }
            }
            found.ends[node as usize] = true;
        }
        found
    }

    fn starts_here(&self, bytes: &[u8]) -> bool {
        let mut node = 0;
        for &byte in bytes {
            match self.edges.get(&(node, byte)) {
                Some(&next) if self.ends[next as usize] => return true,
                Some(&next) => node = next,
                None => return false,
            }
        }
        false
    }

    /// `text` with every occurrence of a control-token text broken,
    /// overlapping ones too.
    pub fn protect<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut marked = String::new();
        let mut copied = 0;
        for (at, c) in text.char_indices() {
            let end = at + c.len_utf8();
            if c == MARK || self.starts_here(&text.as_bytes()[at..]) {
                marked.push_str(&text[copied..end]);
                marked.push(MARK);
                copied = end;
            }
        }
        if copied == 0 {
            return Cow::Borrowed(text);
        }
        marked.push_str(&text[copied..]);
        Cow::Owned(marked)
    }
}

/// Which characters survive: a mark does when it follows an unpaired mark.
#[derive(Default)]
pub struct Unmarker {
    pending: std::cell::Cell<bool>,
}

impl Unmarker {
    pub fn keeps(&self, c: char) -> bool {
        if c != MARK {
            self.pending.set(false);
            return true;
        }
        self.pending.replace(!self.pending.get())
    }
}

/// Undoes [`ControlTexts::protect`]; for text that is shown rather than
/// tokenised.
pub fn unmark(text: &str) -> Cow<'_, str> {
    if !text.contains(MARK) {
        return Cow::Borrowed(text);
    }
    let unmarker = Unmarker::default();
    Cow::Owned(text.chars().filter(|&c| unmarker.keeps(c)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_text_without_control_tokens_is_not_copied() {
        let controls = ControlTexts::new(["<|im_end|>", "</s>"]);
        assert!(matches!(controls.protect("a < b <| c <|im_en"), Cow::Borrowed(_)));
    }

    #[test]
    fn overlapping_occurrences_are_all_broken() {
        let controls = ControlTexts::new(["aba"]);
        let marked = controls.protect("ababa");
        assert_eq!(marked, format!("a{MARK}ba{MARK}ba"));
        assert!(!marked.contains("aba"));
        assert_eq!(unmark(&marked), "ababa");
    }

    proptest! {
        #[test]
        fn marks_come_off_again_and_nothing_matches(text in "[<|ab>\u{FDD0}]{0,40}") {
            let names = ["<|a|>", "<|ab|>", "<a>", "a|>b"];
            let controls = ControlTexts::new(names);
            let marked = controls.protect(&text);
            for name in names {
                prop_assert!(!marked.contains(name), "{marked:?}");
            }
            prop_assert_eq!(unmark(&marked), text.as_str());
        }
    }
}
