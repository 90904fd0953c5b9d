//! `pregate trace`: what trace files hold, and from and to other formats.

mod generate;
mod interrupt;

use crate::{
    cli::{ExportArgs, HeadArgs, ImportArgs, ImportForm, StatsArgs, TraceCommand, TraceHints},
    exit::Failure,
    output::{self, printable},
    progress::Progress,
    save,
};
use pregate_traces::{
    Header, Provenance, Row, Source, TraceError,
    export::{self, Exported, Whole},
    hex,
    import::{self, Hints},
    stats::{LAGS, SHARES, Stats},
};
use serde_json::json;
use std::ffi::OsStr;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

pub fn run(command: &TraceCommand) -> Result<(), Failure> {
    match command {
        TraceCommand::Import(args) => import(args),
        TraceCommand::Export(args) => export(args),
        TraceCommand::Stats(args) => stats(args),
        TraceCommand::Head(args) => head(args),
        TraceCommand::Generate(args) => generate::run(args),
    }
}

/// Opens any trace: ours, rtrace-1, a table, or answers of a server.
fn open(path: &Path) -> Result<Box<dyn Source>, Failure> {
    open_as(path, ImportForm::Auto, &TraceHints::default())
}

fn open_as(path: &Path, form: ImportForm, hints: &TraceHints) -> Result<Box<dyn Source>, Failure> {
    let hints = Hints {
        model: hints.model.clone(),
        layers: hints.layers,
        experts: hints.experts,
        top_k: hints.top_k,
    };
    let opened: Result<Box<dyn Source>, TraceError> = match form {
        ImportForm::Csv => import::csv::open(path, &hints).map(|table| Box::new(table) as _),
        ImportForm::Responses => {
            import::responses::open(path, &hints).map(|answers| Box::new(answers) as _)
        }
        ImportForm::Auto => pregate_traces::open_any(path, &hints),
    };
    opened.map_err(Failure::from)
}

/// Tokens and their rate; a bar where their number is known.
fn with_bar<T>(
    doing: &'static str,
    tokens: Option<u64>,
    work: impl FnOnce(&mut dyn FnMut(u64)) -> T,
) -> T {
    let mut bar = Progress::with_rate(doing, "tokens", tokens);
    work(&mut |done| {
        // A token takes less time than looking at the clock.
        if done % 1024 == 0 {
            bar.set(usize::try_from(done).unwrap_or(usize::MAX));
        }
    })
}

fn import(args: &ImportArgs) -> Result<(), Failure> {
    let mut source = open_as(&args.file, args.form, &args.hints)?;
    source.verify()?;
    write(source.as_mut(), &args.file, &args.out)
}

fn export(args: &ExportArgs) -> Result<(), Failure> {
    let mut source = open(&args.file)?;
    if args.out == Path::new("-") {
        let (path, out) = (Path::new("standard output"), io::stdout().lock());
        let written = export::jsonl(source.as_mut(), path, BufWriter::new(out), &mut |_| {});
        return match written {
            Err(TraceError::Io { path: of, source }) if of == path => Err(Failure::output(source)),
            Err(error) => Err(error.into()),
            Ok(exported) => {
                tell_lost(source.as_ref(), &exported);
                Ok(())
            }
        };
    }
    write(source.as_mut(), &args.file, &args.out)
}

/// Writes what the name of `out` says.
fn write(source: &mut dyn Source, from: &Path, out: &Path) -> Result<(), Failure> {
    let extension = out.extension().and_then(OsStr::to_str);
    let mut outputs = vec![out.to_path_buf()];
    if extension == Some("json") {
        outputs.extend(import::rtrace::columns(out));
    }
    check_outputs(&outputs, from)?;
    let exported = interrupt::until_interrupted(source, |source| {
        with_bar("writing", source.tokens(), |tell| match extension {
            Some("pgtrace") => Ok(export::own(source, out, tell)?),
            Some("json") => Ok(export::rtrace(source, out, tell)?),
            Some("jsonl") => {
                let mut file = Whole::create(out)?;
                let exported = export::jsonl(source, out, &mut file, tell)?;
                Ok(file.commit().map(|()| exported)?)
            }
            Some("csv") => {
                let mut file = Whole::create(out)?;
                let exported = export::csv(source, out, &mut file, tell)?;
                Ok(file.commit().map(|()| exported)?)
            }
            _ => Err(Failure::Usage(format!(
                "{}: a name that ends with .pgtrace, .json (rtrace-1), .jsonl or .csv is needed",
                out.display()
            ))),
        })
    })?;
    tell_lost(source, &exported);
    output::line(&format!("{} tokens to {}", exported.tokens, out.display()))
}

/// No file of the trace `from` is written over.
fn check_outputs(outputs: &[PathBuf], from: &Path) -> Result<(), Failure> {
    let read = pregate_traces::files(from);
    let check = |out: &PathBuf| {
        save::refuse_same(out, read.iter().map(PathBuf::as_path), "the trace that is read")
    };
    outputs.iter().try_for_each(check)
}

/// What is missing from the trace, and from what was written of it.
fn tell_lost(source: &dyn Source, exported: &Exported) {
    notice(source);
    exported.left_out.iter().for_each(|what| eprintln!("warning: left out: {what}"));
}

/// What is missing from the trace, on standard error.
fn notice(source: &dyn Source) {
    source.notice().iter().for_each(|notice| eprintln!("warning: {}", printable(notice)));
}

/// "24 layers; 24 MoE layers, top-4 of 32 experts".
fn shape(header: &Header) -> String {
    let layers = header.shape.layers.len();
    format!("{layers} layers; {}", output::shape_words(&header.shape))
}

/// What the trace calls it.
fn model(header: &Header) -> String {
    match header.model.as_str() {
        "" => "a model without a name".into(),
        name => printable(name),
    }
}

/// Where it comes from; a made-up trace is called that everywhere.
fn provenance(header: &Header) -> String {
    match &header.source {
        Provenance::Recorded => "recorded by pregate".into(),
        Provenance::Imported { format } => format!("imported from {}", printable(format)),
        Provenance::Synthetic { from, seed } => {
            format!("SYNTHETIC, made up after {} with seed {seed}", printable(from))
        }
    }
}

fn stats(args: &StatsArgs) -> Result<(), Failure> {
    let mut source = open(&args.file)?;
    let twice = source.tokens().map(|tokens| tokens.saturating_mul(2));
    let found = with_bar("reading", twice, |tell| Stats::of(source.as_mut(), tell));
    let found = found.map_err(Failure::from)?;
    notice(source.as_ref());
    let header = source.header();
    if args.json {
        let by = |names: &[String], values: &[Option<f64>]| -> serde_json::Value {
            names.iter().cloned().zip(values.iter().map(|value| json!(value))).collect()
        };
        let report = json!({
            "model": header.model,
            "provenance": provenance(header),
            "fingerprint": header.fingerprint.map(|digest| hex(&digest)),
            "tokens": found.tokens,
            "sequences": found.sequences,
            "accesses": found.accesses,
            "entropy_norm_mean": found.entropy(),
            "reuse": by(&LAGS.map(|lag| lag.to_string()), &found.reuse),
            "static_hit_2nd_half": by(&SHARES.map(|share| share.to_string()), &found.static_hits),
            "transition_recall": found.transition,
            "transition_recall_2k": found.transition_2k,
            "layers": found.layers.iter().map(|layer| json!({
                "layer": layer.layer, "entropy_norm": layer.entropy, "tokens": layer.tokens,
            })).collect::<Vec<_>>(),
        });
        return output::line(&report.to_string());
    }
    report(header, &found).iter().try_for_each(|line| output::line(line))
}

fn report(header: &Header, found: &Stats) -> Vec<String> {
    let share = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.3}"));
    let shares = |values: &[Option<f64>]| {
        values.iter().map(|value| share(*value)).collect::<Vec<_>>().join("  ")
    };
    let mut lines = vec![
        format!("{}, {}", model(header), provenance(header)),
        format!("{}; {} tokens in {} sequences", shape(header), found.tokens, found.sequences),
        format!("entropy of the experts' shares (1: all alike): {}", share(found.entropy())),
        format!("reuse of the token 1, 2, 4, 8, 16, 32, 64 before: {}", shares(&found.reuse)),
        format!(
            "hits of the most used 10, 25, 50 % (of the first half, on the second): {}",
            shares(&found.static_hits)
        ),
        format!(
            "experts foreseen from the layer before, among top-k and twice as many: {}  {}",
            share(found.transition),
            share(found.transition_2k)
        ),
    ];
    let flat = |layer: &pregate_traces::stats::LayerStats| {
        let sum = layer.tokens.iter().sum::<u64>().max(1) as f64;
        let most = layer.tokens.iter().copied().max().unwrap_or(0) as f64 / sum;
        format!(
            "  layer {:>3}  entropy {:.3}  the most used expert has {:.1} % ({:.1} % if all were alike)",
            layer.layer,
            layer.entropy,
            most * 100.0,
            100.0 / layer.tokens.len().max(1) as f64
        )
    };
    lines.extend(found.layers.iter().map(flat));
    lines
}

fn head(args: &HeadArgs) -> Result<(), Failure> {
    let mut source = open(&args.file)?;
    let header = source.header().clone();
    if !args.json {
        output::line(&format!("{}, {}", model(&header), provenance(&header)))?;
        output::line(&shape(&header))?;
    }
    let mut row = Row::default();
    for _ in 0..args.tokens {
        if !source.next(&mut row).map_err(Failure::from)? {
            break;
        }
        if args.json {
            let mut line = export::line(&row);
            if let Provenance::Synthetic { from, .. } = &header.source {
                line["synthetic_from"] = from.as_str().into();
            }
            output::line(&line.to_string())?;
            continue;
        }
        let start = if row.starts_sequence { "sequence starts; " } else { "" };
        let pass = match row.pass_tokens {
            0 | 1 => String::new(),
            tokens => format!("pass of {tokens}; "),
        };
        let token = row.token.map_or(String::new(), |token| format!(", token {token}"));
        output::line(&format!("{start}{pass}position {}{token}", row.position))?;
        for (layer, _) in header.shape.moe() {
            let experts: Vec<String> = row.experts(layer).iter().map(u16::to_string).collect();
            output::line(&format!("  layer {layer}: {}", experts.join(" ")))?;
        }
        for served in &row.served {
            let count =
                |origin| served.origins.iter().filter(|(_, found)| *found == origin).count();
            use pregate_predictor::Origin::{Early, Hit, InFlight, Miss};
            output::line(&format!(
                "  layer {} had {} in slots, {} ahead, {} on their way, {} missing; {} left a slot, \
                 {} bytes came, {:.3} ms stalled",
                served.layer,
                count(Hit),
                count(Early),
                count(InFlight),
                count(Miss),
                served.evictions,
                served.bytes,
                served.stall_ns as f64 / 1e6
            ))?;
        }
    }
    notice(source.as_ref());
    Ok(())
}
