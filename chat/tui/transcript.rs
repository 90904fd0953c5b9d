//! What was said, and which part of it is on screen.

use super::{theme::Theme, wrap::wrap};
use crate::engine::{Message, Role};
use ratatui::text::Line;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Question,
    Answer,
    /// From the program; the model does not see it.
    Note,
    Error,
}

struct Entry {
    kind: Kind,
    text: String,
    /// Lines at a width.
    wrapped: Option<(usize, Vec<Line<'static>>)>,
}

#[derive(Default)]
pub struct Transcript {
    entries: Vec<Entry>,
    /// First line on screen; `None` follows the end.
    top: Option<usize>,
    /// Lines and rows when it was last drawn.
    lines: usize,
    rows: usize,
}

const INDENT: usize = 2;

impl Transcript {
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn question(&mut self, text: impl Into<String>) {
        self.push(Kind::Question, text.into());
        self.push(Kind::Answer, String::new());
        self.scroll_to_bottom();
    }

    pub fn note(&mut self, text: impl Into<String>) {
        self.push(Kind::Note, text.into());
    }

    pub fn error(&mut self, text: impl Into<String>) {
        self.push(Kind::Error, text.into());
    }

    /// Adds to the newest answer.
    pub fn append(&mut self, text: &str) {
        if let Some(answer) = self.entries.iter_mut().rev().find(|e| e.kind == Kind::Answer) {
            answer.text.push_str(text);
            answer.wrapped = None;
        }
    }

    fn push(&mut self, kind: Kind, text: String) {
        self.entries.push(Entry { kind, text, wrapped: None });
    }

    /// Questions with their answers; a question whose answer is empty only at
    /// the very end.
    pub fn messages(&self) -> Vec<Message> {
        let said: Vec<&Entry> = self
            .entries
            .iter()
            .filter(|entry| matches!(entry.kind, Kind::Question | Kind::Answer))
            .collect();
        let mut messages = Vec::new();
        for (index, pair) in said.chunks(2).enumerate() {
            let answered = pair.len() == 2 && !pair[1].text.is_empty();
            let last = (index + 1) * 2 >= said.len();
            if answered || last {
                messages.push(Message::new(Role::User, &pair[0].text));
            }
            if answered {
                messages.push(Message::new(Role::Assistant, &pair[1].text));
            }
        }
        messages
    }

    pub fn page(&mut self, direction: isize) {
        let step = self.rows.saturating_sub(2).max(1) as isize * direction;
        let end = self.lines.saturating_sub(self.rows);
        let top = self.top.unwrap_or(end).min(end).saturating_add_signed(step);
        self.top = (top < end).then_some(top);
    }

    pub fn scroll_to_top(&mut self) {
        self.top = (self.lines > self.rows).then_some(0);
    }

    pub fn scroll_to_bottom(&mut self) {
        self.top = None;
    }

    /// Lines below the screen.
    pub fn below(&self) -> usize {
        match self.top {
            Some(top) => self.lines.saturating_sub(top.saturating_add(self.rows)),
            None => 0,
        }
    }

    /// The lines to draw in `rows` rows of `width` columns.
    pub fn view(&mut self, width: usize, rows: usize, theme: &Theme) -> Vec<Line<'static>> {
        for entry in &mut self.entries {
            if entry.wrapped.as_ref().is_none_or(|(at, _)| *at != width) {
                entry.wrapped = Some((width, entry.layout(width, theme)));
            }
        }
        let heights = || self.entries.iter().map(|e| e.wrapped.as_ref().map_or(0, |w| w.1.len()));
        self.lines = heights().sum();
        self.rows = rows;
        let end = self.lines.saturating_sub(rows);
        let top = self.top.map_or(end, |top| top.min(end));
        let all = self.entries.iter().filter_map(|entry| entry.wrapped.as_ref());
        all.flat_map(|(_, lines)| lines).skip(top).take(rows).cloned().collect()
    }
}

impl Entry {
    fn layout(&self, width: usize, theme: &Theme) -> Vec<Line<'static>> {
        // Not begun, or failed before the first word.
        if self.kind == Kind::Answer && self.text.is_empty() {
            return Vec::new();
        }
        let indent = if width > 4 * INDENT { INDENT } else { 0 };
        let (heading, style) = match self.kind {
            Kind::Question => (Some(("you", theme.user)), Default::default()),
            Kind::Answer => (Some(("pregate", theme.assistant)), Default::default()),
            Kind::Note => (None, theme.note),
            Kind::Error => (None, theme.error),
        };
        let mut lines = Vec::new();
        if let Some((heading, style)) = heading {
            lines.extend(wrap(heading, width, style, theme));
        }
        for mut line in wrap(&self.text, width - indent, style, theme) {
            line.spans.insert(0, " ".repeat(indent).into());
            lines.push(line);
        }
        lines.push(Line::default());
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(transcript: &mut Transcript, rows: usize) -> Vec<String> {
        let lines = transcript.view(20, rows, &Theme::plain());
        lines.iter().map(|line| line.to_string().trim().to_string()).collect()
    }

    #[test]
    fn scrolling_stays_in_bounds_and_holds_still() {
        let mut transcript = Transcript::default();
        transcript.note((0..10).map(|i| i.to_string()).collect::<Vec<_>>().join("\n"));
        assert_eq!(seen(&mut transcript, 4), ["7", "8", "9", ""]);
        transcript.page(-1);
        assert_eq!(seen(&mut transcript, 4), ["5", "6", "7", "8"]);
        transcript.note("new");
        assert_eq!(seen(&mut transcript, 4), ["5", "6", "7", "8"], "new text does not move it");
        assert_eq!(transcript.below(), 4);
        for _ in 0..5 {
            transcript.page(-1);
        }
        assert_eq!(seen(&mut transcript, 4), ["0", "1", "2", "3"]);
        for _ in 0..9 {
            transcript.page(1);
        }
        assert_eq!(seen(&mut transcript, 4), ["9", "", "new", ""]);
        assert_eq!(transcript.below(), 0);
    }

    #[test]
    fn unanswered_questions_are_not_sent_again() {
        let mut transcript = Transcript::default();
        transcript.question("one");
        transcript.note("stopped");
        transcript.question("two");
        transcript.append("2");
        transcript.question("three");
        let sent: Vec<String> = transcript.messages().into_iter().map(|m| m.content).collect();
        assert_eq!(sent, ["two", "2", "three"]);
    }
}
