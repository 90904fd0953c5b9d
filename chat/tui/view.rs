//! Draws the window into any area, however small.

use super::app::App;
use ratatui::{
    Frame,
    layout::Rect,
    style::Modifier,
    text::{Line, Span},
    widgets::Paragraph,
};
use unicode_width::UnicodeWidthStr;

const MAX_INPUT_ROWS: usize = 8;

pub fn draw(frame: &mut Frame<'_>, app: &mut App) {
    let area = frame.area();
    if area.is_empty() {
        return;
    }
    let prompt_width = app.theme.prompt.width() as u16;
    let prompt_width = if area.width > 3 * prompt_width { prompt_width } else { 0 };
    let most = (usize::from(area.height) / 3).clamp(1, MAX_INPUT_ROWS);
    let input_rows = app.input.rows(area.width - prompt_width).clamp(1, most) as u16;

    // From the bottom up: status, input, rule, transcript; what has no room
    // is left out, the input last.
    let mut rest = area.height - input_rows;
    let mut take = |wanted: u16, keep: u16| {
        let taken = if rest >= wanted + keep { wanted } else { 0 };
        rest -= taken;
        taken
    };
    let status_rows = take(1, 1);
    let rule_rows = take(1, 2);
    let row = |y: u16, height: u16| Rect { y: area.y + y, height, ..area };

    let input = row(rest + rule_rows, input_rows);
    draw_transcript(frame, app, row(0, rest));
    if rule_rows > 0 {
        draw_rule(frame, app, row(rest, 1));
    }
    draw_input(frame, app, input, prompt_width);
    if status_rows > 0 {
        draw_status(frame, app, row(input.y - area.y + input_rows, 1));
    }
}

fn draw_transcript(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    if area.is_empty() {
        return;
    }
    let mut lines = Vec::new();
    let width = usize::from(area.width);
    if app.transcript.is_empty() {
        lines = welcome(app, width);
        lines.truncate(area.height.into());
    } else {
        lines.extend(app.transcript.view(width, area.height.into(), &app.theme));
    }
    // A short conversation stands above the input, not at the top.
    let missing = usize::from(area.height) - lines.len().min(area.height.into());
    let area = Rect { y: area.y + missing as u16, height: area.height - missing as u16, ..area };
    frame.render_widget(Paragraph::new(lines), area);
}

fn welcome(app: &App, width: usize) -> Vec<Line<'static>> {
    let theme = &app.theme;
    let about = &app.about;
    let title = theme.accent.add_modifier(Modifier::BOLD);
    let mut lines = Vec::new();
    let mut add = |text: &str, style| lines.extend(super::wrap::wrap(text, width, style, theme));
    add("Pregate", title);
    add(&format!("{}{}{}", about.model, theme.separator, about.experts), theme.note);
    add(&about.device_and_why, theme.note);
    if !about.examples.is_empty() {
        add("", theme.note);
        add("Try:", theme.note);
        for example in &about.examples {
            add(&format!("  {example}"), theme.accent);
        }
    }
    add("", theme.note);
    add("Enter sends, Esc stops, /help shows the rest.", theme.note);
    add("", theme.note);
    lines
}

fn draw_rule(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let below = app.transcript.below();
    let label = if below > 0 { format!(" {below} more lines: PgDn ") } else { String::new() };
    let width = usize::from(area.width);
    let rule = app.theme.rule.to_string().repeat(width.saturating_sub(label.width()));
    let line =
        Line::from(vec![Span::styled(rule, app.theme.note), Span::styled(label, app.theme.accent)]);
    frame.render_widget(Paragraph::new(line), area);
}

fn draw_input(frame: &mut Frame<'_>, app: &App, area: Rect, prompt_width: u16) {
    let prompt = Span::styled(app.theme.prompt, app.theme.user);
    if prompt_width > 0 {
        frame.render_widget(Paragraph::new(Line::from(prompt)), area);
    }
    let text = Rect { x: area.x + prompt_width, width: area.width - prompt_width, ..area };
    frame.render_widget(app.input.widget(), text);
}

fn draw_status(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let left = app.status();
    let right = &app.about.model;
    let room = usize::from(area.width).saturating_sub(left.width() + right.width());
    let style = if app.hint.is_some() { app.theme.accent } else { app.theme.note };
    let mut line = vec![Span::styled(left, style)];
    if room >= 2 {
        line.push(Span::raw(" ".repeat(room)));
        line.push(Span::styled(right.clone(), app.theme.note));
    }
    frame.render_widget(Paragraph::new(Line::from(line)), area);
}
