//! What is replayed: a trace, with the sizes of a model's experts.

use crate::{
    exit::Failure,
    model,
    output::{bytes, shape_words},
};
use pregate_predictor::{LayerShape, Shape};
use pregate_runtime::{
    budget::Sizes,
    forward::cache::{KvFormat, cache_bytes},
};
use pregate_traces::{
    Header, Provenance, Row, Sequence, Source, TraceError, check_remembered,
    format::Dropped,
    replay::{
        Warm,
        models::{self, KnownModel},
    },
};
use std::path::{Path, PathBuf};

/// A trace that can be opened again and again.
#[derive(Clone, Debug)]
pub struct Subject {
    pub path: PathBuf,
    /// Its path as reports give it.
    pub name: String,
    /// With the bytes of experts.
    pub header: Header,
    pub tokens: u64,
    pub weights: Weights,
}

/// What a token reads beside routed experts, and who says how large those are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    pub words: String,
    /// `None`: nobody knows, and predictions leave it out.
    pub other_bytes: Option<u64>,
    /// Keys and values of one position.
    pub kv_bytes: u64,
}

impl Subject {
    /// Opens the trace and settles whose experts it is about, and how large
    /// they are; `expert_bytes` has the last word.
    pub fn new(
        path: &Path,
        model: Option<&Model>,
        expert_bytes: Option<u64>,
    ) -> Result<Self, Failure> {
        let mut source = pregate_traces::open(path)?;
        let mut header = source.header().clone();
        check_memory(path, &header)?;
        let weights = match (model, expert_bytes) {
            (None, None) => assumed(path, &mut header, "as the trace says")?,
            (None, Some(bytes)) => {
                set_sizes(&mut header, bytes);
                assumed(path, &mut header, GIVEN)?
            }
            (Some(model), None) => model.apply(path, &mut header)?,
            (Some(model), Some(bytes)) => {
                let mut weights = model.apply(path, &mut header)?;
                set_sizes(&mut header, bytes);
                weights.words = format!("{GIVEN}; other weights: {}", weights.words);
                weights
            }
        };
        Ok(Self {
            path: path.to_path_buf(),
            name: path.display().to_string(),
            tokens: match source.tokens() {
                Some(tokens) => tokens,
                None => counted(source.as_mut())?,
            },
            header,
            weights,
        })
    }

    /// Reads it from the start.
    pub fn open(&self) -> Result<Sized, Failure> {
        Ok(Sized { source: pregate_traces::open(&self.path)?, header: self.header.clone() })
    }

    /// "made up after ... (seed 7)"; `None` for real routing.
    pub fn synthetic(&self) -> Option<String> {
        match &self.header.source {
            Provenance::Synthetic { from, seed } => {
                Some(format!("made up after {from}, seed {seed}"))
            }
            _ => None,
        }
    }

    /// Where it comes from, in words.
    pub fn provenance(&self) -> String {
        match &self.header.source {
            Provenance::Recorded => "recorded here".to_string(),
            Provenance::Imported { format } => format!("imported from {format}"),
            Provenance::Synthetic { .. } => {
                format!("SYNTHETIC: {}", self.synthetic().unwrap_or_default())
            }
        }
    }

    /// "24 MoE layers, top-4 of 32 experts"
    pub fn shape_words(&self) -> String {
        shape_words(&self.header.shape)
    }

    /// Tokens that the engine goes through.
    pub fn passes_over(&self, warm: Warm) -> u64 {
        self.tokens.saturating_mul(if warm == Warm::Whole { 2 } else { 1 })
    }

    /// All routed experts.
    pub fn expert_bytes(&self) -> u64 {
        let of = |layer: &LayerShape| layer.experts as u64 * layer.expert_bytes;
        self.header.shape.moe().map(|(_, layer)| of(layer)).sum()
    }
}

/// Tokens of a trace that does not say: one that was cut off.
fn counted(source: &mut dyn Source) -> Result<u64, TraceError> {
    let (mut row, mut tokens) = (Row::default(), 0);
    while source.next(&mut row)? {
        tokens += 1;
    }
    Ok(tokens)
}

/// What `--model` names.
pub enum Model {
    Known(&'static KnownModel),
    File { path: String, shape: Shape, weights: Weights },
}

impl Model {
    /// A name, else a file or folder.
    pub fn find(text: &str) -> Result<Self, Failure> {
        let path = Path::new(text);
        if !path.exists() {
            return models::by_name(text).map(Self::Known).ok_or_else(|| {
                let known: Vec<&str> = models::names().collect();
                Failure::Usage(format!(
                    "--model {text}: neither a file nor a model that is known by name: {}",
                    known.join(", ")
                ))
            });
        }
        let opened = model::open(path)?;
        let shape = Sizes::of(&opened).shape;
        let weights = Weights {
            words: format!("as {text} has them"),
            other_bytes: Some(model::other_bytes(&opened)),
            kv_bytes: cache_bytes(opened.description(), 1, KvFormat::F16),
        };
        Ok(Self::File { path: text.to_string(), shape, weights })
    }

    /// Gives the header this model's sizes.
    fn apply(&self, path: &Path, header: &mut Header) -> Result<Weights, Failure> {
        let differs = |name: &str, shape: &Shape| {
            Failure::Usage(format!(
                "{}: has {}, and --model {name} has {}: name the model that was traced",
                path.display(),
                shape_words(&header.shape),
                shape_words(shape)
            ))
        };
        match self {
            Model::Known(model) if !model.fits(&header.shape) => {
                Err(differs(model.name, &model.shape()))
            }
            Model::Known(model) => Ok(known(model, header, "")),
            Model::File { path, shape, weights } => {
                let sizes: Vec<LayerShape> = shape.moe().map(|(_, layer)| *layer).collect();
                let same = |(wanted, found): (&LayerShape, &LayerShape)| {
                    (wanted.experts, wanted.top_k) == (found.experts, found.top_k)
                };
                let fits = header.shape.moe().count() == sizes.len()
                    && sizes.iter().zip(header.shape.moe().map(|(_, layer)| layer)).all(same);
                if !fits {
                    return Err(differs(path, shape));
                }
                for (layer, sizes) in header.shape.layers.iter_mut().flatten().zip(sizes) {
                    *layer = sizes;
                }
                Ok(weights.clone())
            }
        }
    }
}

/// Whether what remembers a trace's tokens has room for them.
pub fn check_memory(path: &Path, header: &Header) -> Result<(), Failure> {
    check_remembered(&header.shape)
        .map_err(|problem| Failure::File(format!("{}: {problem}", path.display())))
}

const GIVEN: &str = "as --expert-bytes says";

fn set_sizes(header: &mut Header, bytes: u64) {
    header.shape.layers.iter_mut().flatten().for_each(|layer| layer.expert_bytes = bytes);
}

/// The sizes of a model with a name.
fn known(model: &KnownModel, header: &mut Header, why: &str) -> Weights {
    set_sizes(header, model.expert_bytes());
    Weights {
        words: format!("{} in {}{why}", model.name, model.quantisation),
        other_bytes: Some(model.other_bytes()),
        kv_bytes: model.kv_bytes,
    }
}

/// Without `--model`: what the trace says, else the model that it names. `who`
/// told the sizes that are in the header.
fn assumed(path: &Path, header: &mut Header, who: &str) -> Result<Weights, Failure> {
    let named = models::by_name(&header.model).filter(|model| model.fits(&header.shape));
    let told = header.shape.moe().all(|(_, layer)| layer.expert_bytes > 0);
    match (told, named) {
        (true, Some(model)) => {
            // Of another quantisation, perhaps; better than nothing.
            let share = first_expert(header) as f64 / model.expert_bytes() as f64;
            Ok(Weights {
                words: format!("{who}; other weights as {} has them", model.name),
                other_bytes: Some((model.other_bytes() as f64 * share) as u64),
                kv_bytes: model.kv_bytes,
            })
        }
        (true, None) => Ok(Weights {
            words: format!("{who}; other weights are not counted (--model names them)"),
            other_bytes: None,
            kv_bytes: 0,
        }),
        (false, Some(model)) => Ok(known(model, header, ", assumed: the trace says no sizes")),
        (false, None) => {
            let fits = |name: &&str| models::by_name(name).is_some_and(|m| m.fits(&header.shape));
            let fitting: Vec<&str> = models::names().filter(fits).collect();
            let or =
                if fitting.is_empty() { "" } else { " or the name of a model of this shape: " };
            Err(Failure::Usage(format!(
                "{}: the trace does not say how many bytes an expert has: add --expert-bytes SIZE, \
                 or --model with the model's file{or}{}",
                path.display(),
                fitting.join(", ")
            )))
        }
    }
}

fn first_expert(header: &Header) -> u64 {
    header.shape.moe().next().map_or(0, |(_, layer)| layer.expert_bytes)
}

impl Weights {
    /// "13.2 MB an expert, 1.3 GB of other weights a token (gpt-oss-20b in MXFP4)"
    pub fn line(&self, header: &Header) -> String {
        let other = self.other_bytes.map_or(String::new(), |other| {
            format!(", {} of other weights for a token", bytes(other))
        });
        let sizes = || header.shape.moe().map(|(_, layer)| layer.expert_bytes);
        let [least, most] = [sizes().min(), sizes().max()].map(Option::unwrap_or_default);
        let sizes = match least == most {
            true => bytes(least),
            false => format!("{} to {}", bytes(least), bytes(most)),
        };
        format!("{sizes} an expert{other} ({})", self.words)
    }
}

/// A trace with the bytes of its experts.
pub struct Sized {
    source: Box<dyn Source>,
    header: Header,
}

impl Source for Sized {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        self.source.next(row)
    }

    fn tokens(&self) -> Option<u64> {
        self.source.tokens()
    }

    fn sequences(&self) -> &[Sequence] {
        self.source.sequences()
    }

    fn notice(&self) -> Option<String> {
        self.source.notice()
    }

    fn dropped(&self) -> Dropped {
        self.source.dropped()
    }

    fn may_end_within_pass(&self) -> bool {
        self.source.may_end_within_pass()
    }

    fn verify(&self) -> Result<(), TraceError> {
        self.source.verify()
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.source.rewind()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(model: &str, shape: Shape) -> Header {
        Header { model: model.to_string(), shape, ..Header::default() }
    }

    #[test]
    fn sizes_come_from_whom_they_are_said_to_come() {
        let path = Path::new("t.json");
        let shape = |bytes| Shape::uniform(24, 32, 4, bytes);
        // A name, and a trace without sizes.
        let mut anonymous = header("openai/gpt-oss-20b", shape(0));
        let weights = assumed(path, &mut anonymous, "told").unwrap();
        assert_eq!(
            first_expert(&anonymous),
            models::by_name("gpt-oss-20b").unwrap().expert_bytes()
        );
        assert!(weights.words.contains("MXFP4") && weights.words.contains("assumed"));
        // The trace's own sizes stay.
        let mut told = header("openai/gpt-oss-20b", shape(1000));
        let weights = assumed(path, &mut told, "told").unwrap();
        assert_eq!(first_expert(&told), 1000);
        assert!(weights.other_bytes.unwrap() < 1_000_000);
        let mut unknown = header("mine", shape(1000));
        assert_eq!(assumed(path, &mut unknown, "told").unwrap().other_bytes, None);
        // Nothing is guessed from a name whose model has other layers.
        let mut other = header("openai/gpt-oss-20b", Shape::uniform(25, 32, 4, 0));
        let words = assumed(path, &mut other, "told").unwrap_err().to_string();
        assert!(words.contains("--expert-bytes") && !words.contains("olmoe"), "{words}");
        let mut fits = header("mine", models::by_name("olmoe").unwrap().shape());
        set_sizes(&mut fits, 0);
        let words = assumed(path, &mut fits, "told").unwrap_err().to_string();
        assert!(words.contains("olmoe"), "{words}");
    }

    #[test]
    fn a_model_of_other_layers_is_refused_with_both_shapes() {
        let mut found = header("x", Shape::uniform(24, 32, 4, 0));
        let model = Model::find("qwen3-30b-a3b").unwrap();
        let words = model.apply(Path::new("t.json"), &mut found).unwrap_err().to_string();
        for part in ["t.json", "24 MoE layers, top-4 of 32", "48 MoE layers, top-8 of 128"] {
            assert!(words.contains(part), "{words}");
        }
        let words = Model::find("/nowhere/m.gguf").err().unwrap().to_string();
        assert!(words.contains("deepseek-v2-lite"), "{words}");
        assert!(Model::find("gpt-oss-20b").unwrap().apply(Path::new("t"), &mut found).is_ok());
    }
}
