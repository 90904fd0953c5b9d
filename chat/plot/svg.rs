//! Charts as SVG: one file without anything from outside, readable on light
//! and on dark ground.

use super::{Chart, Role, Series, scale};
use std::fmt::Write;

const LEAST_WIDTH: f64 = 760.0;
const PLOT_HEIGHT: f64 = 260.0;
const LEFT: f64 = 62.0;
/// Where lines end, and names begin.
const RIGHT: f64 = 570.0;
/// Of a letter of a name, and of what stands before the first one.
const LETTER: f64 = 6.8;
const NAME_INDENT: f64 = 24.0;
const LINE: f64 = 17.0;
/// Names at the ends of lines are so far apart at least.
const NAME_GAP: f64 = 14.0;
/// Longer text would leave the picture.
const MOST_CHARS: usize = 108;
const MOST_NAME_CHARS: usize = 100;
/// Colours with a name `s0` to `s7` in [`STYLE`]. Lines of the same colour have
/// other marks.
const COLOURS: usize = 8;
/// Of a mark around a point, but the first, which is a circle.
const SHAPES: [&str; 4] =
    ["m-3 -3h6v6h-6z", "m0 -4l4 7h-8z", "m0 -4l4 4l-4 4l-4 -4z", "m0 4l4 -7h-8z"];

/// Ground and text follow the reader's theme. The eight colours (after Okabe
/// and Ito, for all kinds of colour vision) have enough contrast on both.
const STYLE: &str = "\
.ground{fill:#ffffff}.text{fill:#1f2328}.quiet{fill:#59636e}.grid{stroke:#d1d9e0}
.axis{stroke:#59636e}.line{fill:none;stroke-width:2}.reference{stroke-dasharray:5 4}
.s0{color:#0969b8}.s1{color:#b35900}.s2{color:#00805c}.s3{color:#b0487f}
.s4{color:#59636e}.s5{color:#8a6d00}.s6{color:#2e8fc4}.s7{color:#c0392b}
.line{stroke:currentColor}.mark,.name{fill:currentColor}
@media (prefers-color-scheme:dark){.ground{fill:#0d1117}.text{fill:#e6edf3}.quiet{fill:#9198a1}
.grid{stroke:#30363d}.axis{stroke:#9198a1}.s0{color:#58a6ff}.s1{color:#f0883e}.s2{color:#3fb98b}
.s3{color:#e58fc0}.s4{color:#a8b1ba}.s5{color:#d9b93b}.s6{color:#7cc7f0}.s7{color:#ff7b72}}
text{font:12px system-ui,sans-serif}.title{font-size:15px;font-weight:600}.end{text-anchor:end}
.middle{text-anchor:middle}.on-dark{fill:#ffffff}.on-bright{fill:#1f2328}";

/// Charts, one below the other.
pub fn draw(charts: &[Chart]) -> String {
    let mut body = String::new();
    let mut y = 0.0;
    for chart in charts {
        y = panel(&mut body, chart, y);
    }
    let title = charts.first().map_or("", |chart| &chart.title);
    let names = charts.iter().flat_map(|chart| &chart.series);
    let longest = names.map(|series| series.name.chars().count()).max().unwrap_or(0);
    let letters = longest.min(MOST_NAME_CHARS) as f64;
    document(title, LEAST_WIDTH.max(RIGHT + NAME_INDENT + LETTER * letters), y, &body)
}

/// A file with `body` on the ground.
pub fn document(title: &str, width: f64, height: f64, body: &str) -> String {
    let title = escape(title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n<rect class=\"ground\" width=\"100%\" height=\"100%\"/>\n\
         {body}</svg>\n"
    )
}

/// Text of others as text: nothing in it is markup, and characters that XML
/// forbids are left out.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => {}
            control if control.is_control() => out.push(' '),
            other => out.push(other),
        }
    }
    out
}

/// A line of text whose baseline ends at `y`.
pub fn text(out: &mut String, class: &str, x: f64, y: f64, words: &str, most_chars: usize) {
    let count = words.chars().count();
    let words: String = match count > most_chars {
        true => words.chars().take(most_chars - 1).chain(['…']).collect(),
        false => words.to_string(),
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
        escape(&words)
    );
}

/// Title and notes; where they end.
pub fn heading(out: &mut String, title: &str, notes: &[String], y: f64) -> f64 {
    let mut y = y + 26.0;
    text(out, "text title", 16.0, y, title, MOST_CHARS * 4 / 5);
    for note in notes {
        y += LINE;
        text(out, "quiet", 16.0, y, note, MOST_CHARS);
    }
    y
}

/// Where values lie on the paper.
struct Axes {
    left: f64,
    top: f64,
    height: f64,
    x: (f64, f64),
    y_top: f64,
}

impl Axes {
    fn x(&self, x: f64) -> f64 {
        let (low, high) = self.x;
        let share = if high > low { (x - low) / (high - low) } else { 0.5 };
        self.left + share * (RIGHT - self.left)
    }

    fn y(&self, y: f64) -> f64 {
        self.top + (1.0 - (y / self.y_top).clamp(0.0, 1.0)) * self.height
    }
}

fn panel(out: &mut String, chart: &Chart, y: f64) -> f64 {
    let y = heading(out, &chart.title, &chart.notes, y) + 24.0;
    text(out, "quiet", 16.0, y, &chart.y_label, MOST_CHARS);
    let top = y + 12.0;
    // Names of many lines need more room than the lines.
    let height = PLOT_HEIGHT.max(NAME_GAP * chart.series.len() as f64);
    let bottom = top + height;
    let Some(x) = chart.x_range() else {
        text(out, "quiet", LEFT, top + LINE, "no data", MOST_CHARS);
        return bottom;
    };
    let axes = Axes { left: LEFT, top, height, x, y_top: chart.y_top() };
    for mark in scale::ticks(axes.y_top, 5) {
        let at = axes.y(mark);
        let class = if mark == 0.0 { "axis" } else { "grid" };
        let _ = writeln!(out, "<path class=\"{class}\" d=\"M{LEFT} {at:.1}H{RIGHT:.1}\"/>");
        let label = scale::number(mark, axes.y_top);
        text(out, "quiet end", LEFT - 8.0, at + 4.0, &label, MOST_CHARS);
    }
    for mark in x_marks(chart) {
        let label = scale::tenths(mark);
        text(out, "quiet middle", axes.x(mark), bottom + LINE, &label, MOST_CHARS);
    }
    let middle = (LEFT + RIGHT) / 2.0;
    text(out, "quiet middle", middle, bottom + 2.2 * LINE, &chart.x_label, MOST_CHARS);
    let mut names = Vec::new();
    for (index, series) in chart.series.iter().enumerate() {
        names.extend(line(out, &axes, index, series).map(|end| (end, index)));
    }
    end_names(out, chart, names, top, bottom);
    bottom + 3.2 * LINE
}

/// The xs of the first line; where they are too dense, some of them.
fn x_marks(chart: &Chart) -> Vec<f64> {
    let longest = chart.series.iter().max_by_key(|series| series.points.len());
    let xs: Vec<f64> =
        longest.iter().flat_map(|series| &series.points).map(|point| point.0).collect();
    let every = xs.len().div_ceil(14).max(1);
    xs.into_iter().filter(|x| x.is_finite()).step_by(every).collect()
}

/// The height of the line's end; `None` for one without points.
fn line(out: &mut String, axes: &Axes, index: usize, series: &Series) -> Option<f64> {
    let finite = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite();
    let points: Vec<(f64, f64)> =
        series.points.iter().filter(finite).map(|&(x, y)| (axes.x(x), axes.y(y))).collect();
    let &(_, end) = points.last()?;
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
    let dashes = if series.role == Role::Reference { " reference" } else { "" };
    let _ = writeln!(
        out,
        "<g class=\"s{}\"><path class=\"line{dashes}\" d=\"M{}\"/>",
        index % COLOURS,
        path.join("L")
    );
    points.iter().for_each(|&(x, y)| mark(out, index, x, y));
    out.push_str("</g>\n");
    Some(end)
}

/// The mark of line `index`: each round of colours has its own, filled ones
/// before hollow ones.
fn mark(out: &mut String, index: usize, x: f64, y: f64) {
    let round = index / COLOURS % (2 * (SHAPES.len() + 1));
    let shape = match (round % (SHAPES.len() + 1)).checked_sub(1) {
        None => format!("circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\""),
        Some(shape) => format!("path d=\"M{x:.1} {y:.1}{}\"", SHAPES[shape]),
    };
    let (name, place) = shape.split_once(' ').unwrap_or((&shape, ""));
    let paint = match round > SHAPES.len() {
        true => "fill=\"none\" stroke=\"currentColor\"",
        false => "class=\"mark\"",
    };
    let _ = writeln!(out, "<{name} {paint} {place}/>");
}

/// Names beside the ends, moved apart where lines end together.
fn end_names(out: &mut String, chart: &Chart, mut names: Vec<(f64, usize)>, top: f64, bottom: f64) {
    names.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut least = top;
    for (y, _) in &mut names {
        *y = y.max(least);
        least = *y + NAME_GAP;
    }
    // What was pushed out below moves everybody up.
    let mut most = bottom;
    for (y, _) in names.iter_mut().rev() {
        *y = y.min(most);
        most = *y - NAME_GAP;
    }
    // Where colours do not tell lines apart, marks do.
    let (x, needs_marks) = (RIGHT + 10.0, chart.series.len() > COLOURS);
    for (y, index) in names {
        let colour = index % COLOURS;
        if needs_marks {
            let _ = write!(out, "<g class=\"s{colour}\">");
            mark(out, index, x + 2.0, y);
            out.push_str("</g>\n");
        }
        let x = if needs_marks { x + 12.0 } else { x };
        let name = &chart.series[index].name;
        text(out, &format!("name s{colour}"), x, y + 4.0, name, MOST_NAME_CHARS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn text_of_others_is_only_text() {
        assert_eq!(escape("a<b>&\"'\u{7}\u{ffff}é"), "a&lt;b&gt;&amp;&quot;&#39; é");
        let chart = Chart {
            title: "</title><script>".to_string(),
            notes: vec!["x".repeat(500)],
            x_label: "]]>".to_string(),
            y_label: "&nope;".to_string(),
            series: vec![Series {
                name: "<b>".to_string(),
                role: Role::Main,
                points: vec![(1.0, f64::NAN), (2.0, 3.0)],
            }],
            y_most: None,
        };
        let file = draw(&[chart]);
        for wrong in ["<script", "<b>", "&nope", "NaN", "inf", &"x".repeat(200)] {
            assert!(!file.contains(wrong), "{wrong} in {file}");
        }
        assert!(file.contains("&lt;b&gt;") && file.contains("…"));
    }

    /// Lines that end together.
    fn lines(count: usize) -> String {
        let series = |index: usize| Series {
            name: format!("line {index}"),
            role: Role::Main,
            points: vec![(0.0, 0.0), (1.0, 0.001 * index as f64)],
        };
        draw(&[Chart {
            title: String::new(),
            notes: Vec::new(),
            x_label: String::new(),
            y_label: String::new(),
            series: (0..count).map(series).collect(),
            y_most: Some(1.0),
        }])
    }

    #[test]
    fn no_two_lines_look_alike() {
        let looks = |index: usize| {
            let mut mark_of = String::new();
            mark(&mut mark_of, index, 0.0, 0.0);
            (index % COLOURS, mark_of)
        };
        let all: HashSet<_> = (0..80).map(looks).collect();
        assert_eq!(all.len(), 80);
        // The ninth's points and its name have a square, the first's a circle.
        let file = lines(9);
        assert_eq!(file.matches(SHAPES[0]).count(), 3, "{file}");
        assert_eq!(lines(8).matches("<circle").count(), 16, "colours are enough");
    }

    #[test]
    fn names_of_lines_that_end_together_are_apart_and_inside() {
        names_are_apart_and_inside(&lines(8), 8);
        names_are_apart_and_inside(&lines(40), 40);
    }

    #[test]
    fn pictures_are_as_wide_as_their_names() {
        let named = |letters: usize| {
            let name = "m".repeat(letters);
            let series = vec![Series { name, role: Role::Main, points: vec![(0.0, 1.0)] }];
            let words = String::new;
            let (title, x_label, y_label) = (words(), words(), words());
            let chart = Chart { title, notes: vec![], x_label, y_label, series, y_most: None };
            let file = draw(&[chart]);
            let width = file.split("width=\"").nth(1).unwrap().split('"').next().unwrap();
            (width.parse::<f64>().unwrap(), file.contains(&"m".repeat(letters)))
        };
        assert_eq!(named(10), (LEAST_WIDTH, true));
        let (width, is_whole) = named(60);
        assert!(is_whole && width >= RIGHT + 60.0 * LETTER, "{width}");
        // Whoever has a name of a megabyte gets a picture all the same.
        let (width, is_whole) = named(1 << 20);
        assert!(!is_whole && width < 1500.0, "{width}");
    }

    fn names_are_apart_and_inside(file: &str, count: usize) {
        let height = |line: &str| -> f64 {
            line.split(" y=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        let ys: Vec<f64> =
            file.lines().filter(|line| line.contains("\"name ")).map(height).collect();
        assert_eq!(ys.len(), count);
        assert!(ys.windows(2).all(|pair| pair[1] - pair[0] >= NAME_GAP - 0.11), "{ys:?}");
        let axis = file.lines().find(|line| line.contains("\"axis\"")).unwrap();
        let axis: f64 =
            axis.split("M62 ").nth(1).unwrap().split('H').next().unwrap().parse().unwrap();
        assert!(ys.iter().all(|y| *y <= axis + 4.1), "{ys:?} {axis}");
        let grid = |line: &&str| line.contains("\"grid\"");
        let top = file.lines().filter(grid).map(|line| line.split("M62 ").nth(1).unwrap());
        let top = top.map(|at| at.split('H').next().unwrap().parse::<f64>().unwrap());
        let top = top.fold(f64::INFINITY, f64::min);
        assert!(ys.iter().all(|y| *y >= top), "{ys:?} {top}");
    }
}
