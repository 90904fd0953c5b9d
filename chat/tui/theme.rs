//! Colours and drawing characters.

use ratatui::style::{Color, Modifier, Style};

#[derive(Clone, Copy, Debug)]
pub struct Theme {
    pub user: Style,
    pub assistant: Style,
    pub code: Style,
    pub note: Style,
    pub error: Style,
    pub accent: Style,
    pub rule: char,
    pub prompt: &'static str,
    pub separator: &'static str,
    pub spinner: &'static [&'static str],
}

impl Theme {
    pub fn colour() -> Self {
        let plain = Style::default();
        Self {
            user: plain.fg(Color::Cyan).add_modifier(Modifier::BOLD),
            assistant: plain.fg(Color::Green).add_modifier(Modifier::BOLD),
            code: plain.fg(Color::Yellow),
            note: plain.fg(Color::DarkGray),
            error: plain.fg(Color::Red),
            accent: plain.fg(Color::Cyan),
            rule: '─',
            prompt: "› ",
            separator: " · ",
            spinner: &["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧"],
        }
    }

    /// No colours.
    pub fn plain() -> Self {
        let plain = Style::default();
        let bold = plain.add_modifier(Modifier::BOLD);
        let dim = plain.add_modifier(Modifier::DIM);
        Self {
            user: bold,
            assistant: bold,
            code: plain,
            note: dim,
            error: bold,
            accent: plain,
            ..Self::colour()
        }
    }

    /// No characters outside ASCII in what we draw ourselves.
    pub fn ascii(self) -> Self {
        let spinner = &["|", "/", "-", "\\"];
        Self { rule: '-', prompt: "> ", separator: " | ", spinner, ..self }
    }

    /// What the environment asks for: NO_COLOR, and a locale that is "C" or
    /// names another character set than UTF-8.
    pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name| get(name).filter(|value| !value.is_empty());
        let theme = if get("NO_COLOR").is_some() { Self::plain() } else { Self::colour() };
        let locale = get("LC_ALL").or_else(|| get("LC_CTYPE")).or_else(|| get("LANG"));
        let utf8 = locale.is_none_or(|name| {
            let name = name.to_ascii_lowercase();
            name.contains("utf-8") || name.contains("utf8")
        });
        if utf8 { theme } else { theme.ascii() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_decides() {
        let with = |pairs: &'static [(&str, &str)]| {
            Theme::from_environment(move |name| {
                pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
            })
        };
        assert_eq!(with(&[]).rule, '─');
        assert_eq!(with(&[("LANG", "C")]).rule, '-');
        assert_eq!(with(&[("LANG", "C"), ("LC_ALL", "en_US.UTF-8")]).rule, '─');
        assert_eq!(with(&[("NO_COLOR", "1")]).code, Style::default());
        assert_eq!(with(&[("NO_COLOR", "")]).code.fg, Some(Color::Yellow));
    }
}
