//! A small network from what is known of an expert to what it is worth, and
//! the bytes that it is kept in.

use super::features::FEATURES;
use crate::forecast::fast;
use std::fmt;

/// Hidden units. 32, and two layers of 32, closed no more of the gap than the
/// noise of training (docs/measurements.md).
pub const HIDDEN: usize = 16;

/// What is answered, by the discount of its horizon: an expert that is used
/// again after `d` tokens has `discount^(d - 1)`. The first is the probability
/// of the next token.
pub const HORIZONS: [f32; 3] = [0.0, 0.92, 0.97];

const MAGIC: [u8; 8] = *b"PGVALUE1";

/// Numbers of a network.
pub const PARAMETERS: usize = (FEATURES + 1 + HORIZONS.len()) * HIDDEN + HORIZONS.len();

/// Bytes that are no network of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkError {
    /// Another magic number: no such file, or of another version.
    Magic,
    /// Another length than a network has.
    Length { found: usize, expected: usize },
    /// A number that is not finite, counted from the first.
    NotFinite { index: usize },
}

impl fmt::Display for NetworkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => write!(f, "not a value network of this version (no PGVALUE1)"),
            Self::Length { found, expected } => {
                write!(f, "a value network has {expected} bytes, this has {found}")
            }
            Self::NotFinite { index } => write!(f, "number {index} of the network is not finite"),
        }
    }
}

impl std::error::Error for NetworkError {}

/// One hidden layer of rectified units, and a logistic output per horizon.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// `[features][hidden]`
    pub input: [[f32; HIDDEN]; FEATURES],
    pub bias: [f32; HIDDEN],
    /// `[horizons][hidden]`
    pub output: [[f32; HIDDEN]; HORIZONS.len()],
    pub output_bias: [f32; HORIZONS.len()],
}

impl Network {
    pub const BYTES: usize = MAGIC.len() + 4 * PARAMETERS;

    /// The one that ships: trained on gpt-oss-20b (`universal.md`).
    pub fn universal() -> Self {
        Self::from_bytes(include_bytes!("universal.bin")).expect("the shipped file is tested")
    }

    /// From [`Network::to_bytes`].
    ///
    /// # Errors
    /// Bytes that are no network of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NetworkError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(NetworkError::Magic);
        }
        if bytes.len() != Self::BYTES {
            return Err(NetworkError::Length { found: bytes.len(), expected: Self::BYTES });
        }
        let word = |word: &[u8]| f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        let numbers: Vec<f32> = bytes[MAGIC.len()..].chunks_exact(4).map(word).collect();
        match numbers.iter().position(|number| !number.is_finite()) {
            Some(index) => Err(NetworkError::NotFinite { index }),
            None => Ok(Self::from_parameters(&numbers)),
        }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let numbers = self.parameters().into_iter().flat_map(f32::to_le_bytes);
        MAGIC.into_iter().chain(numbers).collect()
    }

    /// From [`PARAMETERS`] numbers in the order of the fields.
    pub fn from_parameters(numbers: &[f32]) -> Self {
        assert_eq!(numbers.len(), PARAMETERS);
        let mut rest = numbers.iter().copied();
        let mut next = || rest.next().expect("counted above");
        Self {
            input: std::array::from_fn(|_| std::array::from_fn(|_| next())),
            bias: std::array::from_fn(|_| next()),
            output: std::array::from_fn(|_| std::array::from_fn(|_| next())),
            output_bias: std::array::from_fn(|_| next()),
        }
    }

    pub fn parameters(&self) -> Vec<f32> {
        let input = self.input.as_flattened().iter().chain(&self.bias);
        let output = self.output.as_flattened().iter().chain(&self.output_bias);
        input.chain(output).copied().collect()
    }

    /// The hidden layer.
    #[inline]
    pub fn hidden(&self, features: &[f32; FEATURES]) -> [f32; HIDDEN] {
        let mut hidden = self.bias;
        for (&feature, weights) in features.iter().zip(&self.input) {
            for (unit, &weight) in hidden.iter_mut().zip(weights) {
                *unit += feature * weight;
            }
        }
        hidden.map(|unit| unit.max(0.0))
    }

    /// The answer for one of [`HORIZONS`], 0 to 1; `also` is added before the
    /// logistic function.
    #[inline]
    pub fn answer(&self, hidden: &[f32; HIDDEN], horizon: usize, also: f32) -> f32 {
        let mut lanes = [0.0; 4];
        for (index, (&unit, &weight)) in hidden.iter().zip(&self.output[horizon]).enumerate() {
            lanes[index % 4] += unit * weight;
        }
        let sum =
            (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]) + (self.output_bias[horizon] + also);
        // Numbers of a file may be large enough for an infinity.
        if sum.is_nan() { 0.5 } else { fast::sigmoid(sum.clamp(-30.0, 30.0)) }
    }
}
