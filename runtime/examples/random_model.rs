//! Writes a GGUF file with the shapes of a real model and random weights, for
//! measurements on machines without a network.
//!
//! `random_model PRESET OUT [--format NAME] [--layers N] [--embedding DEVIATION]`
//!
//! Weights have mean 0 and a deviation of 0.03, embeddings that of `--embedding`
//! (they are F32 then): small ones are lost in what attention and experts add,
//! so that neighbours are routed alike; large ones give each token a routing of
//! its own. Weights are cut from one pool of
//! blocks per format at random places, so every expert has bytes of its own
//! and the disk is what takes the time. There is no tokenizer, and the file
//! says so: `pregate bench`, `pregate plan` and `llama-bench` need none.

use pregate_kernels::{
    Format,
    testing::{Random, Weights, weights},
};
use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Shapes of a published model.
#[derive(Clone, Copy, Debug)]
struct Preset {
    name: &'static str,
    /// As GGUF calls it.
    architecture: &'static str,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    experts: usize,
    top_k: usize,
    inner: usize,
    vocab: usize,
    context: usize,
    rope_base: f32,
    /// Elements of the q and k norms: none, a head or the whole row.
    norms: Norms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Norms {
    None,
    Head,
    Row,
}

const PRESETS: [Preset; 4] = [
    // To try scripts with.
    Preset {
        name: "tiny",
        architecture: "qwen3moe",
        layers: 2,
        hidden: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        experts: 8,
        top_k: 2,
        inner: 256,
        vocab: 512,
        context: 4096,
        rope_base: 1e6,
        norms: Norms::Head,
    },
    Preset {
        name: "olmoe",
        architecture: "olmoe",
        layers: 16,
        hidden: 2048,
        heads: 16,
        kv_heads: 16,
        head_dim: 128,
        experts: 64,
        top_k: 8,
        inner: 1024,
        vocab: 50304,
        context: 4096,
        rope_base: 1e4,
        norms: Norms::Row,
    },
    Preset {
        name: "qwen3-30b-a3b",
        architecture: "qwen3moe",
        layers: 48,
        hidden: 2048,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        experts: 128,
        top_k: 8,
        inner: 768,
        vocab: 151_936,
        context: 40960,
        rope_base: 1e6,
        norms: Norms::Head,
    },
    Preset {
        name: "mixtral-8x7b",
        architecture: "llama",
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        experts: 8,
        top_k: 2,
        inner: 14336,
        vocab: 32000,
        context: 32768,
        rope_base: 1e6,
        norms: Norms::None,
    },
];

const EMBEDDING: &str = "token_embd.weight";
/// Where tensors begin.
const ALIGNMENT: usize = 32;
/// Of one format; tensors are cut from it.
const POOL_BYTES: usize = 16 << 20;

struct Tensor {
    name: String,
    format: Format,
    /// Outermost first.
    shape: Vec<usize>,
}

impl Tensor {
    fn new(name: impl Into<String>, format: Format, shape: &[usize]) -> Self {
        Self { name: name.into(), format, shape: shape.to_vec() }
    }

    fn bytes(&self) -> Result<usize, String> {
        let (cols, rows) = self.shape.split_last().ok_or("a tensor without shape")?;
        let row = self.format.row_bytes(*cols);
        let bytes = row.and_then(|row| rows.iter().try_fold(row, |all, n| all.checked_mul(*n)));
        bytes.ok_or_else(|| format!("{}: rows of {cols} do not fit {}", self.name, self.format))
    }

    /// Norms are ones, everything else is random.
    fn is_norm(&self) -> bool {
        self.name.ends_with("norm.weight")
    }
}

impl Preset {
    /// The router stays F32, as converters leave it; `format` is for the rest.
    /// `embedding`: of the first tensor.
    fn tensors(&self, format: Format, embedding: Format) -> Vec<Tensor> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![
            Tensor::new(EMBEDDING, embedding, &[self.vocab, self.hidden]),
            Tensor::new("output_norm.weight", Format::F32, &[self.hidden]),
            Tensor::new("output.weight", format, &[self.vocab, self.hidden]),
        ];
        for layer in 0..self.layers {
            let mut add = |name: &str, format, shape: &[usize]| {
                all.push(Tensor::new(format!("blk.{layer}.{name}.weight"), format, shape));
            };
            add("attn_norm", Format::F32, &[self.hidden]);
            add("attn_q", format, &[q, self.hidden]);
            add("attn_k", format, &[kv, self.hidden]);
            add("attn_v", format, &[kv, self.hidden]);
            add("attn_output", format, &[self.hidden, q]);
            let norms = match self.norms {
                Norms::None => None,
                Norms::Head => Some((self.head_dim, self.head_dim)),
                Norms::Row => Some((q, kv)),
            };
            if let Some((of_q, of_k)) = norms {
                add("attn_q_norm", Format::F32, &[of_q]);
                add("attn_k_norm", Format::F32, &[of_k]);
            }
            add("ffn_norm", Format::F32, &[self.hidden]);
            add("ffn_gate_inp", Format::F32, &[self.experts, self.hidden]);
            add("ffn_gate_exps", format, &[self.experts, self.inner, self.hidden]);
            add("ffn_up_exps", format, &[self.experts, self.inner, self.hidden]);
            add("ffn_down_exps", format, &[self.experts, self.hidden, self.inner]);
        }
        all
    }

    fn keys(&self) -> Vec<(String, Value)> {
        let own = |name: &str| format!("{}.{name}", self.architecture);
        let number = |n: usize| Value::U32(n as u32);
        vec![
            ("general.architecture".into(), Value::Text(self.architecture)),
            ("general.name".into(), Value::Text(self.name)),
            (own("block_count"), number(self.layers)),
            (own("context_length"), number(self.context)),
            (own("embedding_length"), number(self.hidden)),
            (own("feed_forward_length"), number(self.inner)),
            (own("expert_feed_forward_length"), number(self.inner)),
            (own("attention.head_count"), number(self.heads)),
            (own("attention.head_count_kv"), number(self.kv_heads)),
            (own("attention.key_length"), number(self.head_dim)),
            (own("attention.value_length"), number(self.head_dim)),
            (own("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)),
            (own("rope.dimension_count"), number(self.head_dim)),
            (own("rope.freq_base"), Value::F32(self.rope_base)),
            (own("expert_count"), number(self.experts)),
            (own("expert_used_count"), number(self.top_k)),
            (own("vocab_size"), number(self.vocab)),
            ("tokenizer.ggml.model".into(), Value::Text("none")),
        ]
    }
}

enum Value {
    U32(u32),
    F32(f32),
    Text(&'static str),
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The file up to the data. Source: the GGUF specification, version 3.
fn header(keys: &[(String, Value)], tensors: &[Tensor]) -> Result<Vec<u8>, String> {
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        text(&mut out, key);
        match value {
            Value::U32(number) => out.extend([4_u32.to_le_bytes(), number.to_le_bytes()].concat()),
            Value::F32(number) => out.extend([6_u32.to_le_bytes(), number.to_le_bytes()].concat()),
            Value::Text(words) => {
                out.extend(8_u32.to_le_bytes());
                text(&mut out, words);
            }
        }
    }
    let mut offset = 0_u64;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        out.extend(tensor.shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        out.extend(tensor.format.ggml_type().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += tensor.bytes()?.next_multiple_of(ALIGNMENT) as u64;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}

/// Random blocks of a format, and where to cut them.
struct Pool {
    bytes: Vec<u8>,
    block: usize,
    random: Random,
}

impl Pool {
    fn new(format: Format) -> Self {
        let mut random = Random::new(u64::from(format.ggml_type()));
        let blocks = POOL_BYTES / format.block_bytes();
        let cols = blocks * format.block_len();
        let bytes = weights(format, Weights::Usual, 1, cols, &mut random);
        Self { bytes, block: format.block_bytes(), random }
    }

    /// F32 of this deviation.
    fn normal(deviation: f32) -> Self {
        let mut random = Random::new(1);
        let elements = (0..POOL_BYTES / 4).map(|_| random.normal() * deviation);
        Self { bytes: elements.flat_map(f32::to_le_bytes).collect(), block: 4, random }
    }

    fn write(&mut self, mut left: usize, out: &mut impl Write) -> std::io::Result<()> {
        while left > 0 {
            let from = self.random.below(self.bytes.len() / self.block / 2) * self.block;
            let count = left.min(self.bytes.len() - from);
            out.write_all(&self.bytes[from..from + count])?;
            left -= count;
        }
        Ok(())
    }
}

fn write(asked: &Asked) -> Result<u64, Box<dyn Error>> {
    let Asked { preset, format, embedding, path } = asked;
    let mut own = embedding.map(Pool::normal);
    let tensors = preset.tensors(*format, if own.is_some() { Format::F32 } else { *format });
    let mut out = BufWriter::with_capacity(4 << 20, File::create(path)?);
    let header = header(&preset.keys(), &tensors)?;
    out.write_all(&header)?;
    let mut written = header.len() as u64;
    let mut pools: BTreeMap<Format, Pool> = BTreeMap::new();
    for tensor in &tensors {
        let bytes = tensor.bytes()?;
        match tensor.is_norm() {
            true => out.write_all(&1.0_f32.to_le_bytes().repeat(bytes / 4))?,
            false => own
                .as_mut()
                .filter(|_| tensor.name == EMBEDDING)
                .unwrap_or_else(|| {
                    pools.entry(tensor.format).or_insert_with(|| Pool::new(tensor.format))
                })
                .write(bytes, &mut out)?,
        }
        let padding = bytes.next_multiple_of(ALIGNMENT) - bytes;
        out.write_all(&[0; ALIGNMENT][..padding])?;
        written += (bytes + padding) as u64;
    }
    out.flush()?;
    Ok(written)
}

/// What the command line asks for.
struct Asked {
    preset: Preset,
    format: Format,
    /// Deviation of the embedding.
    embedding: Option<f32>,
    path: PathBuf,
}

/// Errors, in words: the arguments make no sense.
fn parse(words: &[String]) -> Result<Asked, String> {
    let [name, out, options @ ..] = words else { return Err("a preset and a file".into()) };
    let known = || PRESETS.map(|preset| preset.name).join(", ");
    let preset = PRESETS.into_iter().find(|preset| preset.name == name);
    let mut preset = preset.ok_or_else(|| format!("{name:?} is none of {}", known()))?;
    let (mut format, mut embedding) = (Format::Q4K, None);
    let (pairs, rest) = options.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(format!("{rest:?} has no value"));
    }
    for [option, value] in pairs {
        match option.as_str() {
            "--layers" => {
                let layers =
                    value.parse().ok().filter(|layers| (1..=preset.layers).contains(layers));
                preset.layers = layers.ok_or(format!("1 to {} layers", preset.layers))?;
            }
            "--format" => {
                let found = Format::ALL.into_iter().find(|format| format.name() == value);
                format = found.ok_or(format!("{value:?} is no format"))?;
            }
            "--embedding" => {
                let deviation = value.parse().ok().filter(|x| (0.0..=1e3).contains(x));
                embedding = Some(deviation.ok_or(format!("{value:?}: a deviation up to 1000"))?);
            }
            _ => return Err(format!("{option}: no such option")),
        }
    }
    Ok(Asked { preset, format, embedding, path: out.into() })
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let done = parse(&words).map_err(|error| {
        format!("random_model PRESET OUT [--format NAME] [--layers N] [--embedding X]: {error}")
            .into()
    });
    match done.and_then(|asked| write(&asked)) {
        Ok(bytes) => {
            println!("{} bytes of random weights", bytes);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("random_model: {error}");
            ExitCode::FAILURE
        }
    }
}
