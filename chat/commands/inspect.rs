//! `pregate inspect`: what a model file or folder holds.

use super::tensor_kinds::{Kind, kind};
use crate::{
    cli::InspectArgs,
    exit::Failure,
    output::{self, bytes, printable},
};
use pregate_kernels::Reference;
use pregate_runtime::{
    LoadOptions, Model, Residency,
    files::{Container, ElementType, ModelFiles, TensorInfo},
    model::{describe, read_tokenizer},
    text::ChatTemplate,
};
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write, path::Path, sync::Arc};

#[derive(Serialize)]
struct Report {
    path: String,
    container: &'static str,
    files: Vec<String>,
    total_bytes: u64,
    model: Option<Summary>,
    tensors: usize,
    tensor_bytes: u64,
    bytes_by_kind: BTreeMap<Kind, u64>,
    formats: BTreeMap<String, FormatCount>,
    /// Weight bytes that one decoded token reads.
    bytes_per_token: Option<u64>,
    tokenizer: Option<TokenizerSummary>,
    chat_template: &'static str,
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensor_list: Option<Vec<Row>>,
}

#[derive(Serialize)]
struct Summary {
    architecture: &'static str,
    name: Option<String>,
    layers: usize,
    moe_layers: usize,
    hidden: usize,
    vocab: usize,
    context_limit: usize,
    experts: usize,
    experts_per_token: usize,
    shared_expert: bool,
}

#[derive(Default, Serialize)]
struct FormatCount {
    tensors: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct TokenizerSummary {
    kind: String,
    vocab: usize,
}

#[derive(Serialize)]
struct Row {
    name: String,
    format: String,
    shape: Vec<usize>,
    bytes: u64,
    kind: Kind,
}

pub fn run(args: &InspectArgs) -> Result<(), Failure> {
    let files = ModelFiles::open(&args.path)?;
    let report = report(&args.path, &files, args.tensors);
    if args.json { output::json(&report) } else { output::line(text(&report).trim_end()) }
}

fn report(path: &Path, files: &ModelFiles, list: bool) -> Report {
    let mut warnings = files.notes().to_vec();
    let summary = summary(files, &mut warnings);
    let mut bytes_by_kind: BTreeMap<Kind, u64> = BTreeMap::new();
    let mut formats: BTreeMap<String, FormatCount> = BTreeMap::new();
    for tensor in files.tensors() {
        *bytes_by_kind.entry(kind(&tensor.name)).or_default() += tensor.bytes as u64;
        let count = formats.entry(format_name(tensor)).or_default();
        count.tensors += 1;
        count.bytes += tensor.bytes as u64;
    }
    // Loading maps files and checks tensors; it says whether the model runs.
    let bytes_per_token = summary.as_ref().and_then(|_| {
        let options = LoadOptions { backend: Arc::new(Reference), residency: Residency::Lazy };
        match Model::load(path, options, &mut |_| {}) {
            Ok(model) => Some(model.bytes_per_token()),
            Err(error) => {
                warnings.push(format!("cannot run: {error}"));
                None
            }
        }
    });
    let (tokenizer, chat_template) = text_side(files, &mut warnings);
    Report {
        path: path.display().to_string(),
        container: match files.container() {
            Container::Gguf(_) => "GGUF",
            Container::HuggingFace { .. } => "Hugging Face folder",
        },
        files: files.paths().iter().map(|path| path.display().to_string()).collect(),
        total_bytes: files.total_bytes(),
        model: summary,
        tensors: files.tensors().len(),
        tensor_bytes: bytes_by_kind.values().sum(),
        bytes_by_kind,
        formats,
        bytes_per_token,
        tokenizer,
        chat_template,
        warnings,
        tensor_list: list.then(|| files.tensors().iter().map(row).collect()),
    }
}

fn summary(files: &ModelFiles, warnings: &mut Vec<String>) -> Option<Summary> {
    let description = match describe(files) {
        Ok(description) => description,
        Err(error) => {
            warnings.push(format!("cannot run: {error}"));
            return None;
        }
    };
    if description.extra_layers > 0 {
        let count = description.extra_layers;
        warnings.push(format!("{count} multi-token-prediction layers are not used"));
    }
    let moe = description.moe_layers().next().map(|(_, moe)| moe.clone());
    Some(Summary {
        architecture: description.architecture.title(),
        name: description.name.clone(),
        layers: description.layers.len(),
        moe_layers: description.moe_layers().count(),
        hidden: description.hidden,
        vocab: description.vocab,
        context_limit: description.context_limit,
        experts: moe.as_ref().map_or(0, |moe| moe.experts),
        experts_per_token: moe.as_ref().map_or(0, |moe| moe.top_k),
        shared_expert: moe.is_some_and(|moe| moe.shared.is_some()),
    })
}

fn text_side(
    files: &ModelFiles,
    warnings: &mut Vec<String>,
) -> (Option<TokenizerSummary>, &'static str) {
    let tokenizer = match read_tokenizer(files) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            warnings.push(format!("no usable tokenizer: {error}"));
            return (None, "unknown");
        }
    };
    let template = match tokenizer.chat_template() {
        None => {
            warnings.push("no chat template: chat would use the built-in ChatML".to_string());
            "none"
        }
        Some(source) => match ChatTemplate::compile(source, tokenizer.named_tokens()) {
            Ok(_) => "present",
            Err(error) => {
                warnings.push(format!("chat cannot run: {error}"));
                "not supported"
            }
        },
    };
    let kind = tokenizer.kind().to_string();
    (Some(TokenizerSummary { kind, vocab: tokenizer.vocab_size() }), template)
}

fn format_name(tensor: &TensorInfo) -> String {
    match tensor.element {
        ElementType::Format(format) => format.name().to_string(),
        ElementType::U8 => "U8".to_string(),
    }
}

fn row(tensor: &TensorInfo) -> Row {
    Row {
        name: tensor.name.clone(),
        format: format_name(tensor),
        shape: tensor.shape.clone(),
        bytes: tensor.bytes as u64,
        kind: kind(&tensor.name),
    }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    let mut add = |label: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{label:<20} {value}");
    };
    add("file", report.path.clone());
    let count = report.files.len();
    let shards = if count == 1 { String::new() } else { format!(" in {count} files") };
    add("container", format!("{}, {}{shards}", report.container, bytes(report.total_bytes)));
    if let Some(model) = &report.model {
        let name = model.name.as_deref().map(printable).unwrap_or_default();
        add("model", format!("{} {name}", model.architecture).trim_end().to_string());
        add("layers", format!("{}, {} of them with experts", model.layers, model.moe_layers));
        let shared = if model.shared_expert { ", and a shared expert" } else { "" };
        add(
            "experts",
            format!("{} per layer, {} per token{shared}", model.experts, model.experts_per_token),
        );
        add("hidden, vocabulary", format!("{}, {}", model.hidden, model.vocab));
        add("context limit", format!("{} tokens", model.context_limit));
    }
    add("tensors", format!("{}, {}", report.tensors, bytes(report.tensor_bytes)));
    let total = report.tensor_bytes.max(1) as f64;
    for (kind, &size) in &report.bytes_by_kind {
        let share = size as f64 / total * 100.0;
        add(&format!("  {}", kind.title()), format!("{:>10} {share:5.1} %", bytes(size)));
    }
    for (name, count) in &report.formats {
        let plural = if count.tensors == 1 { "" } else { "s" };
        add(
            &format!("  {name}"),
            format!("{:>10} in {} tensor{plural}", bytes(count.bytes), count.tensors),
        );
    }
    if let Some(size) = report.bytes_per_token {
        add("read per token", bytes(size));
    }
    if let Some(tokenizer) = &report.tokenizer {
        add("tokenizer", format!("{}, {} tokens", tokenizer.kind, tokenizer.vocab));
    }
    add("chat template", report.chat_template.to_string());
    for warning in &report.warnings {
        add("warning", printable(warning));
    }
    for row in report.tensor_list.iter().flatten() {
        let shape: Vec<String> = row.shape.iter().map(usize::to_string).collect();
        add(
            &format!("  {:<8}", row.format),
            format!("{:>10}  [{}]  {}", bytes(row.bytes), shape.join(", "), printable(&row.name)),
        );
    }
    out
}
