//! A chart in characters, as wide as the terminal.

use super::{Chart, Role, scale};
use unicode_width::UnicodeWidthStr;

/// Marks of the series, in their order; then come letters.
const MARKS: [char; 8] = ['●', '▲', '■', '◆', '○', '△', '□', '◇'];
/// Behind [`MARKS`]; without those that look like a mark or a digit. As many
/// as make the sum odd, so that a mark that comes again has another colour.
const LETTERS: &str = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ+";
/// Colours, of the sixteen that every terminal has in its own shades.
const COLOURS: [u8; 8] = [36, 33, 32, 35, 34, 31, 96, 93];
const ROWS: usize = 14;
/// With less there is no picture.
const LEAST_COLUMNS: usize = 30;
/// Wider ones read no better.
const MOST_COLUMNS: usize = 110;

/// `width` columns at most. Empty where that is too narrow, or there is
/// nothing to draw.
pub fn draw(chart: &Chart, width: usize, colour: bool) -> String {
    let top = chart.y_top();
    let marks = scale::ticks(top, 5);
    let labels: Vec<String> = marks.iter().map(|&mark| scale::number(mark, top)).collect();
    let margin = labels.iter().map(String::len).max().unwrap_or(0);
    let columns = width.min(MOST_COLUMNS).saturating_sub(margin + 2);
    let Some((low, high)) = chart.x_range().filter(|_| columns >= LEAST_COLUMNS) else {
        return String::new();
    };
    let grid = grid(chart, (low, high), top, columns);
    let mut out = format!("{}\n", clip(&format!("{} by {}", chart.y_label, chart.x_label), width));
    for (row, line) in grid.iter().enumerate() {
        let here = |mark: &&f64| row_of(**mark, top) == row;
        let label = marks.iter().zip(&labels).find(|(mark, _)| here(mark));
        let (label, tick) = label.map_or(("", '│'), |(_, label)| (label.as_str(), '┤'));
        out += &format!("{label:>margin$} {tick}{}\n", paint(line, colour).trim_end());
    }
    out += &format!("{:margin$} └{}\n", "", "─".repeat(columns));
    out += &format!("{:margin$}  {}\n", "", foot(chart, (low, high), columns));
    out + &legend(chart, width, colour)
}

/// The xs of the points below their columns, as many as have room.
fn foot(chart: &Chart, (low, high): (f64, f64), columns: usize) -> String {
    let mut xs: Vec<f64> = chart.points().map(|(x, _)| x).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let mut line = String::new();
    for x in xs {
        let label = scale::tenths(x);
        let at = column(x, (low, high), columns).min(columns.saturating_sub(label.len()));
        if line.is_empty() || at > line.len() {
            line += &format!("{}{label}", " ".repeat(at - line.len()));
        }
    }
    line
}

/// The column of an x.
fn column(x: f64, (low, high): (f64, f64), columns: usize) -> usize {
    let span = if high > low { high - low } else { 1.0 };
    ((x - low) / span * (columns - 1) as f64).round() as usize
}

/// The row of a value, 0 at the top.
fn row_of(y: f64, top: f64) -> usize {
    let share = (y / top).clamp(0.0, 1.0);
    ((1.0 - share) * (ROWS - 1) as f64).round() as usize
}

/// The mark of a series.
fn mark(series: usize) -> char {
    let letters = || LETTERS.chars();
    let place = series % (MARKS.len() + letters().count());
    let letter = || letters().nth(place - MARKS.len()).unwrap_or('+');
    MARKS.get(place).copied().unwrap_or_else(letter)
}

/// A character and whose it is, `[ROWS][columns]`.
type Cell = Option<(char, usize)>;

fn grid(chart: &Chart, range: (f64, f64), top: f64, columns: usize) -> Vec<Vec<Cell>> {
    let mut grid = vec![vec![None; columns]; ROWS];
    let column = |x: f64| column(x, range, columns);
    // What the picture is about goes over what it is compared with.
    let order =
        |role: Role| chart.series.iter().enumerate().filter(move |(_, series)| series.role == role);
    let mut put = |column: usize, y: f64, mark| grid[row_of(y, top)][column] = Some(mark);
    for (index, series) in order(Role::Reference).chain(order(Role::Main)) {
        let finite = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite();
        let points: Vec<(f64, f64)> = series.points.iter().filter(finite).copied().collect();
        for pair in points.windows(2) {
            let (from, to) = (column(pair[0].0), column(pair[1].0));
            for at in from + 1..to {
                let share = (at - from) as f64 / (to - from) as f64;
                let y = pair[0].1 + share * (pair[1].1 - pair[0].1);
                put(at, y, ('·', index));
            }
        }
        for (x, y) in points {
            put(column(x), y, (mark(index), index));
        }
    }
    grid
}

fn paint(line: &[Cell], colour: bool) -> String {
    let of_one_series = |a: &Cell, b: &Cell| a.map(|(_, index)| index) == b.map(|(_, index)| index);
    let runs = line.chunk_by(of_one_series).map(|cells| {
        let text: String = cells.iter().map(|cell| cell.map_or(' ', |(mark, _)| mark)).collect();
        match cells[0] {
            Some((_, index)) => coloured(&text, index, colour),
            None => text,
        }
    });
    runs.collect()
}

fn coloured(text: &str, series: usize, colour: bool) -> String {
    match colour {
        true => format!("\x1b[{}m{text}\x1b[0m", COLOURS[series % COLOURS.len()]),
        false => text.to_string(),
    }
}

/// Names beside their marks, as many to a line as fit.
fn legend(chart: &Chart, width: usize, colour: bool) -> String {
    let (mut out, mut used) = (String::new(), 0);
    for (index, series) in chart.series.iter().enumerate() {
        let name = clip(&series.name, width.saturating_sub(6));
        let columns = name.width() + 4;
        if used > 0 && used + columns > width {
            out.push('\n');
            used = 0;
        }
        let mark = coloured(&mark(index).to_string(), index, colour);
        out += &format!("  {mark} {name}");
        used += columns;
    }
    out + "\n"
}

/// The beginning that has at most so many columns.
fn clip(text: &str, columns: usize) -> String {
    let mut kept = String::new();
    for character in text.chars().filter(|character| !character.is_control()) {
        kept.push(character);
        if kept.width() > columns {
            kept.pop();
            break;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::super::Series;
    use super::*;
    use std::collections::HashSet;

    fn chart() -> Chart {
        let series = |name: &str, role, points: &[(f64, f64)]| Series {
            name: name.to_string(),
            role,
            points: points.to_vec(),
        };
        Chart {
            title: "t".to_string(),
            notes: Vec::new(),
            x_label: "slots, %".to_string(),
            y_label: "hits, %".to_string(),
            series: vec![
                series("this", Role::Main, &[(10.0, 40.0), (25.0, 65.0), (50.0, 90.0)]),
                series("Belady", Role::Reference, &[(10.0, 50.0), (25.0, 77.0), (50.0, 99.0)]),
                series("odd", Role::Reference, &[(f64::NAN, 1.0), (10.0, f64::INFINITY)]),
            ],
            y_most: Some(100.0),
        }
    }

    #[test]
    fn a_picture_keeps_to_its_width_and_has_every_point() {
        for width in [40, 61, 80, 110, 300] {
            let text = draw(&chart(), width, false);
            assert!(text.lines().all(|line| line.width() <= width), "{width}:\n{text}");
            assert!(!text.contains('\x1b'));
            let picture = text.split("  ● this").next().unwrap();
            assert_eq!(picture.matches('●').count(), 3, "{text}");
            assert_eq!(picture.matches('▲').count(), 3, "{text}");
            // 100 % is the first row of the picture, 0 the last.
            let labels: Vec<&str> = text.lines().filter(|line| line.contains('┤')).collect();
            assert!(labels[0].starts_with("100 ┤") && labels[5].starts_with("  0 ┤"), "{text}");
        }
        assert_eq!(draw(&chart(), 20, false), "");
        assert_eq!(draw(&Chart { series: Vec::new(), ..chart() }, 80, false), "");
    }

    #[test]
    fn more_hits_are_higher() {
        let text = draw(&chart(), 80, false);
        let row = |mark: char, nth: usize| {
            let mut found = text
                .lines()
                .enumerate()
                .flat_map(|(row, line)| {
                    line.chars()
                        .enumerate()
                        .filter(move |(_, c)| *c == mark)
                        .map(move |(at, _)| (at, row))
                })
                .collect::<Vec<_>>();
            found.truncate(3);
            found.sort_unstable();
            found[nth].1
        };
        assert!(row('●', 0) > row('●', 1) && row('●', 1) > row('●', 2));
        assert!(row('▲', 0) < row('●', 0));
    }

    #[test]
    fn no_two_series_look_alike() {
        let marks: HashSet<char> = (0..57).map(mark).collect();
        assert_eq!(marks.len(), 57, "without colours");
        let both: HashSet<_> = (0..57 * 8).map(|one| (mark(one), COLOURS[one % 8])).collect();
        assert_eq!(both.len(), 57 * 8);
        let series = |index: usize| Series {
            name: format!("line {index}"),
            role: Role::Main,
            points: vec![(0.0, index as f64), (1.0, index as f64)],
        };
        let many = Chart { series: (0..12).map(series).collect(), y_most: Some(12.0), ..chart() };
        let text = draw(&many, 80, false);
        for wanted in ["◇ line 7", "a line 8", "d line 11"] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert_eq!(text.matches('●').count(), 3, "two points and a name: {text}");
    }

    #[test]
    fn colour_is_only_added_where_it_is_wanted() {
        let plain = draw(&chart(), 80, false);
        let coloured = draw(&chart(), 80, true);
        assert!(coloured.contains("\x1b[36m●\x1b[0m this"));
        let mut stripped = coloured;
        for code in COLOURS {
            stripped = stripped.replace(&format!("\x1b[{code}m"), "");
        }
        assert_eq!(stripped.replace("\x1b[0m", ""), plain);
        let hostile = Chart { y_label: "a\x1b[2Jb".to_string(), ..chart() };
        assert!(!draw(&hostile, 80, false).contains('\x1b'));
    }
}
