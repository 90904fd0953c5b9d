//! Small changes to a template's source, so that it means in minijinja what
//! it means in Python's jinja2.
//!
//! - `{% generation %}` blocks, which only mark what an assistant wrote,
//!   become scopes of their own, which is what they are there.
//! - `a ~ b` writes its operands as Python's `str` does: `a|__text ~ b|__text`.
//! - `for x in y` refuses `None`: `for x in (y)|__iterated`.
//! - `x[::-1]` becomes `x.__reversed()`; minijinja 3.0 panics on an empty list.
//! - `'...'|safe + x` escapes HTML in `x` in Python, which no template wants;
//!   it fails where it is reached: `'...'|__markup + x`.
//!
//! Lines stay where they were, so errors name the right one.

/// Filter: `str(value)`.
pub const TEXT: &str = "__text";
/// Filter: the value, if a loop may run over it.
pub const ITERATED: &str = "__iterated";
/// Filter: fails.
pub const MARKUP: &str = "__markup";
/// Method: the string or list backwards.
pub const REVERSED: &str = "__reversed";

/// Applies all changes.
pub fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let mut rest = source;
    while let Some(start) = next_tag(rest) {
        if rest[start..].starts_with("{#") {
            let end = rest[start..].find("#}").map_or(rest.len(), |end| start + end + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        out.push_str(&rest[..start + 2]);
        let closing = if rest[start..].starts_with("{%") { "%}" } else { "}}" };
        rest = &rest[start + 2..];
        let (tokens, length) = tokenize(rest, closing);
        if closing == "%}" && tokens.iter().any(|token| token.text == "raw") && tokens.len() < 4 {
            let end = rest.find("endraw").map_or(rest.len(), |end| end + "endraw".len());
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        write_tag(&mut out, &rest[..length], &tokens, closing == "%}");
        rest = &rest[length..];
    }
    out.push_str(rest);
    out
}

/// Where the next tag or comment begins.
fn next_tag(text: &str) -> Option<usize> {
    text.as_bytes()
        .windows(2)
        .position(|two| two[0] == b'{' && matches!(two[1], b'%' | b'{' | b'#'))
}

#[derive(Clone, Copy, Debug)]
struct Token<'s> {
    text: &'s str,
    at: usize,
}

/// Tokens of a tag's inside and its length in bytes, end marker excluded.
fn tokenize<'s>(inside: &'s str, closing: &str) -> (Vec<Token<'s>>, usize) {
    let bytes = inside.as_bytes();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
    let mut tokens = Vec::new();
    let mut braces = 0_usize;
    let mut at = 0;
    while at < bytes.len() {
        if inside[at..].starts_with(closing) && (closing == "%}" || braces == 0) {
            return (tokens, at);
        }
        let start = at;
        match bytes[at] {
            quote @ (b'\'' | b'"') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at = (at + 1).min(bytes.len());
                while !inside.is_char_boundary(at) {
                    at += 1;
                }
            }
            byte if byte.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            byte if is_word(byte) => {
                while at < bytes.len() && is_word(bytes[at]) {
                    at += 1;
                }
            }
            byte => {
                braces += usize::from(byte == b'{');
                braces = braces.saturating_sub(usize::from(byte == b'}'));
                let two = inside.get(at..at + 2).unwrap_or_default();
                at += if ["==", "!=", "<=", ">=", "//", "**"].contains(&two) { 2 } else { 1 };
            }
        }
        tokens.push(Token { text: &inside[start..at], at: start });
    }
    (tokens, at)
}

/// Ends an operand of `~` when it comes at the same nesting.
fn ends_operand(token: &str) -> bool {
    [
        "+",
        "-",
        "==",
        "!=",
        "<",
        ">",
        "<=",
        ">=",
        ",",
        ":",
        "=",
        "and",
        "or",
        "not",
        "in",
        "if",
        "else",
        "recursive",
    ]
    .contains(&token)
}

/// One operand of `~` while it is read.
#[derive(Clone, Copy, Default)]
struct Operand {
    tokens: usize,
    /// It is one literal string.
    is_string: bool,
    /// A filter behind it would not apply to all of it.
    is_compound: bool,
    follows_tilde: bool,
    /// The byte behind its last token.
    end: usize,
}

impl Operand {
    fn wants_text(&self) -> bool {
        self.tokens > 0 && !self.is_compound && !(self.is_string && self.tokens == 1)
    }
}

fn write_tag(out: &mut String, inside: &str, tokens: &[Token], is_block: bool) {
    let mut inserts: Vec<(usize, String)> = Vec::new();
    let mut cuts: Vec<(usize, usize)> = Vec::new();
    let first = tokens.iter().position(|token| !["-", "+"].contains(&token.text)).unwrap_or(0);
    let keyword = tokens.get(first).map_or("", |token| token.text);
    if is_block && matches!(keyword, "generation" | "endgeneration") {
        let token = tokens[first];
        cuts.push((token.at, token.at + token.text.len()));
        let scope = if keyword == "generation" { "with" } else { "endwith" };
        inserts.push((token.at, scope.to_string()));
    }
    if is_block && keyword == "for" {
        wrap_loop_source(inside, &tokens[first..], &mut inserts);
    }

    let mut stack = vec![Operand::default()];
    let mut index = 0;
    while index < tokens.len() {
        let Token { text, at } = tokens[index];
        let after = at + text.len();
        let reversing = ["[", ":", ":", "-", "1", "]"];
        let slice = tokens.get(index..index + 6);
        if slice.is_some_and(|slice| slice.iter().map(|t| t.text).eq(reversing)) {
            let end = tokens[index + 5].at + 1;
            cuts.push((at, end));
            inserts.push((at, format!(".{REVERSED}()")));
            if let Some(operand) = stack.last_mut() {
                operand.tokens += 6;
                operand.end = end;
            }
            index += 6;
            continue;
        }
        let next = |offset: usize| tokens.get(index + offset).map_or("", |token| token.text);
        if text == "|" && next(1) == "safe" && next(2) == "+" {
            cuts.push((at, tokens[index + 1].at + "safe".len()));
            inserts.push((at, format!("|{MARKUP}")));
        }
        index += 1;
        match text {
            "(" | "[" | "{" => stack.push(Operand::default()),
            ")" | "]" | "}" => {
                if let Some(inner) = stack.pop() {
                    finish(inner, &mut inserts);
                }
                if stack.is_empty() {
                    stack.push(Operand::default());
                }
                if let Some(outer) = stack.last_mut() {
                    outer.tokens += 2;
                    outer.end = after;
                }
            }
            "~" => {
                if let Some(operand) = stack.last_mut() {
                    if operand.wants_text() {
                        inserts.push((operand.end, format!("|{TEXT}")));
                    }
                    *operand = Operand { follows_tilde: true, ..Operand::default() };
                }
            }
            _ => {
                let Some(operand) = stack.last_mut() else { continue };
                let is_sign = operand.tokens == 0 && matches!(text, "-" | "+");
                if ends_operand(text) && !is_sign {
                    finish(*operand, &mut inserts);
                    *operand = Operand::default();
                } else if !is_sign {
                    operand.is_string = operand.tokens == 0 && text.starts_with(['\'', '"']);
                    operand.is_compound |= matches!(text, "*" | "/" | "//" | "%" | "**" | "is");
                    operand.tokens += 1;
                    operand.end = after;
                }
            }
        }
    }
    for operand in stack {
        finish(operand, &mut inserts);
    }
    splice(out, inside, inserts, &cuts);
}

/// The last operand of a chain.
fn finish(operand: Operand, inserts: &mut Vec<(usize, String)>) {
    if operand.follows_tilde && operand.wants_text() {
        inserts.push((operand.end, format!("|{TEXT}")));
    }
}

/// `for x in (y)|__iterated if z`.
fn wrap_loop_source(inside: &str, tokens: &[Token], inserts: &mut Vec<(usize, String)>) {
    let mut depth = 0_i32;
    let mut found = false;
    let mut start = None;
    let mut end = None;
    for token in tokens {
        match token.text {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            "in" if depth == 0 && !found => {
                found = true;
                continue;
            }
            "if" | "recursive" if depth == 0 && found => break,
            _ => {}
        }
        if found {
            start = start.or(Some(token.at));
            end = Some(token.at + token.text.len());
        }
    }
    if let (Some(start), Some(mut end)) = (start, end) {
        // The `-` of `-%}` is no part of the expression.
        if end == inside.len() && inside.ends_with('-') {
            end = inside[..end - 1].trim_end().len();
        }
        if end > start {
            inserts.push((start, "(".to_string()));
            inserts.push((end, format!(")|{ITERATED}")));
        }
    }
}

fn splice(
    out: &mut String,
    inside: &str,
    mut inserts: Vec<(usize, String)>,
    cuts: &[(usize, usize)],
) {
    inserts.sort_by_key(|(at, _)| *at);
    let mut inserts = inserts.into_iter().peekable();
    for (at, c) in inside.char_indices() {
        while let Some((_, text)) = inserts.next_if(|(place, _)| *place <= at) {
            out.push_str(&text);
        }
        if !cuts.iter().any(|&(from, to)| (from..to).contains(&at)) {
            out.push(c);
        }
    }
    for (_, text) in inserts {
        out.push_str(&text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_to_change_changes() {
        for (source, expected) in [
            ("a{{ b }}{% if c %}d{% endif %}", "a{{ b }}{% if c %}d{% endif %}"),
            ("{{ 'x' ~ y ~ 'z' }}", "{{ 'x' ~ y|__text ~ 'z' }}"),
            ("{{ a.b[0] ~ (c ~ d|f) }}", "{{ a.b[0]|__text ~ (c|__text ~ d|f|__text)|__text }}"),
            (
                "{{ a ~ b if c else d ~ 1 }}",
                "{{ a|__text ~ b|__text if c else d|__text ~ 1|__text }}",
            ),
            ("{{ f(a ~ b, 'c') + d }}", "{{ f(a|__text ~ b|__text, 'c') + d }}"),
            ("{{- a ~ -1 -}}", "{{- a|__text ~ -1|__text -}}"),
            ("{{ a * b ~ c }}", "{{ a * b ~ c|__text }}"),
            ("{% for x in y %}", "{% for x in (y)|__iterated %}"),
            ("{%- for a, b in c.d() if a -%}", "{%- for a, b in (c.d())|__iterated if a -%}"),
            ("{% for x in y -%}", "{% for x in (y)|__iterated -%}"),
            ("{% for x in y[::-1] %}", "{% for x in (y.__reversed())|__iterated %}"),
            ("{% generation %}x{%- endgeneration -%}", "{% with %}x{%- endwith -%}"),
            ("{# a ~ b {{ #}{{ '}}' ~ c }}", "{# a ~ b {{ #}{{ '}}' ~ c|__text }}"),
            ("{% raw %}{{ a ~ b }}{% endraw %}", "{% raw %}{{ a ~ b }}{% endraw %}"),
            ("{{ {'a': {'b': x ~ y}} }}", "{{ {'a': {'b': x|__text ~ y|__text}} }}"),
            ("{{ 'é\\'' ~ é }}", "{{ 'é\\'' ~ é|__text }}"),
            ("{{ 'a'|safe + b }}", "{{ 'a'|__markup + b }}"),
            ("{{ a ~ b", "{{ a|__text ~ b|__text"),
        ] {
            assert_eq!(rewrite(source), expected);
        }
    }
}
