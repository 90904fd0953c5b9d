//! Heat maps as SVG.

use super::svg;
use std::fmt::Write;

/// One value for each row and column.
#[derive(Clone, Debug)]
pub struct Heat {
    pub title: String,
    pub notes: Vec<String>,
    /// What rows and columns are: "layer", "expert".
    pub row_label: String,
    pub column_label: String,
    /// Names of columns; with a few, each is written.
    pub columns: Vec<String>,
    /// Names and values of rows, `[columns]`; `None` is left blank.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
    /// What the darkest and the brightest colour stand for, in words.
    pub ends: (f64, f64),
    pub unit: String,
}

/// Colours from low to high: even steps of lightness, for all kinds of colour
/// vision (values of matplotlib's viridis, which is in the public domain).
const COLOURS: [&str; 10] = [
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58",
    "#b5de2b", "#fde725",
];

const LEFT: f64 = 62.0;
const RIGHT: f64 = 24.0;
const LEAST_WIDTH: f64 = 760.0;
const LINE: f64 = 17.0;
/// Cells that are so wide have their value written in them.
const ROOM_FOR_NUMBERS: f64 = 36.0;

/// Maps, one below the other.
pub fn draw(maps: &[Heat]) -> String {
    let (mut body, mut y) = (String::new(), 0.0);
    let widths = maps.iter().map(|map| LEFT + RIGHT + cell(map).0 * map.columns.len() as f64);
    let width = widths.fold(LEAST_WIDTH, f64::max);
    for map in maps {
        y = panel(&mut body, map, y);
    }
    svg::document(maps.first().map_or("", |map| &map.title), width, y, &body)
}

/// Width and height of a cell: large where there are few.
fn cell(map: &Heat) -> (f64, f64) {
    let columns = map.columns.len().max(1) as f64;
    let width = ((LEAST_WIDTH - LEFT - RIGHT) / columns).clamp(4.0, 60.0).floor();
    (width, (420.0 / map.rows.len().max(1) as f64).clamp(5.0, 15.0).floor())
}

/// Which of [`COLOURS`].
fn level(value: f64, (low, high): (f64, f64)) -> usize {
    let share = if high > low { (value - low) / (high - low) } else { 0.0 };
    ((share.clamp(0.0, 1.0) * COLOURS.len() as f64) as usize).min(COLOURS.len() - 1)
}

fn panel(out: &mut String, map: &Heat, y: f64) -> f64 {
    let y = svg::heading(out, &map.title, &map.notes, y) + 24.0;
    legend(out, map, y);
    let top = y + 1.6 * LINE;
    svg::text(out, "quiet", 16.0, top, &map.row_label, 20);
    let top = top + 8.0;
    let (wide, high) = cell(map);
    // Cells of a colour are one path: a map of 58 layers of 256 experts has
    // 15,000 of them.
    let mut paths = vec![String::new(); COLOURS.len()];
    for (row, (_, values)) in map.rows.iter().enumerate() {
        for (column, value) in values.iter().enumerate().take(map.columns.len()) {
            let Some(value) = value.filter(|value| value.is_finite()) else { continue };
            let (x, y) = (LEFT + column as f64 * wide, top + row as f64 * high);
            let path = &mut paths[level(value, map.ends)];
            let _ = write!(path, "M{x:.0} {y:.0}h{wide:.0}v{high:.0}h-{wide:.0}z");
        }
    }
    for (path, colour) in paths.iter().zip(COLOURS).filter(|(path, _)| !path.is_empty()) {
        let _ = writeln!(out, "<path fill=\"{colour}\" d=\"{path}\"/>");
    }
    if wide >= ROOM_FOR_NUMBERS && high >= 13.0 {
        numbers(out, map, top);
    }
    let every = (13.0 / high).ceil() as usize;
    for (row, (name, _)) in map.rows.iter().enumerate().step_by(every.max(1)) {
        let y = top + row as f64 * high + (high + 9.0) / 2.0;
        svg::text(out, "quiet end", LEFT - 8.0, y, name, 8);
    }
    let bottom = top + high * map.rows.len() as f64;
    let every = (44.0 / wide).ceil() as usize;
    for (column, name) in map.columns.iter().enumerate().step_by(every.max(1)) {
        let x = LEFT + (column as f64 + 0.5) * wide;
        svg::text(out, "quiet middle", x, bottom + LINE, name, 8);
    }
    let middle = LEFT + wide * map.columns.len() as f64 / 2.0;
    svg::text(
        out,
        "quiet middle",
        middle.max(LEFT + 60.0),
        bottom + 2.2 * LINE,
        &map.column_label,
        80,
    );
    bottom + 3.2 * LINE
}

/// Each value in its cell, in whichever of black and white stands out there.
fn numbers(out: &mut String, map: &Heat, top: f64) {
    let (wide, high) = cell(map);
    for (row, (_, values)) in map.rows.iter().enumerate() {
        for (column, value) in values.iter().enumerate().take(map.columns.len()) {
            let Some(value) = value.filter(|value| value.is_finite()) else { continue };
            let class = match level(value, map.ends) {
                0..=4 => "middle on-dark",
                _ => "middle on-bright",
            };
            let x = LEFT + (column as f64 + 0.5) * wide;
            let y = top + row as f64 * high + (high + 8.0) / 2.0;
            svg::text(out, class, x, y, &format!("{value:.0}"), 8);
        }
    }
}

/// The colours with their ends.
fn legend(out: &mut String, map: &Heat, y: f64) {
    let (low, high) = map.ends;
    let x = 16.0;
    let low = format!("{low:.0} {}", map.unit);
    svg::text(out, "quiet", x, y, &low, 30);
    let start = x + 12.0 + 7.0 * low.chars().count() as f64;
    for (index, colour) in COLOURS.iter().enumerate() {
        let x = start + 14.0 * index as f64;
        let top = y - 11.0;
        let _ = writeln!(out, "<path fill=\"{colour}\" d=\"M{x:.0} {top:.0}h14v14h-14z\"/>");
    }
    let end = start + 14.0 * COLOURS.len() as f64 + 8.0;
    svg::text(out, "quiet", end, y, &format!("{high:.0} {}", map.unit), 30);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_cell_of_its_colour() {
        let map = Heat {
            title: "<t>".to_string(),
            notes: Vec::new(),
            row_label: "layer".to_string(),
            column_label: "slots".to_string(),
            columns: ["10 %", "50 %"].map(str::to_string).to_vec(),
            rows: vec![
                ("0".to_string(), vec![Some(0.0), Some(100.0)]),
                ("1".to_string(), vec![None, Some(f64::NAN)]),
                ("2".to_string(), vec![Some(55.0), Some(1e9), Some(7.0)]),
            ],
            ends: (0.0, 100.0),
            unit: "%".to_string(),
        };
        let file = draw(&[map]);
        // The legend has one square of each.
        let cells = |colour: &str| {
            let paths = file.lines().filter(|line| line.contains(colour));
            paths.map(|path| path.matches('M').count()).sum::<usize>() - 1
        };
        assert_eq!((cells(COLOURS[0]), cells(COLOURS[5]), cells(COLOURS[9])), (1, 1, 2));
        assert_eq!(COLOURS.iter().map(|colour| cells(colour)).sum::<usize>(), 4);
        assert!(!file.contains("NaN") && !file.contains("<t>"));
    }
}
