//! The question being written: several lines with editing, and the questions
//! asked before.

use super::{theme::Theme, wrap::clean};
use ratatui::{
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    style::Style,
};
use ratatui_textarea::{CursorMove, TextArea, WrapMode};
use unicode_width::UnicodeWidthStr;

/// The editor counts rows in 16 bits; a question stays well below.
const MAX_CHARS: usize = 30_000;
const MAX_HISTORY: usize = 500;

pub struct Input {
    area: TextArea<'static>,
    history: Vec<String>,
    /// Which entry of `history` is shown; `None`: the draft.
    recalled: Option<usize>,
    draft: String,
    placeholder_style: Style,
}

impl Input {
    pub fn new(theme: &Theme) -> Self {
        let mut input = Self {
            area: TextArea::default(),
            history: Vec::new(),
            recalled: None,
            draft: String::new(),
            placeholder_style: theme.note,
        };
        input.set_text("");
        input
    }

    pub fn widget(&self) -> &TextArea<'static> {
        &self.area
    }

    pub fn text(&self) -> String {
        self.area.lines().join("\n")
    }

    pub fn is_empty(&self) -> bool {
        self.area.is_empty()
    }

    /// Rows that the text takes at this width; words that wrap early may take
    /// more, then the editor scrolls.
    pub fn rows(&self, width: u16) -> usize {
        let width = usize::from(width.max(1));
        // One column more: the cursor behind the last character.
        self.area.lines().iter().map(|line| (line.width() + 1).div_ceil(width)).sum()
    }

    /// Takes the text out and remembers it.
    pub fn submit(&mut self) -> String {
        let text = self.text();
        self.set_text("");
        self.recalled = None;
        self.draft.clear();
        if !text.trim().is_empty() && self.history.last() != Some(&text) {
            self.history.push(text.clone());
            if self.history.len() > MAX_HISTORY {
                self.history.remove(0);
            }
        }
        text
    }

    pub fn clear(&mut self) {
        self.set_text("");
        self.recalled = None;
    }

    pub fn paste(&mut self, text: &str) {
        let room = MAX_CHARS.saturating_sub(self.char_count());
        let text: String =
            clean(&text.replace("\r\n", "\n").replace('\r', "\n")).chars().take(room).collect();
        self.area.insert_str(text);
    }

    /// Handles an editing key; false if the key means nothing here.
    pub fn key(&mut self, key: KeyEvent) -> bool {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        let alt = key.modifiers.contains(KeyModifiers::ALT);
        let shift = key.modifiers.contains(KeyModifiers::SHIFT);
        match key.code {
            KeyCode::Up if !shift => self.up(),
            KeyCode::Down if !shift => self.down(),
            KeyCode::Char('p') if control => self.recall(-1),
            KeyCode::Char('n') if control => self.recall(1),
            KeyCode::Enter => self.newline(),
            KeyCode::Char('j') if control => self.newline(),
            KeyCode::Char('u') if control => {
                self.area.delete_line_by_head();
            }
            KeyCode::Char('z') if control => {
                self.area.undo();
            }
            KeyCode::Char('y') if control => {
                self.area.paste();
            }
            KeyCode::Char('\r' | '\n') => self.newline(),
            KeyCode::Char(c) if !control && !alt => {
                if c.is_control() || self.char_count() >= MAX_CHARS {
                    return false;
                }
                self.area.insert_char(c);
            }
            KeyCode::Char('w' | 'a' | 'e' | 'k' | 'h' | 'd' | 'b' | 'f')
            | KeyCode::Backspace
            | KeyCode::Delete
            | KeyCode::Left
            | KeyCode::Right
            | KeyCode::Up
            | KeyCode::Down
            | KeyCode::Home
            | KeyCode::End => {
                self.area.input(key);
            }
            _ => return false,
        }
        true
    }

    fn newline(&mut self) {
        if self.char_count() < MAX_CHARS {
            self.area.insert_newline();
        }
    }

    fn char_count(&self) -> usize {
        self.area.lines().iter().map(|line| line.chars().count() + 1).sum()
    }

    fn up(&mut self) {
        if self.area.screen_cursor().row == 0 {
            self.recall(-1);
        } else {
            self.area.move_cursor(CursorMove::Up);
        }
    }

    fn down(&mut self) {
        let before = self.area.screen_cursor().row;
        self.area.move_cursor(CursorMove::Down);
        if self.area.screen_cursor().row == before {
            self.recall(1);
        }
    }

    /// One step back (-1) or forth (1) in the history; the draft is its end.
    fn recall(&mut self, step: isize) {
        let now = self.recalled.unwrap_or(self.history.len());
        let Some(next) = now.checked_add_signed(step).filter(|&at| at <= self.history.len()) else {
            return;
        };
        if self.recalled.is_none() {
            self.draft = self.text();
        }
        self.recalled = (next < self.history.len()).then_some(next);
        let text = self.history.get(next).unwrap_or(&self.draft).clone();
        self.set_text(&text);
    }

    fn set_text(&mut self, text: &str) {
        let mut area = TextArea::new(text.split('\n').map(str::to_string).collect());
        area.set_wrap_mode(WrapMode::WordOrGlyph);
        area.set_cursor_line_style(Style::default());
        area.set_placeholder_text("Ask something, or /help");
        area.set_placeholder_style(self.placeholder_style);
        area.set_tab_length(4);
        area.move_cursor(CursorMove::Bottom);
        area.move_cursor(CursorMove::End);
        self.area = area;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(input: &mut Input, code: KeyCode) {
        input.key(KeyEvent::new(code, KeyModifiers::NONE));
    }

    fn type_text(input: &mut Input, text: &str) {
        text.chars().for_each(|c| press(input, KeyCode::Char(c)));
    }

    #[test]
    fn history_keeps_the_draft() {
        let mut input = Input::new(&Theme::plain());
        for question in ["one", "two", "two", "  "] {
            type_text(&mut input, question);
            input.submit();
        }
        type_text(&mut input, "draft");
        let mut seen = Vec::new();
        for code in [KeyCode::Up, KeyCode::Up, KeyCode::Up, KeyCode::Down, KeyCode::Down] {
            press(&mut input, code);
            seen.push(input.text());
        }
        assert_eq!(seen, ["two", "one", "one", "two", "draft"]);
        press(&mut input, KeyCode::Down);
        assert_eq!(input.text(), "draft");
    }

    #[test]
    fn several_lines_are_edited_before_history_is_reached() {
        let mut input = Input::new(&Theme::plain());
        type_text(&mut input, "old");
        input.submit();
        input.paste("first\r\nsecond\u{1b}[0m");
        assert_eq!(input.text(), "first\nsecond\u{fffd}[0m");
        press(&mut input, KeyCode::Up);
        press(&mut input, KeyCode::Home);
        press(&mut input, KeyCode::Char('>'));
        assert_eq!(input.text(), ">first\nsecond\u{fffd}[0m");
        press(&mut input, KeyCode::Up);
        assert_eq!(input.text(), "old");
    }

    #[test]
    fn a_huge_paste_is_cut() {
        let mut input = Input::new(&Theme::plain());
        input.paste(&"x\n".repeat(100_000));
        assert!(input.char_count() <= MAX_CHARS + 1);
        type_text(&mut input, "y");
        assert!(!input.text().contains('y'));
    }
}
