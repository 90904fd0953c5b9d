//! Tables of choices: one line for each expert of a token and layer, or one
//! with a list of them.
//!
//! Columns are found by name, in any order and spelling of [`NAMES`]; a layer
//! and an expert are enough. They are separated by tabs where the first line
//! has one, else by commas; a list that has any of them stands in quotes
//! (RFC 4180), as Python's `csv` and pandas write it. Lines that start with `#` are comments, from
//! which `n_expert=128` and the like are read; `# synthetic_from=` says that
//! nobody recorded it. What such files look like:
//! - BigMoeOnEdge `--route-trace` (github.com/Helldez/BigMoeOnEdge, pull
//!   request 21): `turn,phase,step,layer,slot,expert,weight,residency,...`; a
//!   prompt layer by layer.
//! - llama.cpp `moe-trace` (github.com/ggml-org/llama.cpp, pull request
//!   28544): `layer,expert`; the order alone tells tokens apart, so
//!   [`super::Hints::top_k`] is needed.
//! - moe-cache-eval, `shared/traces/conformance_toy`:
//!   `event_index,scheduler_step,layer,requested_experts,...`.

mod cells;

use super::Hints;
use super::passes::{Choice, Pass};
use crate::limits::{self, MAX_EXPERTS, MAX_LAYERS};
use crate::open::check_file;
use crate::{Header, Provenance, Row, Source, TraceError};
use cells::{Cells, parts};
use pregate_predictor::{LayerShape, Shape};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

/// Of a line; lists of all experts are shorter.
const MAX_LINE: u64 = 1 << 20;
const MAX_LAYER: u64 = MAX_LAYERS as u64 - 1;
/// Of a line that names no token, the place among its token's.
const MAX_RANK: u64 = 1 << 20;
/// Prompt tokens that a file tells one after the other are taken together, as
/// the runtime takes a prompt.
const CHUNK: usize = 512;
/// Choices of such a chunk at most, so that odd rows do not take memory.
const CHUNK_CHOICES: usize = 1 << 20;

/// What a column may be called, in lower case and without anything but
/// letters and digits.
const NAMES: [(Field, &[&str]); 8] = [
    (Field::Sequence, &["sequence", "seq", "seqid", "turn", "request", "requestid", "promptid"]),
    (
        Field::Token,
        &[
            "token",
            "tokenidx",
            "tokenindex",
            "step",
            "pos",
            "position",
            "tokenpos",
            "schedulerstep",
            "t",
        ],
    ),
    (Field::TokenId, &["tokenid", "tokid"]),
    (Field::Phase, &["phase", "stage"]),
    (Field::Layer, &["layer", "layerid", "layeridx", "layerindex", "il", "l"]),
    (Field::Rank, &["rank", "slot", "k", "topkidx", "kidx"]),
    (
        Field::Expert,
        &[
            "expert",
            "expertid",
            "expertidx",
            "experts",
            "expertids",
            "requestedexperts",
            "topkids",
            "e",
        ],
    ),
    (Field::Weight, &["weight", "weights", "gate", "gateweight", "prob", "score", "w"]),
];

const SYNTHETIC_FROM: &str = "synthetic_from";
const SYNTHETIC_SEED: &str = "synthetic_seed";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Sequence,
    Token,
    TokenId,
    Phase,
    Layer,
    Rank,
    Expert,
    Weight,
}

/// A table, read twice: once for its shape, then row by row.
pub struct Table {
    path: PathBuf,
    file: BufReader<File>,
    header: Header,
    columns: Vec<Option<Field>>,
    separator: char,
    /// Where the lines behind the header begin, and their number.
    start: (u64, u64),
    top_k: usize,
    has_one_layer: bool,
    line: String,
    bytes: Vec<u8>,
    number: u64,
    /// Of the line that was read and belongs to the next pass.
    ahead: Vec<Choice>,
    ahead_of: Facts,
    /// Read, and not among the rows yet; empty if there is none.
    pass: Pass,
    pass_of: Facts,
    /// Rows of a pass or a chunk, so many of them, and those given out.
    rows: Vec<Row>,
    tokens: (usize, usize),
    position: u32,
    sequence: Option<String>,
    lengths: Lengths,
}

/// What tells that a table was cut off between two lines.
#[derive(Clone, Copy, Default)]
struct Lengths {
    /// Experts of the token read last, and the fewest of those before.
    last: Option<usize>,
    fewest: Option<usize>,
    is_over: bool,
}

impl Lengths {
    fn add(&mut self, row: &Row) {
        let experts = (0..row.layers()).map(|layer| row.experts(layer).len()).sum();
        self.fewest = self.fewest.into_iter().chain(self.last.replace(experts)).min();
    }
}

/// What a line says beside its choices.
#[derive(Clone, Default)]
struct Facts {
    sequence: String,
    is_prompt: bool,
}

/// # Errors
/// A file that cannot be read, has no such columns, or a line of which a
/// number is none.
pub fn open(path: &Path, hints: &Hints) -> Result<Table, TraceError> {
    check_file(path)?;
    let file = File::open(path).map_err(|source| TraceError::io(path, source))?;
    let mut table = Table {
        path: path.to_path_buf(),
        file: BufReader::with_capacity(1 << 16, file),
        header: Header::default(),
        columns: Vec::new(),
        separator: ',',
        start: (0, 0),
        top_k: 1,
        has_one_layer: false,
        line: String::new(),
        bytes: Vec::new(),
        number: 0,
        ahead: Vec::new(),
        ahead_of: Facts::default(),
        pass: Pass::default(),
        pass_of: Facts::default(),
        rows: Vec::new(),
        tokens: (0, 0),
        position: 0,
        sequence: None,
        lengths: Lengths::default(),
    };
    let mut said = BTreeMap::new();
    table.read_header(&mut said)?;
    table.scan(hints, &said)?;
    table.rewind()?;
    Ok(table)
}

impl Table {
    fn wrong(&self, what: impl Into<String>) -> TraceError {
        match self.number {
            0 => TraceError::whole(&self.path, what),
            number => TraceError::line(&self.path, number, what),
        }
    }

    /// The next line that is no comment; `false` at the end.
    fn next_line(&mut self, said: &mut BTreeMap<String, String>) -> Result<bool, TraceError> {
        loop {
            self.bytes.clear();
            let read = self.file.by_ref().take(MAX_LINE).read_until(b'\n', &mut self.bytes);
            let read = read.map_err(|source| TraceError::io(&self.path, source))?;
            if read == 0 {
                return Ok(false);
            }
            self.number += 1;
            if read as u64 == MAX_LINE && self.bytes.last() != Some(&b'\n') {
                return Err(self.wrong("a line of more than 1 MiB"));
            }
            self.line.clear();
            match std::str::from_utf8(&self.bytes) {
                Ok(text) => self.line.push_str(text),
                Err(error) => {
                    let at = error.valid_up_to();
                    return Err(self.wrong(format!("byte {at} of the line is not UTF-8")));
                }
            }
            let text = self.line.trim();
            if let Some(comment) = text.strip_prefix('#') {
                if let Some((key, value)) = from_of(comment) {
                    said.insert(key, value);
                    continue;
                }
                let pairs = comment.split_whitespace().filter_map(|word| word.split_once('='));
                // A hundred facts are more than any file has.
                for (key, value) in pairs.take(100usize.saturating_sub(said.len())) {
                    said.entry(key.to_string()).or_insert_with(|| value.to_string());
                }
            } else if !text.is_empty() {
                return Ok(true);
            }
        }
    }

    fn read_header(&mut self, said: &mut BTreeMap<String, String>) -> Result<(), TraceError> {
        if !self.next_line(said)? {
            return Err(self.wrong("no line with the names of columns"));
        }
        let field = |name: &str| {
            let plain: String =
                name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
            NAMES.iter().find(|(_, names)| names.contains(&&*plain)).map(|(field, _)| *field)
        };
        self.separator = if self.line.contains('\t') { '\t' } else { ',' };
        let names: Result<Vec<_>, String> = Cells::of(&self.line, self.separator).collect();
        let names = names.map_err(|what| self.wrong(what))?;
        self.columns = names.into_iter().map(field).collect();
        for wanted in [Field::Layer, Field::Expert] {
            if !self.columns.contains(&Some(wanted)) {
                return Err(self.wrong(format!(
                    "no column of the {wanted:?} in {:?}; names are separated by commas or tabs",
                    self.line.trim()
                )));
            }
        }
        let at = self.file.stream_position();
        self.start = (at.map_err(|source| TraceError::io(&self.path, source))?, self.number);
        Ok(())
    }

    /// Finds the shape.
    fn scan(&mut self, hints: &Hints, said: &BTreeMap<String, String>) -> Result<(), TraceError> {
        let number =
            |names: [&str; 2]| names.iter().find_map(|name| said.get(*name)?.parse::<usize>().ok());
        // Of each layer, the largest expert, and the most of one token in a
        // row of lines.
        let mut layers: BTreeMap<u32, usize> = BTreeMap::new();
        let (mut top_k, mut run) = (0, 0);
        let mut last = None;
        while self.read_choices()? {
            for choice in &self.ahead {
                let largest = layers.entry(choice.layer).or_default();
                *largest = (*largest).max(choice.expert.into());
                let key = choice.token.map(|token| (token, choice.layer));
                run = if last == Some(key) { run + 1 } else { 1 };
                last = Some(key);
                if key.is_some() {
                    top_k = top_k.max(run);
                }
            }
        }
        let Some((&deepest, _)) = layers.last_key_value() else {
            return Err(self.wrong("no lines"));
        };
        let largest = layers.values().max().map_or(1, |largest| largest + 1);
        let experts = hints.experts.or(number(["n_expert", "experts"])).unwrap_or(largest);
        let top_k = hints.top_k.or(number(["n_expert_used", "top_k"])).unwrap_or(top_k);
        if experts < largest || top_k == 0 || top_k > experts {
            return Err(self.wrong(format!(
                "{experts} experts, top-{top_k}, and expert {} was chosen; --experts and --top-k \
                 of pregate trace import say what a file does not",
                largest - 1
            )));
        }
        let count = hints.layers.or(number(["n_layer", "layers"])).unwrap_or(deepest as usize + 1);
        if count <= deepest as usize || count > MAX_LAYERS {
            return Err(self.wrong(format!(
                "{count} layers, and layer {deepest} chose experts; --layers of pregate trace \
                 import says how many the model has, {MAX_LAYERS} at most"
            )));
        }
        let layer = LayerShape { experts, top_k, expert_bytes: 0, class: 0 };
        let mut shape = Shape { layers: vec![None; count] };
        layers.keys().for_each(|&index| shape.layers[index as usize] = Some(layer));
        let model = hints.model.clone().unwrap_or_default();
        limits::check(&shape).map_err(|what| self.wrong(what))?;
        let source = match said.get(SYNTHETIC_FROM) {
            Some(from) => {
                let seed = said.get(SYNTHETIC_SEED).and_then(|seed| seed.parse().ok());
                Provenance::Synthetic { from: from.clone(), seed: seed.unwrap_or(0) }
            }
            None => Provenance::Imported { format: "csv".into() },
        };
        self.header = Header { model, fingerprint: None, shape, source };
        (self.top_k, self.has_one_layer) = (top_k, layers.len() == 1);
        Ok(())
    }

    /// Reads a line to `ahead`; `false` at the end.
    fn read_choices(&mut self) -> Result<bool, TraceError> {
        self.ahead.clear();
        if !self.next_line(&mut BTreeMap::new())? {
            return Ok(false);
        }
        let line = std::mem::take(&mut self.line);
        let read = self.parse(&line);
        self.line = line;
        read.map_err(|what| self.wrong(what)).map(|()| true)
    }

    fn parse(&mut self, line: &str) -> Result<(), String> {
        let mut facts = Facts::default();
        let (mut token, mut token_id, mut layer, mut rank) = (None, None, None, None);
        let (mut experts, mut weights) = ("", "");
        let mut columns = self.columns.iter();
        for cell in Cells::of(line, self.separator) {
            let cell = cell?;
            let Some(column) = columns.next() else {
                // Some writers end every line with a separator.
                if cell.is_empty() {
                    continue;
                }
                let count = self.columns.len();
                return Err(format!(
                    "{cell:?} is behind the last of {count} columns; a list in one cell stands in \
                     quotes"
                ));
            };
            match column {
                Some(Field::Sequence) => facts.sequence = cell.to_string(),
                Some(Field::Token) => token = Some(number(cell, "token", u64::MAX)?),
                // A token without an id has nothing there, or -1.
                Some(Field::TokenId) if matches!(cell, "" | "-1") => {}
                Some(Field::TokenId) => {
                    token_id = Some(number(cell, "token id", u32::MAX.into())? as u32)
                }
                Some(Field::Phase) => {
                    let phase = cell.to_lowercase();
                    facts.is_prompt = phase.starts_with("pre") || phase.starts_with("prompt");
                }
                Some(Field::Layer) => layer = Some(number(cell, "layer", MAX_LAYER)? as u32),
                Some(Field::Rank) => rank = Some(number(cell, "rank", MAX_RANK)?),
                Some(Field::Expert) => experts = cell,
                Some(Field::Weight) => weights = cell,
                None => {}
            }
        }
        let layer = layer.ok_or("no layer")?;
        let rank = rank.unwrap_or(0);
        let mut weights = parts(weights);
        for (index, expert) in parts(experts).enumerate() {
            let weight = match weights.next() {
                Some(text) => {
                    let weight: Option<f32> = text.parse().ok();
                    let wrong = || format!("the weight {text:?}; a finite number is needed");
                    Some(weight.filter(|weight| weight.is_finite()).ok_or_else(wrong)?)
                }
                None => None,
            };
            let expert = number(expert, "expert", MAX_EXPERTS as u64 - 1)? as u16;
            let rank = rank + index as u64;
            self.ahead.push(Choice { token, layer, rank, expert, weight, token_id });
        }
        if weights.next().is_some() {
            return Err(format!("more weights than the {} experts", self.ahead.len()));
        }
        if self.ahead.is_empty() {
            return Err("no expert".into());
        }
        self.ahead_of = facts;
        Ok(())
    }

    /// Gathers the next pass; `false` at the end.
    fn next_pass(&mut self) -> Result<bool, TraceError> {
        self.pass.clear();
        loop {
            if self.ahead.is_empty() && !self.read_choices()? {
                break;
            }
            let starts = self.ahead_of.sequence != self.pass_of.sequence;
            let ends = self.pass.ends_before(&self.ahead[0], self.has_one_layer) || starts;
            if !self.pass.is_empty() && ends {
                break;
            }
            if self.pass.is_empty() {
                self.pass_of = self.ahead_of.clone();
            }
            for choice in self.ahead.drain(..) {
                self.pass
                    .push(choice)
                    .map_err(|what| TraceError::line(&self.path, self.number, what))?;
            }
        }
        Ok(!self.pass.is_empty())
    }

    /// Makes the next rows: those of a pass, or of prompt tokens that come one
    /// by one; `false` at the end.
    fn next_rows(&mut self) -> Result<bool, TraceError> {
        self.tokens = (0, 0);
        let mut choices = 0;
        while !self.pass.is_empty() || self.next_pass()? {
            let count = self.pass.tokens(self.top_k);
            let is_single = count == 1 && self.pass_of.is_prompt;
            let is_new = self.sequence.as_ref() != Some(&self.pass_of.sequence);
            choices += self.pass.len();
            let has_room = self.tokens.0 < CHUNK && choices <= CHUNK_CHOICES;
            if self.tokens.0 > 0 && !(is_single && !is_new && has_room) {
                break;
            }
            if is_new {
                (self.sequence, self.position) = (Some(self.pass_of.sequence.clone()), 0);
            }
            for token in 0..count {
                self.push_row((token, count), is_new && token == 0)?;
            }
            self.pass.clear();
            if !is_single {
                break;
            }
        }
        let rows = self.tokens.0;
        if let Some(first) = self.rows.first_mut().filter(|_| rows > 0) {
            first.pass_tokens = rows as u32;
        }
        Ok(rows > 0)
    }

    fn push_row(
        &mut self,
        (token, count): (usize, usize),
        starts_sequence: bool,
    ) -> Result<(), TraceError> {
        if self.rows.len() == self.tokens.0 {
            self.rows.push(Row::default());
        }
        let row = &mut self.rows[self.tokens.0];
        row.clear();
        row.starts_sequence = starts_sequence;
        row.is_prompt = self.pass_of.is_prompt || count > 1;
        row.position = self.position;
        let filled = self.pass.fill(token, self.header.shape.layers.len(), row);
        filled.map_err(|what| self.wrong(what))?;
        self.position = self.position.saturating_add(1);
        self.tokens.0 += 1;
        Ok(())
    }
}

fn number(text: &str, column: &str, most: u64) -> Result<u64, String> {
    let wrong = || format!("the {column} {text:?}; a number to {most} is needed");
    text.parse().ok().filter(|&number| number <= most).ok_or_else(wrong)
}

/// `synthetic_from=` and the rest of the line, as JSON text or as it is.
fn from_of(comment: &str) -> Option<(String, String)> {
    let (key, value) = comment.trim().split_once('=').filter(|(key, _)| *key == SYNTHETIC_FROM)?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.to_string());
    Some((key.to_string(), value))
}

impl Source for Table {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        let (count, given) = self.tokens;
        if given == count && !self.next_rows()? {
            self.lengths.is_over = true;
            return Ok(false);
        }
        std::mem::swap(row, &mut self.rows[self.tokens.1]);
        self.tokens.1 += 1;
        self.lengths.add(row);
        Ok(true)
    }

    fn notice(&self) -> Option<String> {
        let Lengths { last, fewest, is_over } = self.lengths;
        let (last, fewest) = last.zip(fewest).filter(|(last, fewest)| is_over && last < fewest)?;
        Some(format!(
            "the last token has {last} experts in all layers, and all others have {fewest} or \
             more: the table seems to be cut off"
        ))
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        let seek = self.file.seek(std::io::SeekFrom::Start(self.start.0));
        seek.map_err(|source| TraceError::io(&self.path, source))?;
        self.number = self.start.1;
        self.ahead.clear();
        self.pass.clear();
        (self.tokens, self.position, self.sequence) = ((0, 0), 0, None);
        self.lengths = Lengths::default();
        Ok(())
    }
}
