//! What reading takes in memory, whatever the file's length and contents.

#[path = "../../runtime/tests/support/counting_allocator.rs"]
mod counting_allocator;

use counting_allocator::peak_bytes;
use pregate_predictor::Shape;
use pregate_traces::format::{Reader, Writer};
use pregate_traces::import::{Hints, csv, jsonl, responses, rtrace};
use pregate_traces::replay::MemoryTrace;
use pregate_traces::stats::Stats;
use pregate_traces::{Header, Row, Source, export};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

#[global_allocator]
static ALLOCATOR: counting_allocator::Counting = counting_allocator::Counting;

const MIB: usize = 1 << 20;

/// 61 layers, top-8 of 256, with weights: 1.5 kB a token.
fn header() -> Header {
    Header { shape: Shape::uniform(61, 256, 8, 1 << 20), ..Header::default() }
}

fn row(token: u32) -> Row {
    let mut row = Row::default();
    (row.starts_sequence, row.pass_tokens) = (token.is_multiple_of(1000), 1);
    (row.position, row.token) = (token % 1000, Some(token));
    for layer in 0..61 {
        let ids: [u16; 8] =
            std::array::from_fn(|rank| ((token + layer * 7 + rank as u32) % 256) as u16);
        row.push_layer(&ids, &[0.125; 8]);
    }
    row
}

/// A file of our own with so many tokens.
fn written(path: &Path, tokens: u32) -> u64 {
    let file = BufWriter::new(File::create(path).unwrap());
    let mut writer = Writer::new(file, &header(), &[]).unwrap();
    (0..tokens).for_each(|token| writer.push(&row(token)).unwrap());
    writer.finish().unwrap();
    fs::metadata(path).unwrap().len()
}

fn all(source: &mut dyn Source) -> u64 {
    let (mut row, mut tokens) = (Row::default(), 0);
    while source.next(&mut row).unwrap() {
        tokens += 1;
    }
    tokens
}

/// A trace of 10 GB takes what one of 60 MB takes, as no more than a block is
/// held; statistics have tables per expert beside, whose size is the model's.
#[test]
fn a_long_trace_takes_no_more_than_a_short_one() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (short, long) = (at("short.pgtrace"), at("long.pgtrace"));
    let sizes = (written(&short, 500), written(&long, 40_000));
    assert!(sizes.0 < 1 << 20 && sizes.1 > 55 << 20, "{sizes:?}");
    let reading = |path: &Path| peak_bytes(|| all(&mut Reader::open(path).unwrap()));
    let ((few, small), (many, large)) = (reading(&short), reading(&long));
    assert_eq!((few, many), (500, 40_000));
    // One block of 64 KiB and what a row overlaps it by, and the buffer.
    assert!(large < MIB && large < small + 4096, "{small} and {large} bytes");
    let stats = |path: &Path| {
        let mut reader = Reader::open(path).unwrap();
        peak_bytes(|| Stats::of(&mut reader, &mut |_| {}).unwrap())
    };
    let middle = at("middle.pgtrace");
    written(&middle, 1000);
    let ((_, small), (found, large)) = (stats(&short), stats(&middle));
    assert_eq!(found.tokens, 1000);
    assert!(large < 32 * MIB && large < small + 65536, "{small} and {large} bytes");
    let mut reader = Reader::open(&long).unwrap();
    let copy = at("copy.pgtrace");
    let (_, copying) = peak_bytes(|| export::own(&mut reader, &copy, &mut |_| {}).unwrap());
    assert!(copying < 2 * MIB, "{copying} bytes");
    assert_eq!(fs::metadata(copy).unwrap().len(), sizes.1);
}

/// The largest shape that a header may have: a table of transitions for each
/// of its layers would be a gigabyte.
#[test]
fn statistics_of_the_largest_shape_are_bounded() {
    let header = Header { shape: Shape::uniform(4096, 256, 1, 0), ..Header::default() };
    let mut trace = MemoryTrace::new(header, vec![Row::default()]);
    (0..4096).for_each(|_| trace.rows[0].push_layer(&[7], &[]));
    let (stats, peak) = peak_bytes(|| Stats::of(&mut trace, &mut |_| {}).unwrap());
    assert_eq!((stats.layers.len(), stats.accesses), (4096, 4096));
    assert!(peak < 256 * MIB, "{peak} bytes");
}

#[test]
fn tables_and_lines_are_read_a_piece_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut trace = MemoryTrace::new(header(), (0..300).map(row).collect());
    let create = |name: &str| BufWriter::new(File::create(at(name)).unwrap());
    export::csv(&mut trace, &at("t.csv"), create("t.csv"), &mut |_| {}).unwrap();
    export::jsonl(&mut trace, &at("t.jsonl"), create("t.jsonl"), &mut |_| {}).unwrap();
    for name in ["t.csv", "t.jsonl"] {
        assert!(fs::metadata(at(name)).unwrap().len() > MIB as u64, "{name}");
        let (tokens, peak) = peak_bytes(|| match name {
            "t.csv" => all(&mut csv::open(&at(name), &Hints::default()).unwrap()),
            _ => all(&mut jsonl::open(&at(name)).unwrap()),
        });
        assert_eq!(tokens, 300);
        assert!(peak < MIB, "{name}: {peak} bytes");
    }
}

/// Answers are held whole: a few times the file, whatever is in it.
#[test]
fn answers_take_a_few_times_their_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers.json");
    let many = |what: &str, count: usize| vec![what; count].join(",");
    let choices = many(r#"{"routed_experts":[[[5,6]]],"token_ids":[1]}"#, 2000);
    let (prompt, ids) = (many("[[1,2]]", 20_000), many("7", 20_000));
    for text in [
        // Each choice with a copy of the prompt would be 240 MB.
        format!(
            r#"{{"prompt_routed_experts":[{prompt}],"prompt_token_ids":[{ids}],"choices":[{choices}]}}"#
        ),
        format!(r#"{{"routed_experts":[{}]}}"#, many("[]", 300_000)),
        format!(r#"{{"routed_experts":[[[{}]]]}}"#, many("0", 300_000)),
        format!(r#"{{"choices":[{}]}}"#, many("{}", 300_000)),
        format!(r#"{{"else":[{}]}}"#, many("[]", 300_000)),
        format!("[{}]", many("{}", 300_000)),
    ] {
        File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        let (_, peak) = peak_bytes(|| responses::open(&path, &Hints::default()).is_ok());
        // The text, at most twice while it is read, and numbers of 16 bits or
        // ids of 32 for two characters each.
        assert!(peak < 6 * text.len() + MIB, "{peak} bytes for {}: {}", text.len(), &text[..60]);
    }
}

/// A manifest of one layer of four experts, with what `rest` says.
fn manifest(path: &Path, tokens: usize, rest: &str) {
    let text = format!(
        r#"{{"format":"rtrace-1","tokens":{tokens},"layers":1,"top_k":1,"experts":4,{rest}}}"#
    );
    fs::write(path, text).unwrap();
    fs::write(path.with_extension("ids.u8"), vec![1; tokens]).unwrap();
}

/// As many sequences as are allowed, with labels that no header has room for.
#[test]
fn a_manifest_of_many_sequences_takes_less_than_64_mib() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let many = |count: usize| {
        let entry = |start| format!(r#"{{"start":{start},"len":1,"dataset":"a","category":"b"}}"#);
        let all: Vec<String> = (0..count).map(entry).collect();
        manifest(&at("t.json"), count, &format!(r#""sequences":[{}]"#, all.join(",")));
    };
    const MOST: usize = 1 << 18;
    many(MOST);
    let (exported, peak) = peak_bytes(|| {
        let mut trace = rtrace::open(&at("t.json")).unwrap();
        assert_eq!((all(&mut trace), trace.sequences().len()), (MOST as u64, MOST));
        export::own(&mut trace, &at("t.pgtrace"), &mut |_| {}).unwrap()
    });
    assert!(peak < 40 * MIB, "{peak} bytes");
    assert!(exported.left_out[0].contains("labels, which are too many"), "{exported:?}");
    let mut own = Reader::open(&at("t.pgtrace")).unwrap();
    assert_eq!((all(&mut own), own.sequences().len()), (MOST as u64, 0));
    let (exported, peak) = peak_bytes(|| {
        let mut trace = rtrace::open(&at("t.json")).unwrap();
        export::rtrace(&mut trace, &at("back.json"), &mut |_| {}).unwrap()
    });
    assert!(peak < 40 * MIB && exported.left_out.is_empty(), "{peak} bytes, {exported:?}");
    let back = rtrace::open(&at("back.json")).unwrap();
    assert_eq!(back.sequences(), rtrace::open(&at("t.json")).unwrap().sequences());
    many(MOST + 1);
    let refused = rtrace::open(&at("t.json")).unwrap_err().to_string();
    assert!(refused.contains("more than 262144 sequences"), "{refused}");
}

#[test]
fn no_field_of_a_manifest_takes_many_times_its_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    let many = |what: &str, count: usize| vec![what; count].join(",");
    let digests: Vec<String> = (0..300_000).map(|n| format!(r#""{n}":"""#)).collect();
    for (rest, message) in [
        (format!(r#""moe_layers":[{}]"#, many("1", 2_000_000)), "more than 4096 layers"),
        (format!(r#""sequences":[[{}]]"#, many("1", 2_000_000)), "a sequence: [start, len]"),
        (format!(r#""sha256":{{{}}}"#, digests.join(",")), "more than 16 digests"),
        (format!(r#""else":[{}]"#, many("[]", 2_000_000)), ""),
    ] {
        manifest(&path, 1, &rest);
        let (opened, peak) = peak_bytes(|| rtrace::open(&path).map(drop));
        assert!(peak < MIB, "{peak} bytes: {}", &rest[..40]);
        let told = opened.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(told.contains(message), "{told}");
    }
    fs::write(&path, vec![b' '; (24 << 20) + 1]).unwrap();
    assert!(rtrace::open(&path).unwrap_err().to_string().contains("are allowed"));
}
