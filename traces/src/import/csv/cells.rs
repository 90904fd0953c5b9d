//! Cells of a table's line, and lists in them.

/// The cells of a line, without the quotes and the spaces around them. Quotes
/// in a quoted cell stay doubled: such cells are compared, never shown.
pub struct Cells<'l> {
    /// `None` behind the last one.
    left: Option<&'l str>,
    separator: char,
}

impl<'l> Cells<'l> {
    pub fn of(line: &'l str, separator: char) -> Self {
        Self { left: Some(line.trim_end_matches(['\r', '\n'])), separator }
    }
}

impl<'l> Iterator for Cells<'l> {
    type Item = Result<&'l str, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let left = self.left?;
        let separator = self.separator;
        let has_quotes = left.trim_start_matches(' ').starts_with('"');
        let mut is_quoted = false;
        // A doubled quote closes and opens again.
        let end = left.find(|c| {
            is_quoted ^= has_quotes && c == '"';
            c == separator && !is_quoted
        });
        let cell = left[..end.unwrap_or(left.len())].trim();
        self.left = end.map(|end| &left[end + separator.len_utf8()..]);
        if is_quoted {
            return Some(Err(format!("a quote that is not closed on its line: {cell:?}")));
        }
        let within = cell.strip_prefix('"').and_then(|cell| cell.strip_suffix('"'));
        Some(Ok(within.unwrap_or(cell).trim()))
    }
}

/// Of a list in one cell, whatever stands around and between.
pub fn parts(cell: &str) -> impl Iterator<Item = &str> {
    let ends = |c: char| matches!(c, ' ' | ',' | ';' | '|' | '[' | ']' | '(' | ')' | '{' | '}');
    cell.split(ends).filter(|part| !part.is_empty())
}
