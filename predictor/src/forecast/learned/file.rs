//! Trained forecasts as bytes: versioned, checksummed, bound to a model.
//!
//! Little-endian. Magic, version (u32), CRC-32 of all that follows (u32);
//! fingerprint (a byte that says whether there is one, 32 bytes), the model's
//! name (u16 length, UTF-8), layers (u32) with experts and top-k (u16 each, 0:
//! dense), the sizes (7 x u32), the length of the tables for eviction (u32, 0:
//! none), then arrays whose lengths follow from the sizes, then those tables
//! ([`Fitted::to_bytes`], with the same fingerprint).

use super::matrix::Matrix;
use super::sizes::Dimensions;
use crate::policy::learned::Fitted;
use crate::{LayerShape, Shape};

const MAGIC: [u8; 8] = *b"pgpredct";
/// Of the format, of what the inputs mean, and of the universal network that
/// the tables for eviction stand beside.
pub const VERSION: u32 = 2;
/// A file is never larger.
pub const LIMIT_BYTES: usize = 8 << 20;
const HEAD: usize = 16;

/// Which model's routing was learned.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Binding {
    /// As the traces said; empty if they did not.
    pub model: String,
    /// See `traces::Header`; `None`: bound to the shape alone.
    pub fingerprint: Option<[u8; 32]>,
}

/// What was learned, all kinds of forecasts together.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Trained {
    pub binding: Binding,
    /// Experts and top-k; no bytes, one class.
    pub shape: Shape,
    pub dimensions: Dimensions,
    /// `[ids]`, ascending.
    pub ids: Vec<u32>,
    /// `[ids][layers * experts]`: log-odds beyond the layer's own.
    pub odds: Matrix,
    /// `[layers][experts]`: log-odds without evidence.
    pub priors: Matrix,
    /// `[layers * (reach + 1) * experts][experts]`, see [`Trained::pair_row`].
    pub pairs: Matrix,
    /// Per layer, see [`super::network::Sizes`].
    pub networks: Vec<[Matrix; 5]>,
    /// `[ids][width]`: embeddings of the token-only forecast.
    pub embeddings: Matrix,
    /// `[places * width + 1][hidden]`, the last row is the bias.
    pub path_in: Matrix,
    /// `[layers * (hidden + 2)][experts]`: per layer the units' rows, the
    /// trust in the id's odds, and the bias.
    pub path_out: Matrix,
    /// What this model's experts say of each other's next use, for eviction.
    pub value: Option<Fitted>,
}

/// Why bytes are not a file of trained forecasts, or not this model's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileError(String);

impl std::fmt::Display for FileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FileError {}

fn refuse<T>(message: impl Into<String>) -> Result<T, FileError> {
    Err(FileError(message.into()))
}

impl Trained {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.push(u8::from(self.binding.fingerprint.is_some()));
        body.extend_from_slice(&self.binding.fingerprint.unwrap_or_default());
        let mut name = self.binding.model.as_str();
        while name.len() > usize::from(u16::MAX) {
            name = &name[..name.floor_char_boundary(usize::from(u16::MAX))];
        }
        body.extend_from_slice(&(name.len() as u16).to_le_bytes());
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&(self.shape.layers.len() as u32).to_le_bytes());
        for layer in &self.shape.layers {
            for number in [layer.map_or(0, |l| l.experts), layer.map_or(0, |l| l.top_k)] {
                body.extend_from_slice(&(number as u16).to_le_bytes());
            }
        }
        for number in self.dimensions.numbers() {
            body.extend_from_slice(&(number as u32).to_le_bytes());
        }
        let value = self.value.as_ref().map(Fitted::to_bytes).unwrap_or_default();
        body.extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.ids.iter().for_each(|id| body.extend_from_slice(&id.to_le_bytes()));
        self.matrices().for_each(|matrix| matrix.write(&mut body));
        body.extend(value);
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let first = [&self.odds, &self.priors, &self.pairs].into_iter();
        let last = [&self.embeddings, &self.path_in, &self.path_out];
        first.chain(self.networks.iter().flatten()).chain(last)
    }

    /// # Errors
    /// Bytes that are no such file, of another version, damaged, or that break
    /// the format.
    pub fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        if bytes.len() < HEAD || bytes[..8] != MAGIC {
            return refuse("not a file of trained forecasts: it does not begin with \"pgpredct\"");
        }
        if bytes.len() > LIMIT_BYTES {
            return refuse(format!("{} bytes; at most {LIMIT_BYTES} are allowed", bytes.len()));
        }
        let mut reader = Reader { bytes: &bytes[8..], at: 8 };
        let (version, sum) = (reader.u32("version")?, reader.u32("checksum")?);
        if version != VERSION {
            return refuse(format!("version {version}; this program reads {VERSION}: train again"));
        }
        if crc32fast::hash(reader.bytes) != sum {
            return refuse("its checksum is wrong: the file is damaged");
        }
        let has_fingerprint = reader.u8("fingerprint")? != 0;
        let fingerprint = reader.take(32, "fingerprint")?.try_into().expect("32 bytes");
        let length = reader.u16("name")?;
        let model = std::str::from_utf8(reader.take(length, "name")?);
        let Ok(model) = model else { return refuse("the model's name is not UTF-8") };
        let binding = Binding {
            model: model.to_string(),
            fingerprint: has_fingerprint.then_some(fingerprint),
        };
        let shape = reader.shape()?;
        let mut numbers = [0; Dimensions::NUMBERS];
        for number in &mut numbers {
            *number = reader.u32("sizes")? as usize;
        }
        let at = reader.at;
        let value_bytes = reader.u32("length of the tables for eviction")? as usize;
        let dimensions = Dimensions::new(&shape, numbers);
        let arrays = dimensions.bytes().filter(|_| dimensions.is_valid());
        let Some(wanted) = arrays.and_then(|bytes| bytes.checked_add(value_bytes)) else {
            return refuse(format!("sizes {numbers:?} before byte {at} make no sense"));
        };
        if wanted != reader.bytes.len() {
            let found = reader.bytes.len();
            return refuse(format!(
                "{found} bytes of weights; sizes {numbers:?} and {value_bytes} bytes of tables for \
                 eviction ask for {wanted}"
            ));
        }
        let mut trained = reader.weights(binding, shape, dimensions)?;
        if !reader.bytes.is_empty() {
            trained.value = Some(reader.value(&trained)?);
        }
        Ok(trained)
    }

    /// Was this learned from a model with this shape and, where both sides say
    /// so, this fingerprint?
    ///
    /// # Errors
    /// Says what differs.
    pub fn check(&self, shape: &Shape, fingerprint: Option<&[u8; 32]>) -> Result<(), FileError> {
        let of = |shape: &Shape| -> Vec<_> {
            shape.layers.iter().map(|l| l.as_ref().map(|l| (l.experts, l.top_k))).collect()
        };
        let name = match self.binding.model.as_str() {
            "" => "another model",
            name => name,
        };
        if of(&self.shape) != of(shape) {
            return refuse(format!(
                "it was trained for {name} ({}), this model is {}: train again with a trace of this model",
                words(&self.shape),
                words(shape)
            ));
        }
        match (&self.binding.fingerprint, fingerprint) {
            (Some(trained), Some(here)) if trained != here => refuse(format!(
                "it was trained for {name} with fingerprint {}, this model's is {}: train again \
                 with a trace of this model",
                short(trained),
                short(here)
            )),
            _ => Ok(()),
        }
    }
}

fn short(fingerprint: &[u8; 32]) -> String {
    fingerprint[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn words(shape: &Shape) -> String {
    let layers = shape.moe().count();
    let most = shape.moe().map(|(_, layer)| (layer.experts, layer.top_k)).max().unwrap_or((0, 0));
    format!("{layers} MoE layers of {}, top-{} of {} experts", shape.layers.len(), most.1, most.0)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, field: &str) -> Result<&'a [u8], FileError> {
        let Some((taken, rest)) = self.bytes.split_at_checked(count) else {
            let left = self.bytes.len();
            return refuse(format!(
                "{field} at byte {}: {count} bytes wanted, {left} left",
                self.at
            ));
        };
        self.bytes = rest;
        self.at += count;
        Ok(taken)
    }

    fn u8(&mut self, field: &str) -> Result<u8, FileError> {
        Ok(self.take(1, field)?[0])
    }

    fn u16(&mut self, field: &str) -> Result<usize, FileError> {
        let bytes = self.take(2, field)?.try_into().expect("two bytes");
        Ok(usize::from(u16::from_le_bytes(bytes)))
    }

    fn u32(&mut self, field: &str) -> Result<u32, FileError> {
        Ok(u32::from_le_bytes(self.take(4, field)?.try_into().expect("four bytes")))
    }

    fn shape(&mut self) -> Result<Shape, FileError> {
        let layers = self.u32("layers")? as usize;
        if layers.saturating_mul(4) > self.bytes.len() {
            return refuse(format!("{layers} layers do not fit the file"));
        }
        let mut shape = Shape::default();
        for layer in 0..layers {
            let (experts, top_k) = (self.u16("experts")?, self.u16("top-k")?);
            if top_k > experts || (top_k == 0) != (experts == 0) {
                return refuse(format!("layer {layer}: top-{top_k} of {experts} experts"));
            }
            let moe = LayerShape { experts, top_k, expert_bytes: 0, class: 0 };
            shape.layers.push((experts > 0).then_some(moe));
        }
        Ok(shape)
    }

    fn matrix(&mut self, (rows, columns): (usize, usize)) -> Result<Matrix, FileError> {
        let at = self.at;
        let numbers = self.take(4 * rows, "scales")?.chunks_exact(4);
        let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let scales: Vec<f32> = numbers.map(number).collect();
        if let Some(row) = scales.iter().position(|scale| !(0.0..=1e4).contains(scale)) {
            return refuse(format!(
                "scale {} of row {row} of the matrix at byte {at}",
                scales[row]
            ));
        }
        let values = self.take(rows * columns, "values")?;
        Ok(Matrix { columns, scales, values: values.iter().map(|&b| b as i8).collect() })
    }

    /// All that is left.
    fn value(&self, trained: &Trained) -> Result<Fitted, FileError> {
        let fingerprint = trained.binding.fingerprint;
        let wrong = |why: &dyn std::fmt::Display| {
            FileError(format!("tables for eviction at byte {}: {why}", self.at))
        };
        let value = Fitted::from_bytes(self.bytes, &trained.shape, fingerprint);
        let value = value.map_err(|error| wrong(&error))?;
        if value.fingerprint() != fingerprint {
            return Err(wrong(&"they are bound to another fingerprint than the file"));
        }
        Ok(value)
    }

    fn weights(
        &mut self,
        binding: Binding,
        shape: Shape,
        dimensions: Dimensions,
    ) -> Result<Trained, FileError> {
        let ids = self.take(4 * dimensions.ids, "ids")?.chunks_exact(4);
        let id = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let ids: Vec<u32> = ids.map(id).collect();
        if !ids.is_sorted_by(|a, b| a < b) {
            return refuse("token ids do not ascend");
        }
        let [odds, priors, pairs] = dimensions.tables();
        let (odds, priors, pairs) = (self.matrix(odds)?, self.matrix(priors)?, self.matrix(pairs)?);
        let mut networks = Vec::with_capacity(dimensions.networks());
        for _ in 0..dimensions.networks() {
            let mut parts: [Matrix; 5] = Default::default();
            for (part, size) in parts.iter_mut().zip(dimensions.network().matrices()) {
                *part = self.matrix(size)?;
            }
            networks.push(parts);
        }
        let [embeddings, path_in, path_out] = dimensions.path();
        Ok(Trained {
            binding,
            shape,
            dimensions,
            ids,
            odds,
            priors,
            pairs,
            networks,
            embeddings: self.matrix(embeddings)?,
            path_in: self.matrix(path_in)?,
            path_out: self.matrix(path_out)?,
            value: None,
        })
    }
}
