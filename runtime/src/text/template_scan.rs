//! What is checked about a template's source before a parser sees it.
//!
//! Parsers of templates recurse natively: deep nesting would overflow the
//! stack, which no error value can report. The scan is lexical; where it and
//! the parser could disagree it counts too much rather than too little.

use crate::error::{Error, Result};

/// Bytes of source.
pub const MOST_SOURCE_BYTES: usize = 256 << 10;
/// Blocks and brackets inside each other.
pub const MOST_NESTING: usize = 64;
/// `elif` branches of all open `if` blocks; each nests natively.
const MOST_BRANCHES: usize = 256;
/// Words, literals and operators in one tag; a chain of operators nests
/// natively.
const MOST_TOKENS: usize = 4096;

const OPENING: &[&str] =
    &["if", "for", "macro", "call", "filter", "with", "block", "autoescape", "generation"];

/// Refuses a source that is too large or too deep.
pub fn check(source: &str) -> Result<()> {
    if source.len() > MOST_SOURCE_BYTES {
        return Err(Error::Template(format!(
            "the source has {} bytes; at most {MOST_SOURCE_BYTES} are allowed",
            source.len()
        )));
    }
    Scan { source: source.as_bytes(), at: 0, branches: Vec::new() }.run()
}

struct Scan<'s> {
    source: &'s [u8],
    at: usize,
    /// `if` and `elif` branches of each open block.
    branches: Vec<usize>,
}

impl Scan<'_> {
    fn line(&self) -> usize {
        1 + self.source[..self.at.min(self.source.len())].iter().filter(|&&b| b == b'\n').count()
    }

    fn too_deep(&self, what: &str, limit: usize) -> Error {
        let line = self.line();
        Error::Template(format!("line {line}: {what}; at most {limit} are allowed"))
    }

    fn starts_with(&self, text: &[u8]) -> bool {
        self.source[self.at..].starts_with(text)
    }

    /// Continues behind the next `text`, or at the end.
    fn skip_past(&mut self, text: &[u8]) {
        let rest = &self.source[self.at..];
        let found = rest.windows(text.len()).position(|window| window == text);
        self.at += found.map_or(rest.len(), |start| start + text.len());
    }

    fn run(mut self) -> Result<()> {
        while self.at < self.source.len() {
            if self.starts_with(b"{#") {
                self.skip_past(b"#}");
            } else if self.starts_with(b"{{") {
                self.at += 2;
                self.tag(b"}}", 0)?;
            } else if self.starts_with(b"{%") {
                self.at += 2;
                self.block()?;
            } else {
                self.at += 1;
            }
        }
        Ok(())
    }

    fn block(&mut self) -> Result<()> {
        while self.at < self.source.len()
            && (self.source[self.at].is_ascii_whitespace() || b"-+".contains(&self.source[self.at]))
        {
            self.at += 1;
        }
        let word = self.word();
        match word {
            "raw" => {
                self.skip_past(b"%}");
                self.skip_past(b"endraw");
            }
            "elif" => {
                if let Some(branches) = self.branches.last_mut() {
                    *branches += 1;
                }
                if self.branches.iter().sum::<usize>() > MOST_BRANCHES {
                    return Err(self.too_deep("too many open branches", MOST_BRANCHES));
                }
            }
            _ if OPENING.contains(&word) => {
                self.branches.push(1);
                if self.branches.len() > MOST_NESTING {
                    return Err(self.too_deep("blocks nest too deep", MOST_NESTING));
                }
            }
            _ if word.strip_prefix("end").is_some_and(|kind| OPENING.contains(&kind)) => {
                self.branches.pop();
            }
            _ => {}
        }
        self.tag(b"%}", self.branches.len())
    }

    fn word(&self) -> &'static str {
        let rest = &self.source[self.at..];
        let len = rest.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count();
        let found = &rest[..len];
        let known = OPENING.iter().chain(&["raw", "elif"]).find(|word| word.as_bytes() == found);
        if let Some(word) = known {
            return word;
        }
        const ENDS: &[&str] = &[
            "endif",
            "endfor",
            "endmacro",
            "endcall",
            "endfilter",
            "endwith",
            "endblock",
            "endautoescape",
            "endgeneration",
        ];
        ENDS.iter().find(|word| word.as_bytes() == found).copied().unwrap_or("")
    }

    /// One tag's inside, up to `end` outside of strings (and, for `}}`,
    /// outside of braces).
    fn tag(&mut self, end: &[u8], depth: usize) -> Result<()> {
        let mut open: Vec<u8> = Vec::new();
        let mut tokens = 0_usize;
        let mut in_word = false;
        while self.at < self.source.len() {
            if self.starts_with(end) && !(end == b"}}" && open.last() == Some(&b'{')) {
                self.at += 2;
                return Ok(());
            }
            let byte = self.source[self.at];
            let is_word = byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
            let continues = is_word && in_word;
            if !(byte.is_ascii_whitespace() || continues) {
                tokens += 1;
            }
            in_word = is_word;
            match byte {
                b'\'' | b'"' => self.string(byte),
                b'(' | b'[' | b'{' => open.push(byte),
                b')' | b']' | b'}' => {
                    open.pop();
                }
                _ => {}
            }
            if depth + open.len() > MOST_NESTING {
                return Err(self.too_deep("brackets nest too deep", MOST_NESTING));
            }
            if tokens > MOST_TOKENS {
                return Err(self.too_deep("a tag has too many words", MOST_TOKENS));
            }
            self.at += 1;
        }
        Ok(())
    }

    /// Moves to the closing quote.
    fn string(&mut self, quote: u8) {
        self.at += 1;
        while self.at < self.source.len() && self.source[self.at] != quote {
            self.at += if self.source[self.at] == b'\\' { 2 } else { 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_would_overflow_a_stack_are_refused() {
        let nested = |count| "{% if x %}".repeat(count) + &"{% endif %}".repeat(count);
        assert!(check(&nested(64)).is_ok());
        assert!(check(&nested(65)).unwrap_err().to_string().contains("blocks nest"));
        let round = |count| format!("{{{{ {}1{} }}}}", "(".repeat(count), ")".repeat(count));
        assert!(check(&round(64)).is_ok());
        assert!(check(&round(65)).unwrap_err().to_string().contains("line 1: brackets"));
        assert!(check(&format!("{{{{ 1{} }}}}", "+1".repeat(3000))).is_err());
        assert!(check(&format!("{{% if a %}}{}", "{% elif b %}".repeat(300))).is_err());
        assert!(check(&" ".repeat(MOST_SOURCE_BYTES + 1)).is_err());
    }

    #[test]
    fn brackets_in_strings_comments_and_raw_text_do_not_nest() {
        let many = "(".repeat(100);
        for source in [
            format!("{{{{ '{many}' }}}}"),
            format!("{{{{ 'a\\'{many}' }}}}"),
            format!("{{# {many} #}}"),
            format!("{{% raw %}}{{{{ {many} }}}}{{% endraw %}}"),
            many.clone(),
            format!("{{{{ {{'a': {{'b': 1}}}} }}}}{many}"),
            "{% if a %}{% endif %}".repeat(1000),
        ] {
            assert!(check(&source).is_ok(), "{source}");
        }
    }
}
