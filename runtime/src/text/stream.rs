//! Text that grows token by token.

use super::tokenizer::Tokenizer;

/// Turns tokens into text as they come, never splitting a character.
///
/// The concatenation of everything that [`StreamDecoder::push`] and
/// [`StreamDecoder::finish`] return equals [`Tokenizer::decode`] of the same
/// tokens.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    pending: Vec<u8>,
    skip_special: bool,
    /// Whether the next byte, if a space, is the tokenizer's own.
    at_start: bool,
}

impl StreamDecoder {
    /// With `skip_special`, control tokens give no text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self { pending: Vec::new(), skip_special, at_start: tokenizer.strips_first_space() }
    }

    /// For text that continues a prompt: a first space is kept.
    #[must_use]
    pub fn continuing(mut self) -> Self {
        self.at_start = false;
        self
    }

    /// The characters that `token` completes.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        if !(self.skip_special && tokenizer.is_special(token)) {
            let mut bytes = tokenizer.token_bytes(token);
            if self.at_start && !bytes.is_empty() {
                self.at_start = false;
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
            self.pending.extend_from_slice(bytes);
        }
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let bad = chunk.invalid();
            if bad.is_empty() || (done + bad.len() == self.pending.len() && may_complete(bad)) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            done += bad.len();
        }
        self.pending.drain(..done);
        text
    }

    /// What is left at the end: a broken character, if any.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether more bytes can make `bytes`, which the decoder called invalid, a
/// character.
fn may_complete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Withholds what may become a stop string, and ends at one.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Whether a stop string came; everything after it is swallowed.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Text that is safe to show now: nothing of a stop string, and nothing
    /// that could still become one. The stop that begins first wins.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            // A longer stop may have begun earlier and still be open.
            if self.first_open() >= at {
                self.stopped = true;
                self.held.truncate(at);
                return std::mem::take(&mut self.held);
            }
        }
        let safe = self.first_open();
        let rest = self.held.split_off(safe);
        std::mem::replace(&mut self.held, rest)
    }

    /// Where the earliest suffix begins that is a proper prefix of a stop.
    fn first_open(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = held.len().saturating_sub(longest.saturating_sub(1));
        (from..held.len())
            .find(|&at| {
                let suffix = &held[at..];
                let opens = |stop: &String| {
                    stop.len() > suffix.len() && stop.as_bytes().starts_with(suffix)
                };
                self.held.is_char_boundary(at) && self.stops.iter().any(opens)
            })
            .unwrap_or(held.len())
    }

    /// What was withheld, when no more text comes. A stop string that lay
    /// inside a longer one which never completed still counts.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.stopped = true;
            self.held.truncate(at);
        }
        std::mem::take(&mut self.held)
    }
}

/// Decoder and stop strings together.
#[derive(Clone, Debug)]
pub struct TextStream {
    decoder: StreamDecoder,
    stops: StopMatcher,
}

impl TextStream {
    /// Control tokens give no text.
    pub fn new(tokenizer: &Tokenizer, stops: impl IntoIterator<Item = String>) -> Self {
        Self { decoder: StreamDecoder::new(tokenizer, true), stops: StopMatcher::new(stops) }
    }

    /// The text that may be shown after `token`, and whether a stop string
    /// ended it.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> (String, bool) {
        let text = self.decoder.push(tokenizer, token);
        let shown = self.stops.push(&text);
        (shown, self.stops.stopped())
    }

    /// What was withheld, when no more tokens come.
    pub fn finish(&mut self) -> String {
        let text = self.decoder.finish();
        let mut shown = self.stops.push(&text);
        shown.push_str(&self.stops.finish());
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], chunks: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| stop.to_string()));
        let mut shown: Vec<String> = chunks.iter().map(|chunk| matcher.push(chunk)).collect();
        shown.push(matcher.finish());
        (shown, matcher.stopped())
    }

    #[test]
    fn a_stop_string_is_never_shown_in_part() {
        assert_eq!(run(&["\nUser:"], &["Hi", "\nUs", "er", ": no"]).0, ["Hi", "", "", "", ""]);
        let (shown, stopped) = run(&["\nUser:"], &["Hi\nUs", "ual", ""]);
        assert_eq!((shown.concat(), stopped), ("Hi\nUsual".to_string(), false));
        let (shown, stopped) = run(&["aab"], &["a", "a", "a", "b", "c"]);
        assert_eq!((shown.concat(), stopped), ("a".to_string(), true));
    }

    #[test]
    fn the_earliest_stop_wins_even_when_a_later_one_completes_first() {
        let (shown, stopped) = run(&["abcd", "bc"], &["xabc", "d"]);
        assert_eq!((shown.concat(), stopped), ("x".to_string(), true));
        let (shown, stopped) = run(&["abcd", "bc"], &["xabc", "e"]);
        assert_eq!((shown.concat(), stopped), ("xa".to_string(), true));
        let (shown, stopped) = run(&["abcd", "bc"], &["xabc"]);
        assert_eq!((shown.concat(), stopped), ("xa".to_string(), true));
    }

    proptest! {
        #[test]
        fn chunking_does_not_matter(
            text in "[ab]{0,30}",
            stops in proptest::collection::vec("[ab]{1,4}", 0..3),
            cut in 1_usize..5,
        ) {
            let expected = stops.iter().filter_map(|stop| text.find(stop)).min();
            let mut matcher = StopMatcher::new(stops.clone());
            let mut shown = String::new();
            for chunk in text.as_bytes().chunks(cut) {
                shown.push_str(&matcher.push(std::str::from_utf8(chunk).unwrap()));
                prop_assert!(text.starts_with(&shown));
                prop_assert!(shown.len() <= expected.unwrap_or(text.len()));
            }
            shown.push_str(&matcher.finish());
            prop_assert_eq!(&shown, &text[..expected.unwrap_or(text.len())]);
            prop_assert_eq!(matcher.stopped(), expected.is_some());
        }
    }
}
