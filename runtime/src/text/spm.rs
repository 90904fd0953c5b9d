//! SentencePiece "BPE" as in Llama 2, Mistral v1 and Gemma vocabularies: no
//! merge list, the score of the merged token ranks a merge.
//!
//! Start from characters; again and again join the neighbours whose
//! concatenation is the token with the highest score (leftmost on ties);
//! what is not a token at the end is written as `<0xXX>` byte tokens.
//! Source: Kudo and Richardson 2018, "SentencePiece", section 3.1.

use std::collections::{BinaryHeap, HashMap};

/// Vocabulary of a score-ranked model.
#[derive(Debug)]
pub struct Spm {
    /// By the token's text.
    ids: HashMap<Box<str>, u32>,
    scores: Vec<f32>,
    /// Token of each byte, for text that is in no other token.
    byte_ids: [Option<u32>; 256],
    unknown: Option<u32>,
    longest_bytes: usize,
}

const NONE: u32 = u32::MAX;

/// A run of the text; dead ones have length 0.
#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    len: u32,
    previous: u32,
    next: u32,
}

/// A possible merge; ordered by score, then leftmost first.
#[derive(PartialEq)]
struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    len: u32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Spm {
    /// `scores` has one finite entry per id. `ids` must not hold control
    /// tokens: a user's text could spell them.
    pub fn new(
        ids: HashMap<Box<str>, u32>,
        mut scores: Vec<f32>,
        byte_ids: [Option<u32>; 256],
        unknown: Option<u32>,
    ) -> Self {
        for score in &mut scores {
            // -0 and +0 are one score; `total_cmp` would order them.
            *score += 0.0;
        }
        let longest_bytes = ids.keys().map(|text| text.len()).max().unwrap_or(0);
        Self { ids, scores, byte_ids, unknown, longest_bytes }
    }

    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Ids of `text` with the byte length that each covers, in O(n log n).
    pub fn tokenize(&self, text: &str) -> Vec<(u32, u32)> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(index, (start, c))| Symbol {
                start: start as u32,
                len: c.len_utf8() as u32,
                previous: (index as u32).wrapping_sub(1),
                next: index as u32 + 1,
            })
            .collect();
        let Some(last) = symbols.last_mut() else { return Vec::new() };
        last.next = NONE;

        let mut heap = BinaryHeap::new();
        for left in 1..symbols.len() as u32 {
            heap.extend(self.candidate(text, &symbols, left - 1, left));
        }
        while let Some(candidate) = heap.pop() {
            let (left, right) = (candidate.left as usize, candidate.right as usize);
            let stale = symbols[left].len == 0
                || symbols[right].len == 0
                || symbols[left].len + symbols[right].len != candidate.len;
            if stale {
                continue;
            }
            symbols[left].len = candidate.len;
            symbols[right].len = 0;
            let next = symbols[right].next;
            symbols[left].next = next;
            if next != NONE {
                symbols[next as usize].previous = candidate.left;
                heap.extend(self.candidate(text, &symbols, candidate.left, next));
            }
            let previous = symbols[left].previous;
            if previous != NONE {
                heap.extend(self.candidate(text, &symbols, previous, candidate.left));
            }
        }

        let mut tokens = Vec::new();
        let mut index = 0;
        while index != NONE {
            let symbol = symbols[index as usize];
            self.write(&text[symbol.start as usize..][..symbol.len as usize], &mut tokens);
            index = symbol.next;
        }
        tokens
    }

    fn candidate(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: u32,
        right: u32,
    ) -> Option<Candidate> {
        let start = symbols[left as usize].start as usize;
        let len = symbols[left as usize].len + symbols[right as usize].len;
        if len as usize > self.longest_bytes {
            return None;
        }
        let id = self.id(&text[start..start + len as usize])?;
        Some(Candidate { score: self.scores[id as usize], left, right, len })
    }

    fn write(&self, text: &str, tokens: &mut Vec<(u32, u32)>) {
        if let Some(id) = self.id(text) {
            tokens.push((id, text.len() as u32));
            return;
        }
        for byte in text.bytes() {
            if let Some(id) = self.byte_ids[byte as usize].or(self.unknown) {
                tokens.push((id, 1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spm(tokens: &[(&str, f32)]) -> Spm {
        let ids = tokens.iter().enumerate().map(|(id, (t, _))| ((*t).into(), id as u32)).collect();
        let mut byte_ids = [None; 256];
        for (byte, id) in byte_ids.iter_mut().enumerate() {
            *id = Some(1000 + byte as u32);
        }
        Spm::new(ids, tokens.iter().map(|t| t.1).collect(), byte_ids, None)
    }

    fn ids(spm: &Spm, text: &str) -> Vec<u32> {
        spm.tokenize(text).into_iter().map(|token| token.0).collect()
    }

    #[test]
    fn the_better_score_wins_and_ties_go_left() {
        let model = spm(&[("a", -9.0), ("b", -9.0), ("ab", -2.0), ("ba", -1.0), ("aa", -3.0)]);
        assert_eq!(ids(&model, "aba"), [0, 3]);
        assert_eq!(ids(&model, "aaa"), [4, 0]);
    }

    #[test]
    fn what_is_no_token_becomes_bytes() {
        let model = spm(&[("a", -1.0)]);
        assert_eq!(ids(&model, "aé"), [0, 1000 + 0xC3, 1000 + 0xA9]);
        assert_eq!(ids(&model, ""), [0u32; 0]);
    }
}
