//! What a model's own experts say of each other: beside the network, which
//! knows no ids, tables that were trained on traces of one model.
//!
//! Each layer has four tables of experts by experts: what the experts of this
//! event say of each expert's next use, those of the MoE layer before, and the
//! averages of this layer's use over some 12 and some 100 tokens. What they say
//! is added to the network's answers before the logistic function. All of it is
//! linear, so that sums are kept up to date: an event adds a few rows.

use crate::vocabulary::Shape;
use std::fmt;

const MAGIC: [u8; 8] = *b"PGFITTD1";

/// Tables of a layer.
pub const TABLES: usize = 4;

/// What an average keeps with each token, for the last two tables; the first
/// two are of this token alone.
pub const KEPT: [f32; 2] = [0.92, 0.99];

/// What tables say is limited to so much.
const MOST: f32 = 6.0;

/// Bytes that are no tables for this model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FittedError {
    /// Another magic number: no such file, or of another version.
    Magic,
    /// Made for a model of another fingerprint.
    Fingerprint,
    /// Made for another number of layers, or of experts in a layer.
    Shape { layer: usize, found: usize, expected: usize },
    /// Shorter or longer than its shape says.
    Length { found: usize, expected: usize },
    /// A scale that is not finite, counted from the first.
    NotFinite { table: usize },
}

impl fmt::Display for FittedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => write!(f, "not a value of this version (no PGFITTD1)"),
            Self::Fingerprint => write!(f, "the value was trained for another model"),
            Self::Shape { layer, found, expected } => write!(
                f,
                "the value was trained for {found} experts in layer {layer}, the model has {expected}"
            ),
            Self::Length { found, expected } => {
                write!(f, "the value has {found} bytes, its shape needs {expected}")
            }
            Self::NotFinite { table } => write!(f, "the scale of table {table} is not finite"),
        }
    }
}

impl std::error::Error for FittedError {}

/// One layer's tables, as they are trained and as they are kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// What a unit of `numbers` is.
    pub scale: f32,
    /// `[from][experts]`
    pub numbers: Vec<i8>,
}

impl Table {
    /// The nearest that 8 bits say of `numbers`.
    pub fn rounded(numbers: &[f32]) -> Self {
        let most = numbers.iter().fold(0f32, |most, number| most.max(number.abs()));
        let scale = most / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        Self {
            scale,
            numbers: numbers.iter().map(|number| (number * inverse).round() as i8).collect(),
        }
    }

    /// Adds `weight` times the row of expert `from`.
    fn add(&self, from: usize, weight: f32, sums: &mut [f32]) {
        let Some(row) = self.numbers.chunks_exact(sums.len().max(1)).nth(from) else { return };
        let weight = weight * self.scale;
        sums.iter_mut().zip(row).for_each(|(sum, &number)| *sum += weight * f32::from(number));
    }
}

/// What a layer knows: tables, and what they say of the present.
#[derive(Clone, Debug, Default, PartialEq)]
struct Layer {
    experts: usize,
    /// Of this event, of the layer before, of [`KEPT`]; then one row: what is
    /// said whatever was used.
    tables: [Table; TABLES + 1],
    /// `[experts]`, of this token.
    now: Vec<f32>,
    /// `[experts]` each.
    averages: [Vec<f32>; 2],
}

/// Tables of all layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    fingerprint: Option<[u8; 32]>,
    layers: Vec<Layer>,
    /// The experts of the MoE layer that ran last in this token.
    before: Vec<u32>,
}

/// Experts of each layer, and of the MoE layer before it (0 for the first).
fn sizes(shape: &Shape) -> Vec<(usize, usize)> {
    let mut before = 0;
    let of = |layer: &Option<crate::LayerShape>| {
        let experts = layer.as_ref().map_or(0, |layer| layer.experts);
        let size = (experts, if experts > 0 { before } else { 0 });
        before = if experts > 0 { experts } else { before };
        size
    };
    shape.layers.iter().map(of).collect()
}

/// Numbers of each of a layer's tables.
pub fn lengths(shape: &Shape) -> Vec<[usize; TABLES + 1]> {
    let of = |(own, before)| [own * own, before * own, own * own, own * own, own];
    sizes(shape).into_iter().map(of).collect()
}

/// Bytes of [`Fitted::to_bytes`] for a model of this shape; `None` beyond
/// `usize`.
pub fn bytes(shape: &Shape) -> Option<usize> {
    let head = shape.layers.len().checked_mul(4)?.checked_add(MAGIC.len() + 32 + 4)?;
    sizes(shape).into_iter().try_fold(head, |sum, (own, before)| {
        let rows = own.checked_mul(TABLES - 1)?.checked_add(before)?.checked_add(1)?;
        sum.checked_add(rows.checked_mul(own)?)?.checked_add(4 * (TABLES + 1))
    })
}

impl Fitted {
    /// Of the model that it was made for, if that is known.
    pub fn fingerprint(&self) -> Option<[u8; 32]> {
        self.fingerprint
    }

    /// From tables that were trained, `[layers]`, of [`lengths`].
    pub fn new(
        shape: &Shape,
        fingerprint: Option<[u8; 32]>,
        tables: Vec<[Table; TABLES + 1]>,
    ) -> Self {
        let layer = |((experts, _), tables): ((usize, usize), [Table; TABLES + 1])| Layer {
            experts,
            tables,
            now: vec![0.0; experts],
            averages: [vec![0.0; experts], vec![0.0; experts]],
        };
        let layers = sizes(shape).into_iter().zip(tables).map(layer).collect();
        Self { fingerprint, layers, before: Vec::new() }
    }

    /// From [`Fitted::to_bytes`], for a model of `shape`. A model or a file
    /// without a fingerprint is judged by the shape alone.
    ///
    /// # Errors
    /// Bytes that are no tables for this model.
    pub fn from_bytes(
        bytes: &[u8],
        shape: &Shape,
        fingerprint: Option<[u8; 32]>,
    ) -> Result<Self, FittedError> {
        let mut rest = bytes.strip_prefix(&MAGIC).ok_or(FittedError::Magic)?;
        let expected = self::bytes(shape).unwrap_or(usize::MAX);
        let short = FittedError::Length { found: bytes.len(), expected };
        let mut take = |count: usize| -> Result<&[u8], FittedError> {
            let (head, tail) = rest.split_at_checked(count).ok_or(short)?;
            rest = tail;
            Ok(head)
        };
        let made_for: [u8; 32] = take(32)?.try_into().expect("32 bytes");
        let made_for = (made_for != [0; 32]).then_some(made_for);
        if matches!((made_for, fingerprint), (Some(one), Some(other)) if one != other) {
            return Err(FittedError::Fingerprint);
        }
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let layers = word(take(4)?) as usize;
        if layers != shape.layers.len() {
            let expected = shape.layers.len();
            return Err(FittedError::Shape { layer: layers.min(expected), found: 0, expected: 0 });
        }
        for (layer, &(expected, _)) in sizes(shape).iter().enumerate() {
            let found = word(take(4)?) as usize;
            if found != expected {
                return Err(FittedError::Shape { layer, found, expected });
            }
        }
        if bytes.len() != expected {
            return Err(short);
        }
        let mut tables = Vec::new();
        for (layer, lengths) in lengths(shape).iter().enumerate() {
            let mut of_layer: [Table; TABLES + 1] = Default::default();
            for (table, (&length, to)) in lengths.iter().zip(&mut of_layer).enumerate() {
                to.scale = f32::from_bits(word(take(4)?));
                if !to.scale.is_finite() {
                    return Err(FittedError::NotFinite { table: layer * (TABLES + 1) + table });
                }
                to.numbers = take(length)?.iter().map(|&byte| byte as i8).collect();
            }
            tables.push(of_layer);
        }
        Ok(Self::new(shape, made_for, tables))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.fingerprint.unwrap_or_default());
        bytes.extend((self.layers.len() as u32).to_le_bytes());
        let experts = self.layers.iter().map(|layer| layer.experts as u32);
        bytes.extend(experts.flat_map(u32::to_le_bytes));
        for table in self.layers.iter().flat_map(|layer| &layer.tables) {
            bytes.extend(table.scale.to_le_bytes());
            bytes.extend(table.numbers.iter().map(|&number| number as u8));
        }
        bytes
    }

    /// Was it made for a model of this shape?
    pub fn fits(&self, shape: &Shape) -> bool {
        let experts = shape.layers.iter().map(|layer| layer.as_ref().map_or(0, |l| l.experts));
        self.layers.len() == shape.layers.len()
            && self.layers.iter().zip(experts).all(|(layer, experts)| layer.experts == experts)
    }

    pub fn next_token(&mut self) {
        self.before.clear();
    }

    /// A token chose `experts` in `layer`. `counts` of a chunk's do not
    /// matter.
    pub fn used(&mut self, layer: usize, experts: &[u32]) {
        let Some(state) = self.layers.get_mut(layer).filter(|layer| layer.experts > 0) else {
            return;
        };
        let [now, before, recent, long, always] = &state.tables;
        state.now.fill(0.0);
        always.add(0, 1.0, &mut state.now);
        experts.iter().for_each(|&expert| now.add(expert as usize, 1.0, &mut state.now));
        for &expert in &self.before {
            before.add(expert as usize, 1.0, &mut state.now);
        }
        for ((table, kept), sums) in [recent, long].into_iter().zip(KEPT).zip(&mut state.averages) {
            sums.iter_mut().for_each(|sum| *sum *= kept);
            experts.iter().for_each(|&expert| table.add(expert as usize, 1.0 - kept, sums));
        }
        self.before.clear();
        self.before.extend_from_slice(experts);
    }

    /// What is added to the network's answers about `expert`.
    pub fn says(&self, layer: usize, expert: u32) -> f32 {
        let Some(state) = self.layers.get(layer) else { return 0.0 };
        let at = |sums: &Vec<f32>| sums.get(expert as usize).copied().unwrap_or(0.0);
        let sum = at(&state.now) + at(&state.averages[0]) + at(&state.averages[1]);
        if sum.is_nan() { 0.0 } else { sum.clamp(-MOST, MOST) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[from][experts]` of four experts, in tenths.
    fn table(numbers: &[(usize, usize, i8)], length: usize) -> Table {
        let mut table = Table { scale: 0.1, numbers: vec![0; length] };
        for &(from, expert, number) in numbers {
            table.numbers[from * 4 + expert] = number;
        }
        table
    }

    #[test]
    fn it_says_the_sum_of_its_tables() {
        let shape = Shape::uniform(2, 4, 1, 1);
        let of_layer = |before: usize| {
            [
                table(&[(3, 1, 10), (2, 1, 20)], 16),
                table(if before > 0 { &[(2, 0, 5)] } else { &[] }, before * 4),
                table(&[(3, 1, 100)], 16),
                table(&[(3, 2, 100)], 16),
                table(&[(0, 0, 3)], 4),
            ]
        };
        let mut fitted = Fitted::new(&shape, None, vec![of_layer(0), of_layer(4)]);
        let near = |found: f32, want: f32| assert!((found - want).abs() < 1e-5, "{found} {want}");
        fitted.next_token();
        fitted.used(0, &[3]);
        near(fitted.says(0, 1), 1.0 + 10.0 * 0.08);
        near(fitted.says(0, 2), 10.0 * 0.01);
        near(fitted.says(0, 0), 0.3);
        fitted.used(1, &[3]);
        near(fitted.says(1, 0), 0.3);
        // A token later: averages fade, and layer 1 hears of layer 0.
        fitted.next_token();
        fitted.used(0, &[2]);
        near(fitted.says(0, 1), 2.0 + 10.0 * 0.08 * 0.92);
        fitted.used(1, &[0]);
        near(fitted.says(1, 0), 0.3 + 0.5);
        near(fitted.says(1, 1), 10.0 * 0.08 * 0.92);
        assert_eq!(fitted.says(7, 0), 0.0);
        assert_eq!(fitted.says(0, 9), 0.0);
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_of_their_scale() {
        let table = Table::rounded(&[0.0, 12.7, -6.34, 0.04]);
        assert_eq!(table.numbers, [0, 127, -63, 0]);
        assert!((table.scale - 0.1).abs() < 1e-6);
        assert_eq!(Table::rounded(&[0.0; 3]).numbers, [0; 3]);
    }
}
