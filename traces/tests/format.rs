//! Trace files come back as they were written, and nothing that stands in a
//! file can do more than end in an error.

use pregate_predictor::{LayerShape, Origin, Shape};
use pregate_traces::export::{self, Exported};
use pregate_traces::format::{Dropped, Ending, Reader, Writer};
use pregate_traces::{
    Header, LayerServed, MAX_EXPERT_BYTES, Provenance, Row, Sequence, Source, TraceError,
};
use proptest::prelude::*;
use std::fs;
use std::path::Path;
use tempfile::NamedTempFile;

fn header(layers: Vec<Option<LayerShape>>) -> Header {
    Header {
        model: "a model".into(),
        fingerprint: Some([7; 32]),
        shape: Shape { layers },
        source: Provenance::Synthetic { from: "b".into(), seed: u64::MAX },
    }
}

/// A dense layer, and two kinds of others.
fn mixed() -> Header {
    let layer = |experts, top_k, class| {
        Some(LayerShape { experts, top_k, expert_bytes: MAX_EXPERT_BYTES, class })
    };
    header(vec![None, layer(33, 3, 0), layer(1, 1, 1), layer(33, 3, 0), layer(33, 3, 0)])
}

/// Distinct experts by `seed`, `count` of them.
fn experts(count: usize, of: usize, seed: u64) -> Vec<u16> {
    (0..count).map(|rank| ((seed as usize % of + rank) % of) as u16).collect()
}

/// A few rows that use every part of the format, by `seeds`.
fn rows(seeds: &[u64], header: &Header) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut left = 0;
    for (index, &seed) in seeds.iter().enumerate() {
        let mut row = Row::default();
        if left == 0 {
            row.starts_sequence = index == 0 || seed % 5 == 0;
            row.pass_tokens = 1 + (seed % 3) as u32;
            left = row.pass_tokens;
        }
        left -= 1;
        row.is_prompt = seed % 2 == 0;
        row.position = (seed >> 20) as u32 >> (seed % 32);
        row.token = (seed % 7 > 2).then_some(seed as u32);
        for layer in &header.shape.layers {
            let Some(layer) = layer else {
                row.push_layer(&[], &[]);
                continue;
            };
            let count =
                if seed % 11 == 0 { seed as usize % (layer.top_k + 1) } else { layer.top_k };
            let weights: Vec<f32> = (0..count).map(|rank| 0.25 * rank as f32).collect();
            let weights = if seed % 3 == 0 { &weights[..] } else { &[] };
            row.push_layer(&experts(count, layer.experts, seed), weights);
        }
        if row.pass_tokens > 0 && seed % 4 == 0 {
            for (layer, shape) in header.shape.moe().filter(|(layer, _)| seed >> layer & 1 == 0) {
                let origins = [Origin::Hit, Origin::Early, Origin::InFlight, Origin::Miss];
                let ids = experts(seed as usize % (shape.experts.min(5) + 1), shape.experts, seed);
                let origin = |(index, id)| (id, origins[(index + seed as usize) % 4]);
                row.served.push(LayerServed {
                    layer: layer as u32,
                    origins: ids.into_iter().enumerate().map(origin).collect(),
                    evictions: seed as u32 % 9,
                    bytes: seed,
                    stall_ns: seed >> 3,
                });
            }
        }
        rows.push(row);
    }
    // The last pass is whole.
    if let Some(start) = rows.iter().rposition(|row| row.pass_tokens > 0) {
        rows[start].pass_tokens -= left;
    }
    rows
}

fn written(header: &Header, rows: &[Row], ends: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes, header, &[]).unwrap();
    for (index, row) in rows.iter().enumerate() {
        writer.push(row).unwrap();
        if index % 50 == 49 {
            writer.flush().unwrap();
        }
    }
    match ends {
        true => drop(writer.finish().unwrap()),
        false => writer.flush().unwrap(),
    }
    bytes
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    file
}

/// All rows, checked against the header.
fn read(path: &Path) -> Result<(Vec<Row>, Reader), TraceError> {
    let mut reader = Reader::open(path)?;
    let mut rows = Vec::new();
    let mut row = Row::default();
    while reader.next(&mut row)? {
        let shape = &reader.header().shape;
        assert_eq!(row.layers(), shape.layers.len());
        for layer in 0..row.layers() {
            let count = shape.layer(layer).map_or(0, |shape| shape.experts);
            let mut ids = row.experts(layer).to_vec();
            ids.sort_unstable();
            assert!(ids.is_sorted_by(|a, b| a < b) && ids.iter().all(|&id| (id as usize) < count));
            assert!(row.weights(layer).iter().all(|weight| weight.is_finite()));
        }
        rows.push(row.clone());
    }
    assert_eq!(row.layers(), 0, "behind the end");
    Ok((rows, reader))
}

#[test]
fn everything_comes_back() {
    let header = mixed();
    let seeds: Vec<u64> =
        (0..2000u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (n % 40)).collect();
    let rows = rows(&seeds, &header);
    let file = file(&written(&header, &rows, true));
    let (found, mut reader) = read(file.path()).unwrap();
    assert_eq!(found, rows);
    assert_eq!(reader.header(), &header);
    assert_eq!((reader.tokens(), reader.ending()), (Some(2000), Some(Ending::Whole)));
    assert_eq!(reader.notice(), None);
    reader.rewind().unwrap();
    let mut row = Row::default();
    assert!(reader.next(&mut row).unwrap());
    assert_eq!(row, rows[0]);
    let mut opened = pregate_traces::open(file.path()).unwrap();
    assert!(opened.next(&mut row).unwrap() && row == rows[0]);
}

#[test]
fn an_id_takes_as_many_bits_as_its_layer_needs() {
    let shape = Shape::uniform(24, 32, 4, 0);
    let header = header(shape.layers);
    let row = |position| {
        let mut row = Row::default();
        (row.starts_sequence, row.pass_tokens, row.position) = (position == 0, 1, position);
        (0..24).for_each(|_| row.push_layer(&[31, 0, 5, 7], &[]));
        row
    };
    let one = written(&header, &[row(0)], true).len();
    let two = written(&header, &[row(0), row(1)], true).len();
    // Flags, the pass's length, 24 x 4 ids of 5 bits.
    assert_eq!(two - one, 2 + 60);
}

#[test]
fn a_cut_is_read_up_to_the_last_whole_block() {
    let header = mixed();
    let rows = rows(&(0..200).collect::<Vec<u64>>(), &header);
    let bytes = written(&header, &rows, true);
    let whole = read(file(&written(&header, &rows, false)).path()).unwrap();
    assert_eq!(whole.1.ending(), Some(Ending::CutOff), "not finished");
    assert_eq!(whole.0.len(), 200);
    let mut lengths = Vec::new();
    for cut in (bytes.len() - 4000..bytes.len()).step_by(13) {
        let (found, reader) = read(file(&bytes[..cut]).path()).unwrap();
        assert_eq!(found, rows[..found.len()]);
        assert_eq!((found.len() % 50, reader.ending()), (0, Some(Ending::CutOff)));
        assert_eq!(reader.tokens(), None);
        assert!(reader.notice().unwrap().contains(&format!("{} tokens", found.len())));
        lengths.push(found.len());
    }
    lengths.dedup();
    assert_eq!(lengths, [0, 50, 100, 150, 200][5 - lengths.len()..]);
    assert!(lengths.len() > 2);
}

/// Of two tokens, and the first of a pass of four, which was written in part.
fn cut_within_a_pass(header: &Header, gap: Dropped) -> Vec<u8> {
    let mut all = rows(&[5, 10, 15, 20], header);
    for (row, pass_tokens) in all.iter_mut().zip([1, 1, 4, 0]) {
        row.starts_sequence = pass_tokens == 1;
        (row.pass_tokens, row.served) = (pass_tokens, Vec::new());
    }
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes, header, &[]).unwrap();
    writer.push(&all[0]).unwrap();
    writer.gap(gap).unwrap();
    all[1..].iter().for_each(|row| writer.push(row).unwrap());
    writer.flush().unwrap();
    let within = writer.gap(gap).unwrap_err().to_string();
    assert!(within.contains("2 tokens of a pass are left"), "{within}");
    let alone = writer.push(&all[0]).unwrap_err().to_string();
    assert!(alone.contains("a pass of 1 tokens where 2 of another are left"), "{alone}");
    let error = writer.finish().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");
    bytes
}

#[test]
fn a_copy_of_a_recording_that_was_cut_off_can_be_read_and_says_what_is_missing() {
    let (header, gap) = (mixed(), Dropped { passes: 2, tokens: 300 });
    let cut = file(&cut_within_a_pass(&header, gap));
    let (found, mut reader) = read(cut.path()).unwrap();
    assert_eq!((found.len(), reader.ending()), (4, Some(Ending::CutOff)));
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let exported = export::own(&mut reader, &at("a.pgtrace"), &mut |_| {}).unwrap();
    assert_eq!(exported.tokens, 2);
    assert!(exported.left_out[0].contains("last 2 tokens"), "{exported:?}");
    let (copied, copy) = read(&at("a.pgtrace")).unwrap();
    assert_eq!((&copied[..], copy.ending()), (&found[..2], Some(Ending::Whole)));
    assert_eq!(copy.dropped(), gap, "gaps are copied");
    assert!(copy.notice().unwrap().contains("2 passes of 300 tokens"));
    // A whole file loses nothing, and one that is cut off between passes too.
    let mut bytes = written(&header, &found[..1], false);
    let export = |bytes: &[u8]| {
        let mut reader = Reader::open(file(bytes).path()).unwrap();
        export::own(&mut reader, &at("b.pgtrace"), &mut |_| {}).unwrap()
    };
    assert_eq!(export(&bytes), Exported { tokens: 1, left_out: Vec::new() });
    bytes = written(&header, &found[..1], true);
    assert_eq!(export(&bytes), Exported { tokens: 1, left_out: Vec::new() });
}

#[test]
fn a_row_of_the_largest_size_can_be_read_wherever_it_stands() {
    let layer = |experts| Some(LayerShape { experts, top_k: experts, expert_bytes: 0, class: 0 });
    let wide = |wide: usize| {
        let layers = (0..4096).map(|index| layer(if index < wide { 256 } else { 255 })).collect();
        let header = header(layers);
        let row = |position, is_full: bool| {
            let mut row = Row::default();
            (row.starts_sequence, row.pass_tokens, row.position) =
                (position < 1 << 31, 1, position);
            for layer in header.shape.layers.iter().flatten() {
                let ids = experts(if is_full { layer.experts } else { 0 }, layer.experts, 0);
                row.push_layer(&ids, &[]);
            }
            row
        };
        let rows = [row((1 << 31) - 1, false), row(1 << 31, true)];
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &header, &[]).unwrap();
        writer.push(&rows[0]).unwrap();
        writer.push(&rows[1]).map_err(|error| error.to_string())?;
        writer.finish().unwrap();
        assert_eq!(read(file(&bytes).path()).unwrap().0, rows);
        Ok::<(), String>(())
    };
    // 255 bytes of ids in each of 4096 layers, and one more in some; flags,
    // and the length of the pass.
    wide((1 << 20) - 5 - 2 - 4096 * 255).unwrap();
    let error = wide((1 << 20) - 2 - 4096 * 255).unwrap_err();
    assert!(error.contains("1048571 are allowed"), "{error}");
}

#[test]
fn gaps_are_counted_and_start_a_sequence() {
    let header = mixed();
    let mut rows = rows(&[5, 10, 15], &header);
    rows.iter_mut().for_each(|row| row.pass_tokens = 1);
    rows.iter_mut().for_each(|row| row.starts_sequence = true);
    let write = |rows: &[Row]| {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &header, &[]).unwrap();
        writer.push(&rows[0]).unwrap();
        writer.gap(Dropped { passes: 2, tokens: 300 }).unwrap();
        rows[1..].iter().for_each(|row| writer.push(row).unwrap());
        writer.finish().unwrap();
        file(&bytes)
    };
    let (found, reader) = read(write(&rows).path()).unwrap();
    assert_eq!(found, rows);
    assert_eq!(reader.dropped(), Dropped { passes: 2, tokens: 300 });
    assert!(reader.notice().unwrap().contains("2 passes of 300 tokens"));
    rows[1].starts_sequence = false;
    let error = read(write(&rows).path()).err().unwrap().to_string();
    assert!(error.contains("after a gap, start a sequence"), "{error}");
}

#[test]
fn labels_of_sequences_stay() {
    let label = Sequence { start: 3, tokens: 4, dataset: "d".into(), ..Sequence::default() };
    let mut bytes = Vec::new();
    Writer::new(&mut bytes, &mixed(), std::slice::from_ref(&label)).unwrap().finish().unwrap();
    assert_eq!(Reader::open(file(&bytes).path()).unwrap().sequences(), [label]);
}

#[test]
fn rows_that_break_the_header_are_not_written() {
    let header = mixed();
    let good = rows(&[1], &header).remove(0);
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes, &header, &[]).unwrap();
    let bad = |ids: [&[u16]; 5], weight: f32| {
        let mut row = Row::default();
        (row.starts_sequence, row.pass_tokens) = (true, 1);
        ids.iter().for_each(|ids| row.push_layer(ids, &vec![weight; ids.len()]));
        row
    };
    let served = |layer| {
        let mut row = good.clone();
        row.served = vec![LayerServed { layer, ..LayerServed::default() }; 2];
        row
    };
    let mut endless = good.clone();
    endless.pass_tokens = u32::MAX;
    let cases = [
        bad([&[], &[33], &[], &[], &[]], 0.0),
        bad([&[], &[4, 4], &[], &[], &[]], 0.0),
        bad([&[1], &[], &[], &[], &[]], 0.0),
        bad([&[], &[1], &[], &[], &[]], f32::NAN),
        bad([&[], &[1], &[], &[], &[]], 1e6),
        served(0),
        served(1),
        served(5),
        endless,
        Row::default(),
    ];
    for row in &cases {
        let error = writer.push(row).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{row:?}");
    }
    writer.push(&good).unwrap();
    writer.finish().unwrap();
    assert_eq!(read(file(&bytes).path()).unwrap().0, [good]);
}

/// A file with `json` for a header.
fn with_header(json: &str) -> NamedTempFile {
    let mut hash = crc32fast::Hasher::new();
    let numbers = [1u32, json.len() as u32].map(u32::to_le_bytes).concat();
    hash.update(&numbers);
    hash.update(json.as_bytes());
    let magic = b"\x89PGT\r\n\x1a\n";
    let checksum = hash.finalize().to_le_bytes();
    file(&[&magic[..], &numbers, &checksum, json.as_bytes()].concat())
}

#[test]
fn heads_that_lie_are_refused() {
    let bytes = written(&mixed(), &[], true);
    let error = |bytes: &[u8]| match Reader::open(file(bytes).path()) {
        Ok(_) => panic!("a bad head"),
        Err(error) => error.to_string(),
    };
    let with = |at: usize, number: u32| {
        let mut bytes = bytes.clone();
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    for (bytes, message) in [
        (vec![], "not a trace file"),
        (with(0, 7), "not a trace file"),
        (with(8, 2), "version 2; this pregate reads 1"),
        (with(12, u32::MAX), "a header of 4294967295 bytes"),
        (with(12, 16 << 20), "ends within its header"),
        (with(16, 7), "checksum"),
        (bytes[..19].to_vec(), "within its head"),
        (bytes[..40].to_vec(), "within its header"),
    ] {
        let error = error(&bytes);
        assert!(error.contains(message), "{error}");
    }
    let head = |layers: &str| {
        let json = format!(
            r#"{{"model":"","fingerprint":null,"provenance":"recorded","layers":[{layers}]}}"#
        );
        Reader::open(with_header(&json).path()).map(|_| ()).map_err(|error| error.to_string())
    };
    let layer = |count: &str, experts: &str, top_k: &str| {
        format!(
            r#"{{"count":{count},"experts":{experts},"top_k":{top_k},"expert_bytes":0,"class":0}}"#
        )
    };
    head(&layer("16", "65534", "65534")).unwrap();
    head(&layer("4096", "256", "8")).unwrap();
    let bytes =
        |bytes: u64| head(&layer("1", "2", "1").replace("bytes\":0", &format!("bytes\":{bytes}")));
    bytes(MAX_EXPERT_BYTES).unwrap();
    for bytes_too_many in [MAX_EXPERT_BYTES + 1, u64::MAX] {
        assert!(bytes(bytes_too_many).unwrap_err().contains("experts of"));
    }
    for (layers, message) in [
        (layer("4097", "2", "1"), "more than 4096 layers"),
        (layer("18446744073709551615", "2", "1"), "more than 4096 layers"),
        // Ids of 16 bits, of which one means none.
        (layer("1", "65535", "1"), "65535 experts"),
        (layer("1", "65536", "1"), "65536 experts"),
        // A few bytes that ask for gigabytes.
        (layer("17", "65534", "1"), "experts; 1048576 are allowed"),
        (layer("4096", "257", "1"), "experts; 1048576 are allowed"),
        (layer("1", "0", "0"), "0 experts"),
        (layer("1", "2", "3"), "top-3"),
        (layer("1", "-2", "3"), "the header"),
        (layer("1", "null", "3"), "half of a layer"),
    ] {
        let error = head(&layers).unwrap_err();
        assert!(error.contains(message), "{layers}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_rows_come_back(
        seeds in prop::collection::vec(any::<u64>(), 0..60),
        kinds in prop::collection::vec(prop::option::of((1usize..600, 1usize..9)), 0..6),
    ) {
        let layer = |(experts, top_k): (usize, usize)| {
            LayerShape { experts, top_k: top_k.min(experts), expert_bytes: 9, class: 0 }
        };
        let header = header(kinds.into_iter().map(|kind| kind.map(layer)).collect());
        let rows = rows(&seeds, &header);
        let found = read(file(&written(&header, &rows, true)).path()).unwrap();
        prop_assert_eq!(found.0, rows);
    }

    /// Changed bytes, with and without checksums made right again.
    #[test]
    fn changed_files_end_in_an_error_or_rows_of_the_model(
        seeds in prop::collection::vec(any::<u64>(), 1..40),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        mends in any::<bool>(),
    ) {
        let header = mixed();
        let rows = rows(&seeds, &header);
        let good = written(&header, &rows, true);
        let mut bytes = good.clone();
        let start = 20 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        for (place, value) in changes {
            let range = if mends { start + 16..bytes.len() - 40 } else { 0..bytes.len() };
            let at = range.start + place.index(range.len());
            bytes[at] = value;
        }
        if mends {
            let mut hash = crc32fast::Hasher::new();
            let length = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap());
            hash.update(&bytes[start..start + 12]);
            hash.update(&bytes[start + 16..start + 16 + length as usize]);
            bytes[start + 12..start + 16].copy_from_slice(&hash.finalize().to_le_bytes());
        }
        let is_good = bytes == good;
        let result = read(file(&bytes).path());
        prop_assert!(!is_good || result.is_ok());
        if !mends && let Ok((found, _)) = result {
            // The length of the last block may have grown past the file.
            prop_assert_eq!(&found[..], &rows[..found.len()]);
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(file(&bytes).path());
        let bare = r#"{"model":"","fingerprint":null,"provenance":"recorded","layers":[{"count":2,"experts":9,"top_k":2,"expert_bytes":0,"class":0}]}"#;
        let path = with_header(bare);
        let mut all = fs::read(path.path()).unwrap();
        let mut hash = crc32fast::Hasher::new();
        let head = [1u32, bytes.len() as u32, 7].map(u32::to_le_bytes).concat();
        hash.update(&head);
        hash.update(&bytes);
        all.extend(head);
        all.extend(hash.finalize().to_le_bytes());
        all.extend(&bytes);
        let _ = read(file(&all).path());
    }
}
