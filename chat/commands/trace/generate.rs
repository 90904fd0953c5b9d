//! `pregate trace generate`: a trace that nobody recorded, after one that
//! somebody did.

use super::{check_outputs, interrupt::until_interrupted, notice, open, with_bar};
use crate::{
    cli::GenerateArgs,
    exit::Failure,
    output::{self, printable},
    progress::Progress,
};
use pregate_predictor::LayerShape;
use pregate_traces::{
    export,
    replay::count::CountError,
    synthetic::{Figures, Fit, Generator, Weights, fit, lengths},
};
use std::ffi::OsStr;

/// Tokens of a trial, and of the figures that are compared, at most.
const TRIAL: u64 = 2000;

pub fn run(args: &GenerateArgs) -> Result<(), Failure> {
    if args.top_k > args.experts {
        let (top_k, experts) = (args.top_k, args.experts);
        return Err(Failure::Usage(format!("--top-k {top_k} of --experts {experts}")));
    }
    if args.out.extension() != Some(OsStr::new("pgtrace")) {
        let text = "--out: a name that ends with .pgtrace is needed, which keeps the label";
        return Err(Failure::Usage(text.into()));
    }
    check_outputs(std::slice::from_ref(&args.out), &args.from)?;
    let mut source = open(&args.from)?;
    let lengths = lengths(source.as_mut())?;
    notice(source.as_ref());
    if lengths.is_empty() {
        let text = format!("{}: no tokens, so nothing to be like", args.from.display());
        return Err(Failure::Usage(text));
    }
    // A short trace is compared with one as short.
    let trial_tokens = lengths.iter().sum::<u64>().min(TRIAL);
    let target = Figures::of_first(source.as_mut(), trial_tokens).map_err(counting)?;
    let shape = source.header().shape.clone();
    let Some((_, &first)) = shape.moe().next() else {
        return Err(Failure::Usage("a trace without MoE layers".into()));
    };
    let from = match source.header().model.as_str() {
        "" => args.from.display().to_string(),
        model => model.to_string(),
    };
    let search = |doing, shape, start| {
        let mut trial = Generator::new(shape, start, (trial_tokens, &lengths), (&from, args.seed));
        let mut bar: Option<Progress> = None;
        let found = fit(&mut trial, start, &target, &mut |done, most| {
            bar.get_or_insert_with(|| Progress::new(doing, "trials", most)).set(done);
        });
        found.map_err(counting)
    };
    let own = (shape.moe().count(), first);
    let there = search("fitting in the trace's shape", own, Weights::default())?;
    let (experts, top_k) = (args.experts as usize, args.top_k as usize);
    let layer = LayerShape { experts, top_k, expert_bytes: args.expert_bytes, class: 0 };
    let wanted = (args.layers as usize, layer);
    let here = search("fitting in the new shape", wanted, there.weights)?;
    let mut generator =
        Generator::new(wanted, here.weights, (args.tokens, &lengths), (&from, args.seed));
    let exported = until_interrupted(&mut generator, |source| {
        with_bar("writing", Some(args.tokens), |tell| Ok(export::own(source, &args.out, tell)?))
    })?;
    table(&target, &there, &here).iter().try_for_each(|line| output::line(line))?;
    let (tokens, out, from) = (exported.tokens, args.out.display(), printable(&from));
    output::line(&format!("{tokens} SYNTHETIC tokens to {out}, after {from}"))
}

/// Target against reached.
fn table(target: &Figures, there: &Fit, here: &Fit) -> Vec<String> {
    let head = format!("{:<18} {:>8} {:>12} {:>12}", "", "real", "its shape", "this shape");
    let line = |(index, name): (usize, &&str)| {
        let [real, there, here] =
            [target, &there.reached, &here.reached].map(|figures| figures.values[index]);
        let words = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
        let [real, there, here] = [real, there, here].map(words);
        format!("{name:<18} {real:>8} {there:>12} {here:>12}")
    };
    [head].into_iter().chain(Figures::NAMES.iter().enumerate().map(line)).collect()
}

fn counting(error: CountError) -> Failure {
    match error {
        CountError::Trace(error) => error.into(),
        CountError::Slots(error) => Failure::Usage(error.to_string()),
    }
}
