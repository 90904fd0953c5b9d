//! The demo model on the CPU backend against the reference: quantised
//! activations must not change what it says.

use pregate_kernels::{Backend, Cpu, CpuOptions, Reference};
use pregate_predictor::{NoObserver, Observer};
use pregate_runtime::text::TextKind;
use pregate_runtime::{
    Cancel, GenerateOptions, LoadOptions, Model, Residency, Run, Session, SessionOptions,
};
use std::path::Path;
use std::sync::Arc;

const QUESTIONS: [&str; 12] = [
    "extract a tar.gz archive",
    "List all files, including hidden files (ls)",
    "Show the status of the repository (git)",
    "Search for a pattern within a file (grep)",
    "download a file",
    "What is curl?",
    "how do I list hidden files",
    "Create a new branch and switch to it (git)",
    "kill a process by name",
    "show disk usage of a folder",
    "Convert a video to another format (ffmpeg)",
    "hello",
];

fn load(backend: Arc<dyn Backend>) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/pregate-demo.gguf");
    Model::load(&path, LoadOptions { backend, residency: Residency::Lazy }, &mut |_| {})
        .expect("the model in the repository")
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(2), isa: None }).expect("a pool"))
}

fn question_ids(model: &Model, question: &str) -> Vec<u32> {
    let prompt = format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
    model.tokenizer().unwrap().encode(&prompt, TextKind::Rendered).unwrap()
}

/// Question and the CPU backend's answer, as tokens.
fn conversation(model: &Model, question: &str) -> Vec<u32> {
    let mut ids = question_ids(model, question);
    let options = GenerateOptions { max_tokens: 48, ..Default::default() };
    let mut session = Session::new(model, SessionOptions::default()).unwrap();
    let answer = session
        .generate(&ids, &options, &Cancel::new(), &mut NoObserver, &mut |_| {})
        .expect("an answer");
    ids.extend(answer.tokens);
    ids
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
    logits.iter().map(|&l| f64::from(l - largest) - sum.ln()).collect()
}

fn greedy(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

#[test]
fn the_cpu_backend_says_what_the_reference_says() {
    let (fast, exact) = (load(cpu()), load(Arc::new(Reference)));
    let vocab = fast.description().vocab;
    let (mut tokens, mut divergence, mut equal) = (0, 0.0, 0);
    for question in QUESTIONS {
        let ids = conversation(&fast, question);
        let logits = |model: &Model| {
            let (mut observer, cancel) = (NoObserver, Cancel::new());
            let mut run = Run { observer: &mut observer, cancel: &cancel, progress: None };
            let mut session = Session::new(model, SessionOptions::default()).unwrap();
            session.feed_all(&ids, &mut run).unwrap()
        };
        let (found, want) = (logits(&fast), logits(&exact));
        for (found, want) in found.chunks(vocab).zip(want.chunks(vocab)) {
            let (q, p) = (log_softmax(found), log_softmax(want));
            divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            equal += usize::from(greedy(found) == greedy(want));
            tokens += 1;
        }
    }
    let (divergence, equal) = (divergence / tokens as f64, equal as f64 / tokens as f64);
    println!("{tokens} tokens: KL {divergence:.2e} nats per token, {:.2} % equal", 100.0 * equal);
    assert!(divergence < 1e-3, "KL divergence of {divergence:.2e} nats per token");
    assert!(equal >= 0.99, "only {:.2} % of the greedy choices are equal", 100.0 * equal);
}

#[test]
fn the_first_question_of_a_newcomer_gets_a_command() {
    let model = load(cpu());
    let ids = conversation(&model, "extract a tar.gz archive");
    let text = model.tokenizer().unwrap().decode(&ids, true);
    let answer = text.rsplit("assistant\n").next().unwrap();
    assert!(answer.contains("tar "), "{answer:?}");
}

/// A conversation's second turn computes only what is new, and answers as if
/// it had computed everything.
#[test]
fn a_reused_prefix_changes_nothing() {
    let model = load(cpu());
    let first = conversation(&model, QUESTIONS[0]);
    let mut second = first.clone();
    let more = "<|im_end|>\n<|im_start|>user\nlist files<|im_end|>\n<|im_start|>assistant\n";
    second.extend(model.tokenizer().unwrap().encode(more, TextKind::Rendered).unwrap());
    let options = GenerateOptions { max_tokens: 24, ..Default::default() };
    let answer = |session: &mut Session| {
        session.generate(&second, &options, &Cancel::new(), &mut NoObserver, &mut |_| {}).unwrap()
    };
    let mut fresh = Session::new(&model, SessionOptions::default()).unwrap();
    let mut warm = Session::new(&model, SessionOptions::default()).unwrap();
    warm.feed_quietly(&first).unwrap();
    let (cold, warm) = (answer(&mut fresh), answer(&mut warm));
    assert_eq!((cold.reused_tokens, warm.reused_tokens), (0, first.len()));
    assert_eq!(cold.tokens, warm.tokens);
}

/// What was fed, token by token: part of a prompt?
#[derive(Default)]
struct Fed(Vec<bool>);

impl Observer for Fed {
    fn fed(&mut self, fed: &pregate_predictor::Fed<'_>) {
        self.0.extend(fed.tokens.iter().map(|_| fed.is_prompt));
    }

    fn routed(&mut self, _: usize, _: usize, _: &[u32], _: &[f32]) {}
}

#[test]
fn a_prompt_of_which_one_token_is_new_is_a_prompt() {
    let model = load(cpu());
    let prompt = question_ids(&model, QUESTIONS[1]);
    let mut session = Session::new(&model, SessionOptions::default()).unwrap();
    session.feed_quietly(&prompt[..prompt.len() - 1]).unwrap();
    let options = GenerateOptions { max_tokens: 3, ..Default::default() };
    let mut fed = Fed::default();
    let answer =
        session.generate(&prompt, &options, &Cancel::new(), &mut fed, &mut |_| {}).unwrap();
    assert_eq!(answer.reused_tokens, prompt.len() - 1);
    assert_eq!(fed.0, [true, false, false]);
}

#[test]
fn a_cancelled_answer_stops_at_once_and_the_session_goes_on() {
    let model = load(cpu());
    let prompt = question_ids(&model, QUESTIONS[1]);
    let mut session = Session::new(&model, SessionOptions::default()).unwrap();
    let cancel = Cancel::new();
    let options = GenerateOptions { max_tokens: 48, ..Default::default() };
    let answer = session
        .generate(&prompt, &options, &cancel.clone(), &mut NoObserver, &mut |_| cancel.cancel())
        .expect("a prompt of one chunk is done when the callback first runs");
    assert_eq!(answer.finish, pregate_runtime::Finish::Cancelled);
    assert!(answer.tokens.len() <= 1);
    let again = session
        .generate(&prompt, &options, &Cancel::new(), &mut NoObserver, &mut |_| {})
        .expect("the session is usable");
    assert_ne!(again.finish, pregate_runtime::Finish::Cancelled);
}
