//! Pictures of figures: curves in the terminal, curves and heat maps as SVG.
//!
//! The same data draw the same bytes.

pub mod heat;
mod scale;
pub mod svg;
pub mod terminal;

/// What a line stands for, which decides how it is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// What the picture is about.
    Main,
    /// A bound or something to compare with.
    Reference,
}

/// One line.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub role: Role,
    /// By ascending x.
    pub points: Vec<(f64, f64)>,
}

/// Lines over one pair of axes.
#[derive(Clone, Debug)]
pub struct Chart {
    pub title: String,
    /// Lines below the title: what the data are.
    pub notes: Vec<String>,
    pub x_label: String,
    pub y_label: String,
    pub series: Vec<Series>,
    /// Both axes begin at 0; `None`: y ends where the data do.
    pub y_most: Option<f64>,
}

impl Chart {
    /// The smallest and largest x; `None` without points.
    fn x_range(&self) -> Option<(f64, f64)> {
        let xs = || self.points().map(|(x, _)| x);
        let (low, high) = (xs().fold(f64::INFINITY, f64::min), xs().fold(0.0, f64::max));
        low.is_finite().then_some((low, high))
    }

    fn y_top(&self) -> f64 {
        let most = self.points().map(|(_, y)| y).fold(0.0, f64::max);
        self.y_most.unwrap_or_else(|| scale::nice_top(most))
    }

    /// Of all series; what is not finite is left out.
    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        let all = self.series.iter().flat_map(|series| series.points.iter().copied());
        all.filter(|(x, y)| x.is_finite() && y.is_finite())
    }
}
