//! The commands of the chat, shared by the full-screen and the line chat.

use std::path::PathBuf;

pub const HELP: &str = "\
/help            this text
/system TEXT     set the instruction before the conversation; without TEXT: show it
/system none     remove it
/reset           forget the conversation
/save FILE       write the conversation to a new FILE (/save! replaces one)
/quit            leave
//...            a question that begins with a slash";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Help,
    ShowSystem,
    SetSystem(Option<String>),
    Reset,
    Save { file: PathBuf, replace: bool },
    Quit,
}

/// What a line of input means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    Empty,
    Question(String),
    Command(Command),
    /// A command that cannot be understood, and why.
    Wrong(String),
}

pub fn parse(text: &str) -> Line {
    let text = text.trim();
    if text.is_empty() {
        return Line::Empty;
    }
    let Some(rest) = text.strip_prefix('/') else { return Line::Question(text.to_string()) };
    if rest.starts_with('/') {
        return Line::Question(rest.to_string());
    }
    let (name, argument) = match rest.split_once(char::is_whitespace) {
        Some((name, argument)) => (name, argument.trim()),
        None => (rest, ""),
    };
    let command = match (name, argument) {
        ("help" | "h" | "?", _) => Command::Help,
        ("system", "") => Command::ShowSystem,
        ("system", "none") => Command::SetSystem(None),
        ("system", text) => Command::SetSystem(Some(text.to_string())),
        ("reset" | "clear" | "new", _) => Command::Reset,
        ("save" | "save!", "") => return Line::Wrong("/save needs a file name".to_string()),
        ("save", file) => Command::Save { file: file.into(), replace: false },
        ("save!", file) => Command::Save { file: file.into(), replace: true },
        ("quit" | "exit" | "q", _) => Command::Quit,
        _ => {
            return Line::Wrong(format!(
                "there is no command /{name}; /help lists them, // begins a question with a slash"
            ));
        }
    };
    Line::Command(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_and_commands_are_told_apart() {
        assert_eq!(parse("  \n "), Line::Empty);
        assert_eq!(parse(" a b "), Line::Question("a b".into()));
        assert_eq!(parse("//etc/passwd?"), Line::Question("/etc/passwd?".into()));
        assert!(matches!(parse("/etc/passwd"), Line::Wrong(_)));
        assert_eq!(
            parse("/system be\nbrief"),
            Line::Command(Command::SetSystem(Some("be\nbrief".into())))
        );
        assert_eq!(
            parse("/save my file.md"),
            Line::Command(Command::Save { file: "my file.md".into(), replace: false })
        );
        assert!(matches!(parse("/save "), Line::Wrong(_)));
        assert_eq!(parse("/save! a"), {
            Line::Command(Command::Save { file: "a".into(), replace: true })
        });
    }
}
