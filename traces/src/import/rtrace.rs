//! rtrace-1, the format of `shared/traces`: a manifest `NAME.json` and beside
//! it `NAME.ids.u8`, row-major `[token][layer][rank]`, one byte an expert,
//! 255 = not recorded; `NAME.w.f16`, little-endian halves in the same layout;
//! `NAME.tok.u32`, a little-endian token id each. The last two may be absent.

mod fields;
mod manifest;

pub use manifest::Manifest;

use crate::{Header, Provenance, Row, Sequence, Source, TraceError, hex};
use half::f16;
pub(crate) use manifest::MAX_BYTES;
use manifest::Synthetic;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

/// The id that says that nothing was recorded.
pub const NOT_RECORDED: u8 = 255;

/// An rtrace-1 trace, read from front to back through a few small buffers.
#[derive(Debug)]
pub struct Rtrace {
    manifest: Manifest,
    pub(crate) header: Header,
    /// Of each recorded layer, its number in the model, ascending.
    layers: Vec<usize>,
    ids: Column,
    weights: Option<Column>,
    token_ids: Option<Column>,
    /// The next token.
    token: u64,
    /// The next sequence of `manifest.sequences`, and where the one that was
    /// begun last starts and ends.
    sequence: usize,
    begun: (u64, u64),
    /// One layer.
    experts: Vec<u16>,
    layer_weights: Vec<f32>,
}

/// One of the binary files: so many bytes for each token.
#[derive(Debug)]
struct Column {
    path: PathBuf,
    file: BufReader<File>,
    row: Vec<u8>,
}

/// Where the ids, weights and token ids of the manifest `path` are.
pub fn columns(path: &Path) -> [PathBuf; 3] {
    ["ids.u8", "w.f16", "tok.u32"].map(|extension| path.with_extension(extension))
}

/// Opens the manifest and the files beside it.
///
/// # Errors
/// Files that cannot be read, a manifest that is not rtrace-1 or contradicts
/// itself, files whose length is not the manifest's.
pub fn open(path: &Path) -> Result<Rtrace, TraceError> {
    let manifest = Manifest::read(path)?;
    let (shape, layers) = manifest.shape().map_err(|what| TraceError::whole(path, what))?;
    let width = manifest.layers * manifest.top_k;
    let tokens = manifest.tokens;
    let [ids, weights, token_ids] = columns(path);
    let ids = Column::open(ids, tokens, width)?;
    let beside = |path: PathBuf, width: usize| {
        path.exists().then(|| Column::open(path, tokens, width)).transpose()
    };
    let weights = beside(weights, 2 * width)?;
    let token_ids = beside(token_ids, 4)?;
    let source = match manifest.synthetic.clone() {
        Some(Synthetic { from, seed }) => Provenance::Synthetic { from, seed },
        None => Provenance::Imported { format: "rtrace-1".into() },
    };
    let header = Header { model: manifest.model.clone(), fingerprint: None, shape, source };
    let (experts, layer_weights) = (Vec::new(), Vec::new());
    let (token, sequence, begun) = (0, 0, (0, 0));
    #[rustfmt::skip]
    let trace = Rtrace {
        manifest, header, layers, ids, weights, token_ids, token, sequence, begun, experts,
        layer_weights,
    };
    Ok(trace)
}

impl Column {
    fn open(path: PathBuf, tokens: u64, width: usize) -> Result<Self, TraceError> {
        let open = || -> std::io::Result<_> {
            let file = File::open(&path)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(|source| TraceError::io(&path, source))?;
        // Both factors are bounded by the manifest's rules.
        let wanted = u128::from(tokens) * width as u128;
        if u128::from(bytes) != wanted {
            let what = format!("{bytes} bytes; its manifest says {wanted}");
            return Err(TraceError::byte(&path, bytes, what));
        }
        Ok(Self { path, file: BufReader::with_capacity(1 << 16, file), row: vec![0; width] })
    }

    fn next(&mut self) -> Result<(), TraceError> {
        self.file.read_exact(&mut self.row).map_err(|source| TraceError::io(&self.path, source))
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.file.rewind().map_err(|source| TraceError::io(&self.path, source))
    }
}

impl Rtrace {
    /// Compares every file with the SHA-256 in the manifest; files without one
    /// are not looked at.
    fn check_digests(&self) -> Result<(), TraceError> {
        for (name, wanted) in &self.manifest.sha256 {
            let columns = [Some(&self.ids), self.weights.as_ref(), self.token_ids.as_ref()];
            let named = |column: &&Column| column.path.file_name().is_some_and(|n| n == &**name);
            let Some(column) = columns.into_iter().flatten().find(named) else {
                let what = format!("a digest of {name:?}, which is not a file of this trace");
                return Err(TraceError::whole(&self.manifest.path, what));
            };
            let found =
                digest(&column.path).map_err(|source| TraceError::io(&column.path, source))?;
            if found != wanted.to_ascii_lowercase() {
                let what = format!("SHA-256 {found}; its manifest says {wanted}");
                return Err(TraceError::whole(&column.path, what));
            }
        }
        Ok(())
    }

    /// Does a sequence start at the next token? Tokens between two sequences
    /// make one of their own.
    fn enter_sequence(&mut self) -> bool {
        let next = self.manifest.sequences.get(self.sequence);
        if let Some(next) = next.filter(|next| next.start == self.token) {
            self.begun = (self.token, next.start + next.tokens);
            self.sequence += 1;
            true
        } else if self.token >= self.begun.1 {
            self.begun = (self.token, next.map_or(u64::MAX, |next| next.start));
            true
        } else {
            false
        }
    }

    /// Reads the layer whose ids begin at `start` of a row.
    fn read_layer(&mut self, start: usize) -> Result<(), String> {
        self.experts.clear();
        self.layer_weights.clear();
        for at in start..start + self.manifest.top_k {
            let id = self.ids.row[at];
            if id == NOT_RECORDED {
                continue;
            }
            if usize::from(id) >= self.manifest.experts {
                return Err(format!("expert {id} of {}", self.manifest.experts));
            }
            if self.experts.contains(&u16::from(id)) {
                return Err(format!("expert {id} twice in one layer"));
            }
            self.experts.push(u16::from(id));
            if let Some(weights) = &self.weights {
                let bytes = [weights.row[2 * at], weights.row[2 * at + 1]];
                let weight = f16::from_le_bytes(bytes).to_f32();
                if !weight.is_finite() {
                    return Err(format!("expert {id} has the weight {weight}"));
                }
                self.layer_weights.push(weight);
            }
        }
        Ok(())
    }
}

/// In hexadecimal.
fn digest(path: &Path) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

impl Source for Rtrace {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        if self.token == self.manifest.tokens {
            return Ok(false);
        }
        self.ids.next()?;
        self.weights.as_mut().map_or(Ok(()), Column::next)?;
        self.token_ids.as_mut().map_or(Ok(()), Column::next)?;
        row.starts_sequence = self.enter_sequence();
        row.pass_tokens = 1;
        row.position = u32::try_from(self.token - self.begun.0).map_err(|_| {
            let offset = self.token * self.ids.row.len() as u64;
            TraceError::byte(&self.ids.path, offset, "a sequence of more than 2^32 tokens")
        })?;
        row.token = self
            .token_ids
            .as_ref()
            .and_then(|column| Some(u32::from_le_bytes(column.row.first_chunk().copied()?)));
        for index in 0..self.layers.len() {
            // Dense layers have no experts.
            while row.layers() < self.layers[index] {
                row.push_layer(&[], &[]);
            }
            let start = index * self.manifest.top_k;
            self.read_layer(start).map_err(|what| {
                let offset = self.token * self.ids.row.len() as u64 + start as u64;
                let what = format!("token {}, layer {}: {what}", self.token, self.layers[index]);
                TraceError::byte(&self.ids.path, offset, what)
            })?;
            row.push_layer(&self.experts, &self.layer_weights);
        }
        self.token += 1;
        Ok(true)
    }

    fn tokens(&self) -> Option<u64> {
        Some(self.manifest.tokens)
    }

    fn sequences(&self) -> &[Sequence] {
        &self.manifest.sequences
    }

    fn verify(&self) -> Result<(), TraceError> {
        self.check_digests()
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        (self.token, self.sequence, self.begun) = (0, 0, (0, 0));
        self.ids.rewind()?;
        self.weights.as_mut().map_or(Ok(()), Column::rewind)?;
        self.token_ids.as_mut().map_or(Ok(()), Column::rewind)
    }
}
