//! Every named bad model file is refused with one message that says what is
//! wrong where, at once, and without allocating much.

#[path = "support/badfiles.rs"]
mod badfiles;
#[path = "support/counting_allocator.rs"]
mod counting_allocator;
#[path = "support/gguf_builder.rs"]
mod gguf_builder;
#[path = "support/scratch.rs"]
mod scratch;

use badfiles::{Case, good_gguf, good_safetensors};
use counting_allocator::peak_bytes;
use gguf_builder::Gguf;
use pregate_runtime::{
    Error,
    files::{Container, ElementType, ModelFiles, TensorTable, Value, gguf, safetensors},
};
use scratch::{Scratch, best_of_three};
use std::{path::Path, time::Duration};

#[global_allocator]
static ALLOCATOR: counting_allocator::Counting = counting_allocator::Counting;

const MIB: usize = 1 << 20;

/// Opens the case from disk and checks refusal, message, time and memory.
/// Refusing may take memory in proportion to the file, at most.
fn check(case: &Case, file: &Path, open: impl Fn() -> Result<ModelFiles, Error>) {
    let id = case.id;
    let (refused, peak) = peak_bytes(&open);
    let message = match refused {
        Ok(opened) => panic!("{id}: accepted: {opened:?}"),
        Err(error) => error.to_string(),
    };
    let name = file.file_name().unwrap().to_str().unwrap();
    assert!(message.contains(name), "{id}: which file? {message}");
    let complete = (message.contains("found ") && message.contains("; allowed: "))
        || message.contains(" is not supported; supported: ");
    assert!(complete, "{id}: found what, and what is allowed? {message}");
    for part in &case.mentions {
        assert!(message.contains(part), "{id}: {part:?} is missing in: {message}");
    }
    assert!(message.len() < 1200, "{id}: {} bytes of message", message.len());
    assert!(!message.contains(char::is_control), "{id}: {message:?}");
    let bound = MIB + 8 * case.bytes.len();
    assert!(peak <= bound, "{id}: {peak} bytes allocated for a file of {}", case.bytes.len());
    // The largest case has a header of 60 MB.
    let limit = Duration::from_secs(if case.bytes.len() > MIB { 3 } else { 1 });
    assert!(best_of_three(limit, &open), "{id}: slower than {limit:?}");
}

#[test]
fn bad_gguf_files_are_refused() {
    let scratch = Scratch::new("bad_gguf");
    let cases = badfiles::gguf_cases();
    for number in 1..=33 {
        let id = format!("G{number:02}");
        assert!(cases.iter().any(|case| case.id.starts_with(&id)), "no case {id}");
    }
    for case in &cases {
        let file = scratch.write("bad.gguf", &case.bytes);
        check(case, &file, || ModelFiles::open(&file));
    }
}

#[test]
fn bad_safetensors_files_are_refused() {
    let scratch = Scratch::new("bad_safetensors");
    scratch.write("config.json", b"{}");
    let cases = badfiles::safetensors_cases();
    for number in 1..=13 {
        let id = format!("S{number:02}");
        assert!(cases.iter().any(|case| case.id.starts_with(&id)), "no case {id}");
    }
    for case in &cases {
        let file = scratch.write("model.safetensors", &case.bytes);
        check(case, &file, || ModelFiles::open(scratch.path()));
    }
}

/// No prefix of a good file is a good file, wherever it ends.
#[test]
fn every_truncation_is_refused() {
    let parse_gguf = |bytes: &[u8]| {
        gguf::parse(Path::new("f"), 0, bytes, &mut TensorTable::new()).map(|_| ()).is_ok()
    };
    let parse_safetensors = |bytes: &[u8]| {
        safetensors::parse(Path::new("f"), 0, bytes, &mut TensorTable::new()).is_ok()
    };
    let gguf = good_gguf().build();
    let tensors = good_safetensors();
    assert!(parse_gguf(&gguf) && parse_safetensors(&tensors));
    assert!((0..gguf.len()).all(|len| !parse_gguf(&gguf[..len])));
    assert!((0..tensors.len()).all(|len| !parse_safetensors(&tensors[..len])));
}

#[test]
fn a_good_gguf_file_is_read_as_written() {
    let scratch = Scratch::new("good_gguf");
    let opened = ModelFiles::open(&scratch.write("good.gguf", &good_gguf().build())).unwrap();
    let Container::Gguf(keys) = opened.container() else { panic!("not GGUF") };
    assert_eq!(keys.string("general.architecture").unwrap(), Some("qwen3moe"));
    assert_eq!(keys.get("a.u8"), Some(&Value::Unsigned(7)));
    assert_eq!(keys.get("a.i8"), Some(&Value::Signed(-7)));
    assert_eq!(keys.get("a.u16"), Some(&Value::Unsigned(700)));
    assert_eq!(keys.get("a.i16"), Some(&Value::Signed(-700)));
    assert_eq!(keys.get("a.i32"), Some(&Value::Signed(-70_000)));
    assert_eq!(keys.float("a.f32").unwrap(), Some(f64::from(1e-6_f32)));
    assert_eq!(keys.bool("a.bool").unwrap(), Some(true));
    assert_eq!(keys.unsigned("a.u64").unwrap(), Some(1 << 40));
    assert_eq!(keys.get("a.i64"), Some(&Value::Signed(-1 << 40)));
    assert_eq!(keys.float("a.f64").unwrap(), Some(0.1));
    let tokens = keys.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens, ["<s>", "", "größer", "a"]);
    assert_eq!(keys.floats("tokenizer.ggml.scores").unwrap().unwrap(), [0.0, -1.0, -2.5, -3.0]);
    assert_eq!(keys.integers("tokenizer.ggml.token_type").unwrap().unwrap(), [3, 1, 1, 1]);
    assert_eq!(keys.bools("a.bools").unwrap().unwrap(), [true, false]);

    assert_eq!(opened.tensors().len(), 3);
    let embedding = opened.tensor("token_embd.weight").unwrap();
    assert_eq!(embedding.shape, [2, 3, 4]);
    assert_eq!(opened.bytes(embedding), 0.5_f32.to_le_bytes().repeat(24));
    let query = opened.tensor("blk.0.attn_q.weight").unwrap();
    assert_eq!(query.shape, [3, 256]);
    assert_eq!(opened.bytes(query), vec![1; 432]);
    assert_eq!(opened.tensor("blk.1.attn_q.weight").map(|tensor| &tensor.name), None);
    assert!(opened.notes().is_empty());
    opened.unchanged().unwrap();
}

#[test]
fn a_good_safetensors_file_is_read_as_written() {
    let mut tensors = TensorTable::new();
    let bytes = good_safetensors();
    let header = safetensors::parse(Path::new("f"), 3, &bytes, &mut tensors).unwrap();
    let read: Vec<_> = tensors
        .all()
        .iter()
        .map(|t| (t.name.as_str(), t.shape.as_slice(), t.offset - header.data_offset, t.bytes))
        .collect();
    let expected: [(&str, &[usize], u64, usize); 4] = [
        ("a", &[2, 3], 0, 24),
        ("b", &[2, 2, 1], 24, 8),
        ("c", &[5], 32, 5),
        ("scalar", &[], 37, 2),
    ];
    assert_eq!(read, expected);
    assert_eq!(tensors.get("c").unwrap().element, ElementType::U8);
    assert!(tensors.all().iter().all(|tensor| tensor.file == 3));
}

/// G34.
#[test]
fn trailing_bytes_are_noted_and_missing_padding_is_not() {
    let scratch = Scratch::new("trailing");
    let mut bytes = good_gguf().build();
    bytes.extend([0; 77]);
    let opened = ModelFiles::open(&scratch.write("long.gguf", &bytes)).unwrap();
    assert_eq!(opened.notes().len(), 1);
    assert!(opened.notes()[0].contains("long.gguf: 77 bytes after the last tensor"));
    // 20 bytes of data, 12 of padding.
    let short = Gguf::new().f32_tensor("output_norm.weight", &[5], &[1.0; 5]).build();
    let unpadded = scratch.write("short.gguf", &short[..short.len() - 12]);
    assert!(ModelFiles::open(&unpadded).unwrap().notes().is_empty());
}

/// G39: integers where floats belong are refused by whoever asks for floats.
#[test]
fn arrays_keep_their_type() {
    let scores = gguf_builder::array(1, 4, [0, 1, 2, 3]);
    let bytes = Gguf::new().key("tokenizer.ggml.scores", scores).build();
    let header = gguf::parse(Path::new("f.gguf"), 0, &bytes, &mut TensorTable::new()).unwrap();
    let message = header.metadata.floats("tokenizer.ggml.scores").unwrap_err().to_string();
    assert!(message.contains("f.gguf at byte 57: tokenizer.ggml.scores"), "{message}");
    assert!(message.contains("array of signed integers"), "{message}");
}

/// S13: a legal header with a million tensors.
#[test]
fn a_million_tiny_tensors_open_in_time_and_memory() {
    let bytes = badfiles::tiny_tensors(1_000_000);
    let open = || {
        let mut tensors = TensorTable::new();
        safetensors::parse(Path::new("f"), 0, &bytes, &mut tensors).unwrap();
        tensors
    };
    let (tensors, peak) = peak_bytes(open);
    assert_eq!(tensors.all().len(), 1_000_000);
    assert_eq!(tensors.get("999999").unwrap().offset as usize, bytes.len() - 1);
    assert!(peak < 512 * MIB, "{} MiB", peak / MIB);
    assert!(best_of_three(Duration::from_secs(3), open));
}

/// A vocabulary of today's largest size with its merges.
#[test]
fn large_vocabularies_parse_fast() {
    let words: Vec<String> = (0..262_144).map(|id| format!("token{id}")).collect();
    let merges: Vec<String> = (0..520_000).map(|id| format!("left{id} right")).collect();
    let bytes = Gguf::new()
        .key("tokenizer.ggml.tokens", gguf_builder::strings(&words))
        .key("tokenizer.ggml.merges", gguf_builder::strings(&merges))
        .key("tokenizer.ggml.scores", gguf_builder::f32s(&vec![0.0; words.len()]))
        .key("tokenizer.ggml.token_type", gguf_builder::i32s(&vec![1; words.len()]))
        .build();
    let parse = || gguf::parse(Path::new("f"), 0, &bytes, &mut TensorTable::new()).unwrap();
    let (header, peak) = peak_bytes(parse);
    let read = header.metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(read, words);
    assert!(peak < 64 * MIB, "{} MiB", peak / MIB);
    assert!(best_of_three(Duration::from_millis(300), parse));
}

/// Values may be larger in memory than in the file; the sum is bounded all
/// the same.
#[test]
fn decoded_keys_are_bounded() {
    let big = gguf_builder::array(0, 40 << 20, vec![0; 40 << 20]);
    let bytes = Gguf::new().key("a", big).build();
    let parse = || gguf::parse(Path::new("f"), 0, &bytes, &mut TensorTable::new());
    let (refused, peak) = peak_bytes(parse);
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("limit for keys"), "{message}");
    assert!(peak < MIB, "{peak}");
}
