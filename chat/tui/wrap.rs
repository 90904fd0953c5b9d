//! Text of a conversation as terminal lines: cleaned of control characters,
//! wrapped at words by display width, code marked.

use super::theme::Theme;
use ratatui::{
    style::Style,
    text::{Line, Span},
};
use unicode_width::UnicodeWidthChar;

const TAB: &str = "    ";

/// Text with every control character but the newline made harmless: tabs
/// become spaces, the others a replacement character. Model output and pasted
/// text must not reach the terminal's escape parser.
pub fn clean(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\n' => safe.push('\n'),
            '\r' if chars.peek() == Some(&'\n') => {}
            '\t' => safe.push_str(TAB),
            c if c.is_control() || is_direction_override(c) => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// Invisible characters that reorder what stands around them.
fn is_direction_override(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Lines of at most `width` columns; fenced and `inline` code in the theme's
/// code style.
pub fn wrap(text: &str, width: usize, base: Style, theme: &Theme) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let mut fenced = false;
    for line in clean(text).split('\n') {
        let fence = line.trim_start().starts_with("```");
        let styled: Vec<(char, Style)> = if fenced || fence {
            line.chars().map(|c| (c, theme.code)).collect()
        } else {
            mark_inline_code(line, base, theme.code)
        };
        fenced ^= fence;
        wrap_line(&styled, width.max(1), &mut lines);
    }
    lines
}

fn mark_inline_code(line: &str, base: Style, code: Style) -> Vec<(char, Style)> {
    let mut inside = false;
    let mut ticks_left = line.matches('`').count();
    line.chars()
        .map(|c| {
            if c == '`' {
                ticks_left -= 1;
                // A tick without a partner marks nothing.
                inside = !inside && ticks_left > 0;
                return (c, code);
            }
            (c, if inside { code } else { base })
        })
        .collect()
}

fn wrap_line(line: &[(char, Style)], width: usize, out: &mut Vec<Line<'static>>) {
    let mut rest = line;
    loop {
        let fit = fitting(rest, width);
        if fit == rest.len() {
            out.push(spans(rest));
            return;
        }
        // Break after the last space that fits, else in the word.
        let space = rest[..=fit].iter().rposition(|(c, _)| *c == ' ').filter(|&at| at > 0);
        let end = space.unwrap_or(fit);
        out.push(spans(&rest[..end]));
        rest = &rest[end..];
        if space.is_some() {
            rest = &rest[1..];
        }
    }
}

/// How many characters fit, at least one, without cutting a character from
/// the marks that stand on it.
fn fitting(line: &[(char, Style)], width: usize) -> usize {
    let mut used = 0;
    for (index, (c, _)) in line.iter().enumerate() {
        used += c.width().unwrap_or(0);
        if used > width {
            return index.max(1);
        }
    }
    line.len()
}

fn spans(line: &[(char, Style)]) -> Line<'static> {
    line.chunk_by(|a, b| a.1 == b.1)
        .map(|run| Span::styled(run.iter().map(|(c, _)| c).collect::<String>(), run[0].1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrapped(text: &str, width: usize) -> Vec<String> {
        let lines = wrap(text, width, Style::default(), &Theme::plain());
        lines.iter().map(|line| line.to_string()).collect()
    }

    #[test]
    fn words_wide_characters_and_long_words() {
        assert_eq!(wrapped("list files by size", 10), ["list files", "by size"]);
        assert_eq!(wrapped("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrapped("日本語です", 4), ["日本", "語で", "す"]);
        assert_eq!(wrapped("日本", 1), ["日", "本"], "wider than the column: one each");
        assert_eq!(wrapped("e\u{301}e\u{301}e\u{301}", 2), ["e\u{301}e\u{301}", "e\u{301}"]);
        assert_eq!(wrapped("", 3), [""]);
        assert_eq!(wrapped("a\n\nb", 3), ["a", "", "b"]);
        assert_eq!(wrapped("  indented code", 11), ["  indented", "code"]);
    }

    #[test]
    fn escape_sequences_cannot_pass() {
        let text = clean("a\u{1b}[2Jb\u{7}\u{9b}c\r\nd\te\u{202e}");
        assert_eq!(text, "a\u{fffd}[2Jb\u{fffd}\u{fffd}c\nd    e\u{fffd}");
    }

    #[test]
    fn code_is_marked_and_a_single_tick_is_not() {
        let theme = Theme::colour();
        let base = Style::default();
        let lines = wrap("use `tar` or\n```\nls\n```\na ` b", 40, base, &theme);
        let styles: Vec<Vec<bool>> = lines
            .iter()
            .map(|line| line.spans.iter().map(|span| span.style == theme.code).collect())
            .collect();
        assert_eq!(styles[0], [false, true, false]);
        assert_eq!(styles[2], [true]);
        assert!(!styles[4][styles[4].len() - 1], "text after a lone tick is text");
    }
}
