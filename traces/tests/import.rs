//! Traces of other programs, in and out.

use pregate_predictor::{LayerShape, Origin, Shape};
use pregate_traces::export::Exported;
use pregate_traces::format::{Dropped, Writer};
use pregate_traces::import::{Hints, csv, responses};
use pregate_traces::replay::MemoryTrace;
use pregate_traces::replay::count::Count;
use pregate_traces::{
    Header, LayerServed, Provenance, Row, Source, TraceError, export, open, open_any,
};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempDir};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../predictor/tests/data").join(name)
}

fn file(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

fn rows(source: &mut dyn Source) -> Vec<Row> {
    let mut all = Vec::new();
    let mut row = Row::default();
    source.rewind().unwrap();
    while source.next(&mut row).unwrap() {
        all.push(row.clone());
    }
    all
}

fn table(text: &str, hints: &Hints) -> Result<Vec<Row>, TraceError> {
    let file = file(text);
    let mut table = csv::open(file.path(), hints)?;
    let mut all = Vec::new();
    let mut row = Row::default();
    while table.next(&mut row)? {
        all.push(row.clone());
    }
    assert_eq!(rows(&mut table), all, "twice the same");
    Ok(all)
}

/// The hand-checked example: 30 accesses, 12 hits.
#[test]
fn the_toy_is_read_and_counted() {
    let mut toy = csv::open(&data("conformance_toy/events.csv"), &Hints::default()).unwrap();
    let shape = &toy.header().shape;
    assert_eq!((shape.layers.len(), shape.layer(0).unwrap().experts), (3, 4));
    let all = rows(&mut toy);
    assert_eq!((all.len(), all[3].experts(1)), (5, &[0, 3][..]));
    assert!(all[0].starts_sequence && !all[1].starts_sequence);
    assert!(all.iter().all(|row| row.pass_tokens == 1 && !row.is_prompt));
    let hits = Count { slots: &[2; 3], warm_up: 0 }.lru(&mut toy).unwrap();
    assert_eq!((hits.requests, hits.hits), (30, 12));
}

/// As BigMoeOnEdge writes it: a prompt of two tokens layer by layer, a decoded
/// token, another turn.
#[test]
fn a_prompt_layer_by_layer() {
    let text = "# route_trace v1
# model=x arch=qwen3moe n_layer=4 n_expert=8 n_expert_used=2
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,prefill,0,1,0,3,0.75,miss,10
0,prefill,0,1,1,2,0.25,hit,10
0,prefill,1,1,0,5,0.5,miss,10
0,prefill,1,1,1,4,0.5,miss,10
0,prefill,0,2,0,1,0.5,miss,10
0,prefill,0,2,1,0,0.5,miss,10
0,prefill,1,2,1,6,0.25,miss,10
0,prefill,1,2,0,7,0.75,miss,10
0,decode,2,1,0,1,0.5,miss,10
0,decode,2,1,1,2,0.5,miss,10
0,decode,2,2,0,3,0.5,miss,10
0,decode,2,2,1,4,0.5,miss,10
1,decode,3,1,0,1,0.5,miss,10
1,decode,3,1,1,2,0.5,miss,10
1,decode,3,2,0,3,0.5,miss,10
1,decode,3,2,1,4,0.5,miss,10
";
    let all = table(text, &Hints::default()).unwrap();
    let said = |row: &Row| (row.starts_sequence, row.pass_tokens, row.is_prompt, row.position);
    let wanted =
        [(true, 2, true, 0), (false, 0, true, 1), (false, 1, false, 2), (true, 1, false, 0)];
    assert_eq!(all.iter().map(said).collect::<Vec<_>>(), wanted);
    assert_eq!((all[0].layers(), all[0].experts(0)), (4, &[][..]));
    assert_eq!((all[0].experts(1), all[0].weights(1)), (&[3, 2][..], &[0.75, 0.25][..]));
    assert_eq!((all[1].experts(2), all[1].weights(2)), (&[7, 6][..], &[0.75, 0.25][..]));
    assert_eq!(all[2].experts(2), [3, 4]);
}

#[test]
fn a_prompt_token_by_token_is_a_chunk() {
    let mut text = "turn,phase,step,layer,expert\n".to_string();
    let mut token = |turn: u32, phase: &str, step: usize| {
        (0..2).for_each(|layer| {
            text += &format!("{turn},{phase},{step},{layer},{}\n", step % 8);
        });
    };
    (0..600).for_each(|step| token(0, "prefill", step));
    (600..602).for_each(|step| token(0, "decode", step));
    (0..3).for_each(|step| token(1, "prefill", step));
    token(2, "prefill", 0);
    let all = table(&text, &Hints::default()).unwrap();
    assert_eq!(all.len(), 606);
    let passes: Vec<_> = (0..all.len()).filter(|&at| all[at].pass_tokens > 0).collect();
    let said = |&at: &usize| {
        let row = &all[at];
        (at, row.pass_tokens, row.is_prompt, row.starts_sequence, row.position)
    };
    assert_eq!(
        passes.iter().map(said).collect::<Vec<_>>(),
        [
            (0, 512, true, true, 0),
            (512, 88, true, false, 512),
            (600, 1, false, false, 600),
            (601, 1, false, false, 601),
            (602, 3, true, true, 0),
            (605, 1, true, true, 0),
        ]
    );
    assert!(all[..600].iter().all(|row| row.is_prompt));
    let experts = |at: usize| (all[at].experts(0), all[at].experts(1));
    assert_eq!(experts(511), (&[7][..], &[7][..]));
    assert_eq!(experts(601), (&[1][..], &[1][..]));
}

#[test]
fn order_alone_tells_tokens_apart() {
    // llama.cpp's moe-trace: three tokens of a prompt, then one.
    let text = "layer,expert\n0,1\n0,2\n0,3\n0,4\n0,5\n0,6\n1,6\n1,5\n1,4\n1,3\n1,2\n1,1\n0,7\n0,0\n1,1\n1,2\n";
    let all = table(text, &Hints { top_k: Some(2), ..Hints::default() }).unwrap();
    assert_eq!(all.iter().map(|row| row.pass_tokens).collect::<Vec<_>>(), [3, 0, 0, 1]);
    assert_eq!((all[1].experts(0), all[1].experts(1)), (&[3, 4][..], &[4, 3][..]));
    assert_eq!(all[3].experts(0), [7, 0]);
    assert!(table(text, &Hints::default()).is_err(), "nobody says the top-k");
}

/// Lists as Python's csv, pandas and numpy write them into one cell.
#[test]
fn a_list_in_one_cell_keeps_all_of_its_experts() {
    let lists = [
        "token,layer,experts,weights\n0,0,\"[0, 1, 5]\",\"[0.5, 0.25, 0.125]\"\n",
        "token,layer,experts,weights\n0,0,\"0,1,5\",\"0.5,0.25,0.125\"\r\n",
        "token,text,layer,experts,weights\n0,5\" disk,0,0 1 5,0.5;0.25;0.125\n",
        "token,layer,experts,weights\n0, 0, \"(0, 1, 5)\" , \"(0.5, 0.25, 0.125)\",\n",
        "token\tlayer\texperts\tweights\n0\t0\t[0, 1, 5]\t[0.5, 0.25, 0.125]\n",
        // The column of pandas' index has no name, and a cell may be empty.
        "\tlayer\texperts\tweights\n\t0\t[0 1 5]\t[0.5 0.25 0.125]\n",
        "\"a \"\"b\"\",c\",\"layer\",\"experts\",w\n\"x,\"\"y\",0,0|1|5,\"0.5,0.25,0.125\"\n",
    ];
    for text in lists {
        let all = table(text, &Hints { top_k: Some(3), ..Hints::default() }).unwrap();
        assert_eq!(all.len(), 1, "{text}");
        assert_eq!(all[0].experts(0), [0, 1, 5], "{text}");
        assert_eq!(all[0].weights(0), [0.5, 0.25, 0.125], "{text}");
    }
}

#[test]
fn tables_that_are_wrong_name_their_line() {
    let error = |text: &str| table(text, &Hints::default()).unwrap_err().to_string();
    for (text, message) in [
        ("", "no line with the names"),
        ("a,b\n1,2\n", "no column of the Layer"),
        ("token,layer\n1,2\n", "no column of the Expert"),
        ("token,layer,expert\n", "no lines"),
        ("token;layer;expert\n0;0;1\n", "separated by commas or tabs"),
        ("token,layer,experts\n0,0,[0, 1]\n", "line 2: \"1]\" is behind the last of 3 columns"),
        ("token,layer,experts\n0,0,\"[0,\n1]\"\n", "line 2: a quote that is not closed"),
        ("token,layer,experts,w\n0,0,0 1,0.5 0.5 0.5\n", "more weights than the 2 experts"),
        ("token,layer,expert\n0,0,1\n0,x,1\n", "line 3: the layer \"x\""),
        ("token,layer,expert\n0,0,65536\n", "line 2: the expert \"65536\""),
        ("token,layer,expert\n0,4096,1\n", "line 2: the layer \"4096\""),
        ("token,layer,expert\n0,0,-1\n", "line 2: the expert \"-1\""),
        ("token,layer,expert\n0,0\n", "line 2: no expert"),
        ("layer,rank,expert\n0,18446744073709551615,1 2\n", "the rank"),
        ("# n_expert=1000000000000\ntoken,layer,expert\n0,0,1\n", "1000000000000 experts"),
        ("# n_layer=2\ntoken,layer,expert\n0,2,1\n", "2 layers, and layer 2 chose experts"),
        ("token,layer,expert,weight\n0,0,1,0.5\n0,0,2,\n", "expert 2 has no weight"),
        ("token,layer,expert,weight\n0,0,1,inf\n", "the weight \"inf\""),
        ("token,layer,expert\n0,0,1\n0,0,1\n", "expert 1 twice"),
        ("# n_expert=4\ntoken,layer,expert\n0,0,4\n", "4 experts, top-1, and expert 4"),
    ] {
        let found = error(text);
        assert!(found.contains(message), "{text:?}: {found}");
    }
    let path = NamedTempFile::new().unwrap();
    fs::write(path.path(), b"token,layer,expert\n0,0,1\n0,\xff,1\n").unwrap();
    let found = csv::open(path.path(), &Hints::default()).err().unwrap().to_string();
    assert!(found.contains("line 3: byte 2 of the line is not UTF-8"), "{found}");
}

/// Ids of a prompt's tokens, an empty one where there is none, and a label.
#[test]
fn a_table_keeps_ids_of_a_chunk_and_its_label() {
    let text = "# synthetic_seed=9
# synthetic_from=\"a b=c\\nd\"
phase,token,token_id,layer,expert
prompt,0,70,0,1
prompt,1,71,0,2
prompt,2,,0,2
prompt,0,70,1,1
prompt,1,71,1,2
prompt,2,,1,2
decode,3,-1,0,1
decode,3,-1,1,1
";
    let all = table(text, &Hints::default()).unwrap();
    assert_eq!(
        all.iter().map(|row| row.token).collect::<Vec<_>>(),
        [Some(70), Some(71), None, None]
    );
    assert_eq!(all[0].pass_tokens, 3);
    let table = csv::open(file(text).path(), &Hints::default()).unwrap();
    let from = "a b=c\nd".to_string();
    assert_eq!(table.header().source, Provenance::Synthetic { from, seed: 9 });
}

/// Arrays as numpy saved them: layer 0 all zero, then [t, 9 - t] and
/// [(t + 3) % 10, (t + 7) % 10] for five tokens.
const NPY: &str = "k05VTVBZAQB2AHsnZGVzY3InOiAnfHUxJywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZSwgJ3NoYXBlJzogKDUsIDMsIDIpLCB9ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAoAAAAJAwcAAAEIBAgAAAIHBQkAAAMGBgAAAAQFBwE=";
const FLAT: &str = "AAAAAAkAAAADAAAABwAAAAEAAAAIAAAABAAAAAgAAAACAAAABwAAAAUAAAAJAAAAAwAAAAYAAAAGAAAAAAAAAAQAAAAFAAAABwAAAAEAAAA=";
const WIDE: &str =
    "AAAAAAAACQADAAcAAAAAAAEACAAEAAgAAAAAAAIABwAFAAkAAAAAAAMABgAGAAAAAAAAAAQABQAHAAEA";

fn answers(text: &str, hints: &Hints) -> Result<Vec<Row>, TraceError> {
    let file = file(text);
    Ok(rows(&mut responses::open(file.path(), hints)?))
}

fn check(all: &[Row], dense: usize) {
    assert_eq!(all.len(), 5);
    for (token, row) in (0u16..).zip(all) {
        assert_eq!(row.layers(), dense + 2);
        assert!((0..dense).all(|layer| row.experts(layer).is_empty()));
        assert_eq!(row.experts(dense), [token, 9 - token]);
        assert_eq!(row.experts(dense + 1), [(token + 3) % 10, (token + 7) % 10]);
    }
}

#[test]
fn vllm_answers() {
    let text = format!(
        r#"{{"id":"cmpl-1","choices":[{{"index":0,"text":"x","token_ids":[4,5,6],"routed_experts":"{NPY}"}}],"usage":{{"prompt_tokens":3}},"prompt_token_ids":[1,2,3]}}"#
    );
    let all = answers(&format!("{text}\n{text}\n"), &Hints::default()).unwrap();
    check(&all[..5], 1);
    check(&all[5..], 1);
    let said = |row: &Row| (row.starts_sequence, row.pass_tokens, row.is_prompt, row.token);
    let found: Vec<_> = all[5..].iter().map(said).collect();
    assert_eq!(found[0], (true, 3, true, Some(1)));
    assert_eq!(found[2], (false, 0, true, Some(3)));
    assert_eq!(found[3], (false, 1, false, Some(4)));
    // The lists of older builds.
    let lists =
        r#"[{"prompt_routed_experts":[[[1,2]],[[3,4]]],"choices":[{"routed_experts":[[[5,6]]]}]}]"#;
    let all = answers(lists, &Hints::default()).unwrap();
    assert_eq!(all.iter().map(|row| row.pass_tokens).collect::<Vec<_>>(), [2, 0, 1]);
    assert_eq!(all[2].experts(0), [5, 6]);
}

#[test]
fn sglang_and_dynamo_answers() {
    let hints = Hints { layers: Some(2), top_k: Some(2), ..Hints::default() };
    let text =
        format!(r#"{{"text":"x","meta_info":{{"routed_experts":"{FLAT}","prompt_tokens":2}}}}"#);
    let all = answers(&text, &hints).unwrap();
    check(&all, 0);
    assert_eq!(all.iter().map(|row| row.pass_tokens).collect::<Vec<_>>(), [2, 0, 1, 1, 1]);
    let text = format!(r#"{{"choices":[{{"sgl_ext":{{"routed_experts":"{FLAT}"}}}}]}}"#);
    check(&answers(&text, &hints).unwrap(), 0);
    let error = answers(&text, &Hints::default()).unwrap_err().to_string();
    assert!(error.contains("--layers and --top-k"), "{error}");
    let text = format!(
        r#"{{"choices":[{{"routed_experts":{{"data":"{WIDE}","shape":[5,3,2],"dtype":"uint16","start":0}}}}]}}"#
    );
    check(&answers(&text, &Hints::default()).unwrap(), 1);
}

/// Dynamo leaves out what another answer has told.
#[test]
fn an_answer_that_begins_later_keeps_its_positions() {
    let text = format!(
        r#"{{"prompt_token_ids":[1,2,3,4,5,6,7],"choices":[{{"token_ids":[8,9],"routed_experts":{{"data":"{WIDE}","shape":[5,3,2],"dtype":"uint16","start":4}}}}],"usage":{{"prompt_tokens":7}}}}"#
    );
    let all = answers(&text, &Hints::default()).unwrap();
    check(&all, 1);
    let said = |row: &Row| (row.position, row.is_prompt, row.token.unwrap());
    let wanted = [(4, true, 5), (5, true, 6), (6, true, 7), (7, false, 8), (8, false, 9)];
    assert_eq!(all.iter().map(said).collect::<Vec<_>>(), wanted);
    assert!(all[0].starts_sequence && all[0].pass_tokens == 3);
}

#[test]
fn answers_that_are_wrong_are_refused() {
    let cut = &NPY[..40];
    for (text, message) in [
        ("".to_string(), "no routed_experts"),
        ("{".to_string(), "no JSON"),
        ("{}".to_string(), "no routed_experts"),
        (format!(r#"{{"routed_experts":"{cut}"}}"#), "within its head"),
        (r#"{"routed_experts":"!"}"#.to_string(), "base64"),
        (r#"{"routed_experts":7}"#.to_string(), "expected routed experts"),
        (r#"{"routed_experts":[[[1],[2]],[[1]]]}"#.to_string(), "different numbers of layers"),
        (r#"{"routed_experts":[[[70000]]]}"#.to_string(), "expert 70000"),
        (r#"{"routed_experts":[[]]}"#.to_string(), "or of none"),
        (r#"{"routed_experts":[[[]]]}"#.to_string(), "or of none"),
        // Twice the same expert: rows were cut where none begin.
        (
            "{}\n{\"routed_experts\":[[[1,2]],[[3,3]]]}".to_string(),
            "line 2: answer 1: token 1, layer 0 has expert 3 twice",
        ),
        (r#"{"choices":[{"routed_experts":[[[1,0,0]]]}]}"#.to_string(), "expert 0 twice"),
        (r#"{"routed_experts":{"data":"AAAA","shape":[9223372036854775807,3,4]}}"#.to_string(), ""),
        (
            r#"{"routed_experts":{"data":"AAAAAA==","shape":[2,1,1]}}"#.to_string(),
            "1 ids in the shape",
        ),
    ] {
        let found = answers(&text, &Hints::default()).expect_err(&text).to_string();
        assert!(found.contains(message), "{text}: {found}");
    }
    let path = NamedTempFile::new().unwrap();
    fs::write(path.path(), b"{\"text\":\"\xff\"}").unwrap();
    let found = responses::open(path.path(), &Hints::default()).err().unwrap().to_string();
    assert!(found.contains("byte 9: not UTF-8"), "{found}");
    // A layer that was not computed for a token is all zero.
    let all = answers(r#"{"routed_experts":[[[1,2]],[[0,0]]]}"#, &Hints::default()).unwrap();
    assert_eq!((all[0].experts(0), all[1].experts(0)), (&[1, 2][..], &[][..]));
    // What the command line says is not passed over.
    let hints = Hints { layers: Some(2), ..Hints::default() };
    let error = answers(r#"{"routed_experts":[[[1,2]]]}"#, &hints).unwrap_err().to_string();
    assert!(error.contains("1 layers and top-2") && error.contains("say 2 and 2"), "{error}");
    // Flat ids cut into rows of another length.
    let hints = Hints { layers: Some(4), top_k: Some(5), ..Hints::default() };
    let error = answers(&format!(r#"{{"routed_experts":"{FLAT}"}}"#), &hints).unwrap_err();
    assert!(error.to_string().contains("--layers counts dense ones too"), "{error}");
    // A hole is not an expert.
    let all = answers(r#"{"routed_experts":[[[1,-1]]]}"#, &Hints::default()).unwrap();
    assert_eq!(all[0].experts(0), [1]);
}

#[test]
fn what_goes_out_comes_back() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut cut = open(&data("gptoss20b/cut.json")).unwrap();
    let wanted = rows(cut.as_mut());
    let mut last = 0;
    let tokens = export::own(cut.as_mut(), &at("a.pgtrace"), &mut |done| last = done).unwrap();
    assert_eq!((tokens, last), (Exported { tokens: 313, left_out: Vec::new() }, 313));
    let mut own = open(&at("a.pgtrace")).unwrap();
    assert_eq!(rows(own.as_mut()), wanted);
    assert_eq!(own.header().source, Provenance::Imported { format: "rtrace-1".into() });
    export::rtrace(own.as_mut(), &at("b.json"), &mut |_| {}).unwrap();
    for extension in ["ids.u8", "tok.u32"] {
        let found = fs::read(at("b.json").with_extension(extension)).unwrap();
        let source = fs::read(data("gptoss20b/cut.json").with_extension(extension)).unwrap();
        assert_eq!(found, source, "{extension}");
    }
    pregate_traces::import::rtrace::open(&at("b.json")).unwrap().verify().unwrap();
    let mut text = Vec::new();
    export::csv(own.as_mut(), &at("c.csv"), &mut text, &mut |_| {}).unwrap();
    fs::write(at("c.csv"), text).unwrap();
    let mut table = csv::open(&at("c.csv"), &Hints::default()).unwrap();
    assert_eq!(table.header().shape, own.header().shape);
    assert_eq!(rows(&mut table), wanted);
    let mut text = Vec::new();
    export::jsonl(own.as_mut(), &at("d.jsonl"), &mut text, &mut |_| {}).unwrap();
    let lines: Vec<serde_json::Value> = String::from_utf8(text)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!((lines.len(), &lines[0]["format"]), (314, &"pregate-trace-jsonl-1".into()));
    assert_eq!(lines[1]["experts"][0], serde_json::json!(wanted[0].experts(0)));
}

/// Everything that a row can hold, with a gap.
fn everything(path: &Path) -> Vec<Row> {
    let layer = LayerShape { experts: 9, top_k: 2, expert_bytes: 7, class: 1 };
    let header = Header {
        model: "m".into(),
        fingerprint: Some([9; 32]),
        shape: Shape { layers: vec![Some(layer), None, Some(layer)] },
        source: Provenance::Synthetic { from: "a\nb".into(), seed: u64::MAX },
    };
    let mut writer = Writer::new(fs::File::create(path).unwrap(), &header, &[]).unwrap();
    let mut all = Vec::new();
    for (position, pass_tokens) in [(0, 2), (1, 0), (2, 1), (7, 1)] {
        let mut row = Row::default();
        (row.position, row.pass_tokens) = (position, pass_tokens);
        (row.starts_sequence, row.is_prompt) = (position % 7 == 0, position < 2);
        row.token = (position < 7).then_some(50 + position);
        let first = position as u16;
        row.push_layer(&[first, first + 1], &[0.75, 0.1 + 0.000_1]);
        row.push_layer(&[], &[]);
        row.push_layer(&[8], &[0.5]);
        if pass_tokens == 2 {
            row.served = vec![LayerServed {
                layer: 2,
                origins: vec![(8, Origin::InFlight), (3, Origin::Hit)],
                evictions: 1,
                bytes: u64::MAX,
                stall_ns: 5,
            }];
        }
        if position == 7 {
            writer.gap(Dropped { passes: 3, tokens: 4 }).unwrap();
        }
        writer.push(&row).unwrap();
        all.push(row);
    }
    writer.finish().unwrap();
    all
}

#[test]
fn json_lines_hold_everything() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    everything(&at("a.pgtrace"));
    let mut own = open(&at("a.pgtrace")).unwrap();
    let wanted = rows(own.as_mut());
    let mut text = Vec::new();
    export::jsonl(own.as_mut(), &at("a.jsonl"), &mut text, &mut |_| {}).unwrap();
    fs::write(at("a.jsonl"), &text).unwrap();
    let mut lines = open(&at("a.jsonl")).unwrap();
    assert_eq!(lines.header(), own.header());
    assert_eq!((rows(lines.as_mut()), lines.dropped()), (wanted, own.dropped()));
    export::own(lines.as_mut(), &at("b.pgtrace"), &mut |_| {}).unwrap();
    assert_eq!(fs::read(at("a.pgtrace")).unwrap(), fs::read(at("b.pgtrace")).unwrap());

    let text = String::from_utf8(text).unwrap();
    for (from, to, message) in [
        ("[0,1]", "[0,0]", "line 2: layer 0 of 9 experts"),
        ("[0,1]", "[0,9]", "line 2: layer 0 of 9 experts"),
        ("[0,1]", "[0]", "2 weights of 1 experts"),
        ("0.75", "1e9", "the weight 1000000000"),
        ("[8,\"InFlight\"]", "[8,\"Lost\"]", "unknown variant `Lost`"),
        ("\"experts\":9", "\"experts\":65535", "line 1: layer 0 has 65535 experts"),
        ("[],[8]]", "[8]]", "line 2: experts of 2 layers"),
        ("\"position\":0", "\"position\":-1", "line 2: not a line of pregate-trace-jsonl-1"),
    ] {
        assert!(text.contains(from), "{from}: {text}");
        fs::write(at("bad.jsonl"), text.replacen(from, to, 1)).unwrap();
        let mut row = Row::default();
        let read = open(&at("bad.jsonl")).and_then(|mut lines| lines.next(&mut row));
        let error = read.err().unwrap_or_else(|| panic!("{to} was read")).to_string();
        assert!(error.contains(message), "{to}: {error}");
    }
}

/// rtrace-1 has weights of all tokens or of none.
#[test]
fn weights_and_labels_go_out_and_come_back() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let wanted = everything(&at("a.pgtrace"));
    let mut own = open(&at("a.pgtrace")).unwrap();
    // What an older export left there does not become a part of this one.
    fs::write(at("b.tok.u32"), [0; 16]).unwrap();
    let exported = export::rtrace(own.as_mut(), &at("b.json"), &mut |_| {}).unwrap();
    assert_eq!(exported.tokens, 4);
    assert!(exported.left_out.len() == 2 && exported.left_out[0].contains("token ids"));
    assert!(exported.left_out[0].contains("token 3"), "{exported:?}");
    assert!(!at("b.tok.u32").exists() && at("b.w.f16").exists());
    let mut back = open(&at("b.json")).unwrap();
    back.verify().unwrap();
    assert_eq!(back.header().source, own.header().source, "SYNTHETIC");
    for (row, wanted) in rows(back.as_mut()).iter().zip(&wanted) {
        assert_eq!((row.experts(0), row.experts(2)), (wanted.experts(0), wanted.experts(2)));
        let half = |weight: &f32| half::f16::from_f32(*weight).to_f32();
        let halves: Vec<f32> = wanted.weights(0).iter().map(half).collect();
        assert_eq!((row.weights(0), row.weights(2)), (&halves[..], wanted.weights(2)));
        assert_eq!(row.token, None);
    }
    let mut text = Vec::new();
    export::csv(own.as_mut(), &at("c.csv"), &mut text, &mut |_| {}).unwrap();
    fs::write(at("c.csv"), text).unwrap();
    let mut table = csv::open(&at("c.csv"), &Hints::default()).unwrap();
    assert_eq!(table.header().source, own.header().source, "SYNTHETIC");
    for (row, wanted) in rows(&mut table).iter().zip(&rows(own.as_mut())) {
        assert_eq!((row.token, row.weights(0)), (wanted.token, wanted.weights(0)));
    }

    // Weights from the second token on.
    let header = Header { shape: Shape::uniform(1, 4, 1, 0), ..Header::default() };
    let mut late = MemoryTrace::new(header, Vec::new());
    for weights in [&[][..], &[0.5]] {
        let mut row = Row::default();
        (row.pass_tokens, row.starts_sequence) = (1, weights.is_empty());
        row.push_layer(&[1], weights);
        late.rows.push(row);
    }
    let exported = export::rtrace(&mut late, &at("d.json"), &mut |_| {}).unwrap();
    assert!(exported.left_out[0].contains("weights: some tokens have them"), "{exported:?}");
    late.rows.reverse();
    let exported = export::rtrace(&mut late, &at("d.json"), &mut |_| {}).unwrap();
    assert!(exported.left_out[0].contains("such as token 1"), "{exported:?}");
    assert!(!at("d.w.f16").exists());
    assert!(
        rows(open(&at("d.json")).unwrap().as_mut()).iter().all(|row| row.weights(0).is_empty())
    );
    late.rows[0].push_layer(&[], &[]);
    let mut wide = Row::default();
    wide.push_layer(&[1, 2], &[]);
    late.rows[1] = wide;
    let error = export::rtrace(&mut late, &at("d.json"), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("token 1, layer 0 has 2 experts"), "{error}");
}

#[test]
fn a_file_is_known_by_what_is_in_it() {
    let folder = TempDir::new().unwrap();
    // As moe-cache-eval writes it, with what it knows of the model.
    let manifest = r#"{"status":"complete","model":{"num_layers":4,"num_experts_per_layer":6},"scheduler_steps":5,"policy":"lru"}"#;
    fs::write(folder.path().join("manifest.json"), manifest).unwrap();
    fs::copy(data("conformance_toy/events.csv"), folder.path().join("events.csv")).unwrap();
    let mut toy = open(&folder.path().join("manifest.json")).unwrap();
    let shape = &toy.header().shape;
    assert_eq!((shape.layers.len(), shape.layer(0).unwrap().experts), (4, 6));
    let hits = Count { slots: &[2; 4], warm_up: 0 }.lru(toy.as_mut()).unwrap();
    assert_eq!((hits.requests, hits.hits), (30, 12));
    let path = folder.path().join("x.json");
    let error = |text: &str, any: bool| {
        fs::write(&path, text).unwrap();
        let opened = if any { open_any(&path, &Hints::default()) } else { open(&path) };
        opened.err().unwrap_or_else(|| panic!("{text} was read")).to_string()
    };
    // The reader that the file is for says what is wrong.
    let answer = format!(r#"{{"meta_info":{{"routed_experts":"{FLAT}"}}}}"#);
    assert!(error(&answer, true).contains("pregate trace import needs --layers and --top-k"));
    assert!(error(r#"{"format":"rtrace-1","tokens":1}"#, true).contains("missing field `layers`"));
    assert!(error(r#"{"model":"x"}"#, true).contains("no routed_experts"));
    for text in [&*answer, "layer;expert\n0;1\n", "{\n\"a\""] {
        let told = error(text, false);
        assert!(told.contains("--form csv") && told.contains("--form responses"), "{told}");
    }
    let told = open(folder.path()).err().unwrap().to_string();
    assert!(told.contains("a folder"), "{told}");
    assert!(error("{\n\"a\"", true).contains("line 2"));
}

/// What a file says is not passed over, and not replaced by the command line.
#[test]
fn hints_are_applied_or_refused() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    everything(&at("a.pgtrace"));
    let mut own = open(&at("a.pgtrace")).unwrap();
    let mut text = Vec::new();
    export::jsonl(own.as_mut(), &at("a.jsonl"), &mut text, &mut |_| {}).unwrap();
    fs::write(at("a.jsonl"), text).unwrap();
    export::rtrace(own.as_mut(), &at("a.json"), &mut |_| {}).unwrap();
    let manifest = r#"{"model":{"num_layers":3,"num_experts_per_layer":9},"scheduler_steps":5}"#;
    fs::write(at("manifest.json"), manifest).unwrap();
    fs::write(at("events.csv"), "token,layer,expert\n0,0,1 2\n0,2,3 4\n").unwrap();
    let hints = |layers, experts, top_k| Hints { model: None, layers, experts, top_k };
    for name in ["a.pgtrace", "a.jsonl", "a.json", "manifest.json"] {
        let same = Hints { model: Some("other".into()), ..hints(Some(3), Some(9), Some(2)) };
        assert_eq!(open_any(&at(name), &same).unwrap().header().model, "other", "{name}");
        let kept = open_any(&at(name), &Hints::default()).unwrap().header().model.clone();
        assert_eq!(kept, if name == "manifest.json" { "" } else { "m" });
        let refused = |hints: Hints| {
            open_any(&at(name), &hints)
                .err()
                .unwrap_or_else(|| panic!("{name}: {hints:?}"))
                .to_string()
        };
        let told = refused(hints(Some(4), None, None));
        assert!(told.contains("--layers says 4, and the file has 3"), "{told}");
        let told = refused(hints(None, Some(8), None));
        assert!(told.contains("--experts says 8, and the file has 9"), "{told}");
    }
    let told = open_any(&at("a.pgtrace"), &hints(None, None, Some(3))).err().unwrap().to_string();
    assert!(told.contains("--top-k says 3, and the file has 2"), "{told}");
}

#[test]
fn a_table_that_ends_within_a_token_says_so() {
    let notice = |text: &str| {
        let file = file(text);
        let mut table = csv::open(file.path(), &Hints::default()).unwrap();
        rows(&mut table);
        assert_eq!(rows(&mut table).len(), 2);
        table.notice()
    };
    let whole = "token,layer,expert\n0,0,1\n0,1,1\n0,2,1\n1,0,1\n1,1,1\n1,2,1\n";
    assert_eq!(notice(whole), None);
    let told = notice(&whole[..whole.len() - 6]).unwrap();
    assert!(told.contains("the last token has 2 experts") && told.contains("cut off"), "{told}");
    // Others are no longer: this is how such tables are.
    assert_eq!(notice("token,layer,expert\n0,0,1\n1,0,1\n1,1,1\n"), None);
}

/// Of three tokens the second has no experts.
#[test]
fn what_a_table_has_no_place_for_is_said() {
    let layer = LayerShape { experts: 4, top_k: 1, expert_bytes: 7, class: 0 };
    let wide = LayerShape { experts: 5, ..layer };
    let trace = |second: LayerShape| {
        let shape = Shape { layers: vec![Some(layer), Some(second)] };
        let model = "m".into();
        let header = Header { model, fingerprint: Some([1; 32]), shape, ..Header::default() };
        let mut trace = MemoryTrace::new(header, Vec::new());
        for position in 0..3 {
            let mut row = Row::default();
            (row.position, row.pass_tokens) = (position, 1);
            row.starts_sequence = position == 0;
            (0..2).for_each(|_| row.push_layer(if position == 1 { &[] } else { &[2] }, &[]));
            trace.rows.push(row);
        }
        trace
    };
    let csv =
        |trace: &mut MemoryTrace| export::csv(trace, Path::new("t.csv"), Vec::new(), &mut |_| {});
    let exported = csv(&mut trace(layer)).unwrap();
    assert_eq!(exported.tokens, 2);
    let lost = "the model's name, the model's fingerprint, the experts' bytes";
    assert!(exported.left_out[0].contains("1 tokens without experts, such as token 1"));
    assert!(exported.left_out[1].contains(lost), "{exported:?}");
    let told = csv(&mut trace(wide)).unwrap_err().to_string();
    assert!(told.contains("layers of one kind"), "{told}");

    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let exported = export::rtrace(&mut trace(layer), &at("a.json"), &mut |_| {}).unwrap();
    assert_eq!((exported.tokens, exported.left_out.len()), (3, 1));
    assert!(exported.left_out[0].contains("fingerprint, the experts' bytes"), "{exported:?}");
    // Labels, which only .pgtrace and rtrace-1 have.
    let text = fs::read_to_string(at("a.json")).unwrap();
    fs::write(at("a.json"), text.replace("\"len\":3", "\"len\":3,\"dataset\":\"web\"")).unwrap();
    let mut labelled = open(&at("a.json")).unwrap();
    let lines = export::jsonl(labelled.as_mut(), &at("x"), Vec::new(), &mut |_| {}).unwrap();
    assert!(lines.left_out[0].contains("labels"), "{lines:?}");
    let own = export::own(labelled.as_mut(), &at("a.pgtrace"), &mut |_| {}).unwrap();
    assert!(own.left_out.is_empty());
    assert_eq!(open(&at("a.pgtrace")).unwrap().sequences()[0].dataset, "web");
}

/// What that takes is measured in `memory.rs`.
#[test]
fn choices_share_their_prompt() {
    let prompt = vec!["[[1,2]]"; 2000].join(",");
    let choices = [r#"{"routed_experts":[[[5,6]]]}"#; 3].join(",");
    let text = format!(r#"{{"prompt_routed_experts":[{prompt}],"choices":[{choices}]}}"#);
    let all = answers(&text, &Hints::default()).unwrap();
    assert_eq!(all.len(), 3 * 2001);
    assert_eq!((all[4001].experts(0), all[4002].experts(0)), (&[5, 6][..], &[1, 2][..]));
    assert_eq!((all[2000].experts(0), all[2000].pass_tokens), (&[5, 6][..], 1));
    assert_eq!((all[2001].pass_tokens, all[2001].starts_sequence), (2000, true));
}
