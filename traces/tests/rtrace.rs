//! The importer of rtrace-1 against files made here, bad ones among them, and
//! against the cut of a real trace.

use pregate_traces::{Row, Source, import::rtrace, open};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn cut() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../predictor/tests/data/gptoss20b/cut.json")
}

/// Three tokens, layers 1 and 2 of a model with a dense layer 0, top-2 of 4.
fn manifest() -> Value {
    json!({
        "format": "rtrace-1", "tokens": 3, "layers": 2, "top_k": 2, "experts": 4,
        "moe_layers": "1..2 (layer 0 is dense)", "model": "toy",
        "sequences": [{"start": 0, "len": 2, "dataset": "a", "repetition": true}, [2, 1]],
    })
}

const IDS: [u8; 12] = [0, 1, 2, 3, 3, 255, 1, 0, 2, 1, 0, 3];

struct Files {
    folder: TempDir,
}

impl Files {
    fn new(manifest: &Value, ids: &[u8]) -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("t.json"), manifest.to_string()).unwrap();
        fs::write(folder.path().join("t.ids.u8"), ids).unwrap();
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("t.json")
    }

    fn beside(&self, name: &str, bytes: &[u8]) {
        fs::write(self.folder.path().join(name), bytes).unwrap();
    }

    /// The first error, of opening or of reading to the end.
    fn error(&self) -> String {
        let mut row = Row::default();
        let read = || -> Result<(), pregate_traces::TraceError> {
            let mut trace = open(&self.path())?;
            while trace.next(&mut row)? {}
            Ok(())
        };
        let mut read = read;
        read().expect_err("a bad file").to_string()
    }
}

#[test]
fn rows_say_what_the_files_say() {
    let files = Files::new(&manifest(), &IDS);
    let weights = [0.5f32; 12].map(|weight| half::f16::from_f32(weight).to_le_bytes());
    files.beside("t.w.f16", &weights.concat());
    files.beside("t.tok.u32", &[7u32, 8, 9].map(u32::to_le_bytes).concat());
    let mut trace = rtrace::open(&files.path()).unwrap();
    assert_eq!(trace.header().shape.layers.len(), 3);
    assert!(trace.header().shape.layer(0).is_none());
    assert_eq!(trace.header().shape.layer(2).unwrap().experts, 4);
    assert_eq!(trace.header().shape.layer(2).unwrap().expert_bytes, 0);
    assert_eq!(trace.tokens(), Some(3));
    assert_eq!(trace.sequences()[0].dataset, "a");
    assert!(trace.sequences()[0].is_repetitive && !trace.sequences()[1].is_repetitive);
    let mut row = Row::default();
    for _ in 0..2 {
        assert!(trace.next(&mut row).unwrap());
        assert!(row.starts_sequence && row.pass_tokens == 1 && row.token == Some(7));
        assert_eq!((row.layers(), row.experts(0), row.experts(1)), (3, &[][..], &[0, 1][..]));
        assert!(trace.next(&mut row).unwrap());
        assert!(!row.starts_sequence && row.position == 1 && row.token == Some(8));
        assert_eq!((row.experts(1), row.experts(2)), (&[3][..], &[1, 0][..]));
        assert_eq!((row.weights(1), row.weights(2)), (&[0.5][..], &[0.5, 0.5][..]));
        assert!(trace.next(&mut row).unwrap());
        assert!(row.starts_sequence && row.position == 0);
        assert!(!trace.next(&mut row).unwrap());
        assert_eq!(row.layers(), 0);
        trace.rewind().unwrap();
    }
}

#[test]
fn the_files_of_a_trace_are_those_that_opening_reads() {
    let files = Files::new(&manifest(), &IDS);
    let at = |name: &str| files.folder.path().join(name);
    let named = |path: &Path| {
        let files = pregate_traces::files(path);
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
        files.iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(named(&files.path()), ["t.json", "t.ids.u8"]);
    files.beside("t.tok.u32", &[0; 12]);
    files.beside("t.w.f16", &[0; 24]);
    assert_eq!(named(&files.path()), ["t.json", "t.ids.u8", "t.w.f16", "t.tok.u32"]);
    // What others of that name read is only their own file.
    files.beside("t.jsonl", b"{\"format\": \"pregate-trace-jsonl-1\", \"layers\": []}");
    assert_eq!(named(&at("t.jsonl")), ["t.jsonl"]);
    assert_eq!(named(&at("t.nowhere")), ["t.nowhere"]);
    assert_eq!(named(&at(".")).len(), 1);
    files.beside("manifest.json", b"{\"scheduler_steps\": [], \"model\": {}}");
    assert_eq!(named(&at("manifest.json")), ["manifest.json"]);
    files.beside("events.csv", b"layer,expert\n");
    assert_eq!(named(&at("manifest.json")), ["manifest.json", "events.csv"]);
}

#[test]
fn tokens_between_sequences_are_a_sequence() {
    let mut manifest = manifest();
    manifest["sequences"] = json!([[1, 1]]);
    let files = Files::new(&manifest, &IDS);
    let mut trace = rtrace::open(&files.path()).unwrap();
    let mut row = Row::default();
    for _ in 0..3 {
        assert!(trace.next(&mut row).unwrap() && row.starts_sequence);
        assert_eq!(row.position, 0);
    }
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused() {
    let cases = [
        ("format", json!("rtrace-2"), "rtrace-2"),
        ("tokens", json!(4), "12 bytes; its manifest says 16"),
        ("tokens", json!(u64::MAX), "its manifest says"),
        ("tokens", json!(-1), "not rtrace-1"),
        ("layers", json!(0), "layers is 0"),
        ("layers", json!(u64::MAX), "layers is"),
        ("top_k", json!(5), "top_k is 5"),
        ("experts", json!(256), "experts is 256"),
        ("experts", json!(3), "expert 3 of 3"),
        ("moe_layers", json!("1..3"), "moe_layers names 3"),
        ("moe_layers", json!("0..18446744073709551615"), "moe_layers"),
        ("moe_layers", json!("18446744073709551614..18446744073709551615"), "moe_layers"),
        ("moe_layers", json!("all"), "such as 1..26"),
        ("moe_layers", json!([2, 1]), "moe_layers"),
        ("sequences", json!([[0, 4]]), "the sequence of 4 tokens"),
        ("sequences", json!([[0, 2], [1, 1]]), "the sequence of 1 tokens at 1"),
        ("sequences", json!([[u64::MAX, 2]]), "the sequence of 2"),
        ("sequences", json!([[0, 0]]), "the sequence of 0"),
        ("sequences", json!([["a", 0]]), "not rtrace-1"),
    ];
    for (field, value, message) in cases {
        let mut manifest = manifest();
        manifest[field] = value.clone();
        let error = Files::new(&manifest, &IDS).error();
        assert!(error.contains(message), "{field} = {value}: {error}");
    }
}

#[test]
fn bad_contents_name_their_place() {
    let mut ids = IDS;
    ids[6] = 4;
    let error = Files::new(&manifest(), &ids).error();
    assert!(error.contains("t.ids.u8: byte 6: token 1, layer 2: expert 4 of 4"), "{error}");
    ids[6] = 0;
    let error = Files::new(&manifest(), &ids).error();
    assert!(error.contains("expert 0 twice"), "{error}");
    let files = Files::new(&manifest(), &IDS);
    files.beside("t.w.f16", &half::f16::NAN.to_le_bytes().repeat(12));
    assert!(files.error().contains("weight NaN"));
    files.beside("t.w.f16", &[0; 23]);
    assert!(files.error().contains("23 bytes; its manifest says 24"));
    assert!(open(Path::new("/nowhere/t.json")).is_err());
    files.beside("t.json", b"");
    assert!(files.error().contains("not a trace"));
    files.beside("t.json", b"{\"format\":\"rtrace-1\",\n\"model\":\"\xff\"}");
    let found = files.error();
    assert!(found.contains("line 2: not rtrace-1") && found.contains("column 10"), "{found}");
}

#[test]
fn digests_are_checked_on_request() {
    let mut manifest = manifest();
    // Of the twelve bytes above, from another program (sha256sum).
    let digest = "d79471bc615f1617b21d9fe89588dc2d3d8b80874c21fea8d4bb9fd8b88d9de1";
    manifest["sha256"] = json!({ "t.ids.u8": digest });
    let files = Files::new(&manifest, &IDS);
    rtrace::open(&files.path()).unwrap().verify().unwrap();
    let mut ids = IDS;
    ids.swap(0, 1);
    files.beside("t.ids.u8", &ids);
    let error = rtrace::open(&files.path()).unwrap().verify().unwrap_err().to_string();
    assert!(error.contains("its manifest says"), "{error}");
    manifest["sha256"] = json!({ "../t.ids.u8": digest });
    let error = rtrace::open(&Files::new(&manifest, &IDS).path()).unwrap().verify().unwrap_err();
    assert!(error.to_string().contains("not a file of this trace"), "{error}");
}

#[test]
fn a_real_trace_is_read_to_its_end() {
    let mut trace = open(&cut()).unwrap();
    let mut row = Row::default();
    let (mut tokens, mut starts, mut sum) = (0, 0, 0u64);
    while trace.next(&mut row).unwrap() {
        tokens += 1;
        starts += u64::from(row.starts_sequence);
        assert_eq!(row.layers(), 24);
        let layer = |layer| row.experts(layer).iter().map(|&id| u64::from(id)).sum::<u64>();
        sum += (0..24).map(layer).sum::<u64>();
    }
    assert_eq!((Some(tokens), starts), (trace.tokens(), 2));
    // Of all bytes of the file of ids, none of which is 255 (Python).
    assert_eq!(sum, 462489);
}
