//! The recorder: what comes back is what was told, nothing waits for the
//! disk, and what was left out is counted and marked.

use pregate_predictor::{Fed, LayerShape, Observer, Origin, Served, Shape};
use pregate_traces::format::{Dropped, Reader};
use pregate_traces::record::{Queue, Recorder};
use pregate_traces::{Header, LayerServed, Row, Source};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// Layers 1 and 2 have experts.
fn header() -> Header {
    let layer = LayerShape { experts: 300, top_k: 2, expert_bytes: 5, class: 0 };
    Header {
        model: "m".into(),
        shape: Shape { layers: vec![None, Some(layer), Some(layer)] },
        ..Header::default()
    }
}

/// As the runtime tells a pass: layer by layer, all tokens of each.
fn pass(observer: &mut dyn Observer, session: u64, first_position: usize, tokens: &[u32]) {
    let is_prompt = tokens.len() > 1;
    pass_of(observer, Fed { session, first_position, tokens, is_prompt });
}

fn pass_of(observer: &mut dyn Observer, fed: Fed<'_>) {
    observer.fed(&fed);
    let Fed { first_position, tokens, .. } = fed;
    for layer in [1, 2] {
        for (index, &token) in tokens.iter().enumerate() {
            let experts = [token % 250, 299 - layer as u32];
            observer.routed(layer, first_position + index, &experts, &[0.75, 0.25]);
        }
        observer.served(&Served {
            layer,
            first_position,
            tokens: tokens.len(),
            experts: &[(tokens[0] % 250, Origin::InFlight), (299, Origin::Miss)],
            evictions: 1,
            bytes: 10,
            stall_ns: 1 << 40,
        });
    }
}

/// A file in memory whose writes can be held up, and made to fail.
#[derive(Clone, Default)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    fails: Arc<Mutex<bool>>,
}

struct Gate {
    disk: Disk,
    /// Every write waits for one message, or for the sender to go.
    open: Option<mpsc::Receiver<()>>,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(open) = &self.open {
            let _ = open.recv();
        }
        if *self.disk.fails.lock().unwrap() {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.disk.bytes.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn rows(disk: &Disk) -> (Vec<Row>, Reader) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &*disk.bytes.lock().unwrap()).unwrap();
    let mut reader = Reader::open(file.path()).unwrap();
    let mut rows = Vec::new();
    let mut row = Row::default();
    while reader.next(&mut row).unwrap() {
        rows.push(row.clone());
    }
    (rows, reader)
}

#[test]
fn passes_come_back_as_rows() {
    let disk = Disk::default();
    let gate = Gate { disk: disk.clone(), open: None };
    let mut recorder = Recorder::new(gate, &header(), Queue::default()).unwrap();
    pass(&mut recorder, 5, 0, &[40, 41, 42]);
    pass(&mut recorder, 5, 3, &[43]);
    // Cancelled after its first layer: as if it had not been.
    recorder.fed(&Fed { session: 5, first_position: 4, tokens: &[9], is_prompt: false });
    recorder.routed(1, 4, &[0, 1], &[0.5, 0.5]);
    pass(&mut recorder, 5, 4, &[44]);
    pass(&mut recorder, 6, 2, &[50]);
    pass(&mut recorder, 6, 0, &[51]);
    let recording = recorder.finish();
    assert_eq!((recording.tokens, recording.dropped), (7, Dropped::default()));
    assert!(recording.error.is_none());
    let (rows, reader) = rows(&disk);
    assert_eq!(reader.notice(), None);
    let said = |row: &Row| (row.starts_sequence, row.pass_tokens, row.position, row.token.unwrap());
    let wanted = [
        (true, 3, 0, 40),
        (false, 0, 1, 41),
        (false, 0, 2, 42),
        (false, 1, 3, 43),
        (false, 1, 4, 44),
        (true, 1, 2, 50),
        (true, 1, 0, 51),
    ];
    assert_eq!(rows.iter().map(said).collect::<Vec<_>>(), wanted);
    assert_eq!(rows.iter().map(|row| row.is_prompt).filter(|&is| is).count(), 3);
    for row in &rows {
        let token = row.token.unwrap() as u16 % 250;
        assert_eq!((row.experts(0), row.experts(1)), (&[][..], &[token, 298][..]));
        assert_eq!((row.experts(2), row.weights(2)), (&[token, 297][..], &[0.75, 0.25][..]));
    }
    let cost = |layer| LayerServed {
        layer,
        origins: vec![(40, Origin::InFlight), (299, Origin::Miss)],
        evictions: 1,
        bytes: 10,
        stall_ns: 1 << 40,
    };
    assert_eq!(rows[0].served, [cost(1), cost(2)]);
    assert!(rows[1].served.is_empty() && rows[3].served.len() == 2);
}

#[test]
fn a_prompt_may_end_in_a_single_token() {
    let disk = Disk::default();
    let gate = Gate { disk: disk.clone(), open: None };
    let mut recorder = Recorder::new(gate, &header(), Queue::default()).unwrap();
    pass(&mut recorder, 5, 0, &[40, 41]);
    pass_of(&mut recorder, Fed { session: 5, first_position: 2, tokens: &[42], is_prompt: true });
    pass(&mut recorder, 5, 3, &[43]);
    assert!(recorder.finish().error.is_none());
    let (rows, _) = rows(&disk);
    let said = |row: &Row| (row.pass_tokens, row.is_prompt);
    let wanted = [(2, true), (0, true), (1, true), (1, false)];
    assert_eq!(rows.iter().map(said).collect::<Vec<_>>(), wanted);
}

#[test]
fn a_disk_that_stands_still_costs_passes_not_time() {
    let disk = Disk::default();
    let (open, gate) = mpsc::channel();
    // The head and the header are written before the recorder is there.
    (0..5).for_each(|_| open.send(()).unwrap());
    let gate = Gate { disk: disk.clone(), open: Some(gate) };
    let limit = Queue { passes: 4, ..Queue::default() };
    let mut recorder = Recorder::new(gate, &header(), limit).unwrap();
    let started = Instant::now();
    // The writer holds one, or none yet, or one more that it has begun.
    let big: Vec<u32> = (0..6000).collect();
    (0..3).for_each(|n| pass(&mut recorder, 1, n * big.len(), &big));
    (0..50).for_each(|n| pass(&mut recorder, 1, 3 * big.len() + n, &[7]));
    assert!(started.elapsed() < Duration::from_secs(5), "it waited");
    drop(open);
    let recording = recorder.finish();
    assert!(recording.error.is_none(), "{:?}", recording.error);
    let dropped = recording.dropped;
    assert!(dropped.passes >= 45 && dropped.passes < 53, "{dropped:?}");
    let (rows, reader) = rows(&disk);
    assert_eq!(reader.dropped(), dropped, "the file says so");
    assert_eq!(rows.len() as u64, recording.tokens);
    assert_eq!(rows.len() as u64 + dropped.tokens, 3 * 6000 + 50, "nothing is lost unsaid");
    let starts = rows.iter().filter(|row| row.starts_sequence).count();
    let jumps = rows.windows(2).filter(|two| two[1].position != two[0].position + 1);
    assert_eq!(starts, 1 + jumps.count(), "a gap starts a sequence");
}

#[test]
fn the_queue_is_bounded_in_bytes() {
    let disk = Disk::default();
    let (open, gate) = mpsc::channel();
    (0..5).for_each(|_| open.send(()).unwrap());
    let gate = Gate { disk: disk.clone(), open: Some(gate) };
    let limit = Queue { passes: 1000, bytes: 100_000 };
    let mut recorder = Recorder::new(gate, &header(), limit).unwrap();
    // One pass of more than the writer's buffer holds it up.
    let big: Vec<u32> = (0..20_000).collect();
    pass(&mut recorder, 1, 0, &big);
    (0..500).for_each(|n| pass(&mut recorder, 1, big.len() + n, &[7]));
    drop(open);
    let recording = recorder.finish();
    // The big one is let in as it finds the queue empty; nothing goes beside.
    assert_eq!(recording.dropped, Dropped { passes: 500, tokens: 500 });
    assert_eq!((rows(&disk).0.len(), rows(&disk).1.dropped().passes), (20_000, 500));
}

#[test]
fn a_full_disk_ends_the_recording_and_not_the_run() {
    let disk = Disk::default();
    let gate = Gate { disk: disk.clone(), open: None };
    let mut recorder = Recorder::new(gate, &header(), Queue::default()).unwrap();
    *disk.fails.lock().unwrap() = true;
    let big: Vec<u32> = (0..20_000).collect();
    (0..20).for_each(|n| pass(&mut recorder, 1, n * big.len(), &big));
    let recording = recorder.finish();
    assert!(recording.error.unwrap().to_string().contains("no storage space"), "the cause");
    assert_eq!(recording.tokens, 0, "none of which is in the file");
}

#[test]
fn what_the_disk_took_before_it_was_full_is_what_was_recorded() {
    let disk = Disk::default();
    let gate = Gate { disk: disk.clone(), open: None };
    let mut recorder = Recorder::new(gate, &header(), Queue::default()).unwrap();
    let big: Vec<u32> = (0..20_000).collect();
    pass(&mut recorder, 1, 0, &big);
    // Handed over, and written all but its last rows.
    recorder.fed(&Fed { session: 1, first_position: 20_000, tokens: &[1], is_prompt: false });
    let started = Instant::now();
    while disk.bytes.lock().unwrap().len() < 200_000 && started.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
    *disk.fails.lock().unwrap() = true;
    pass(&mut recorder, 1, 20_000, &big);
    let recording = recorder.finish();
    assert!(recording.error.is_some());
    let (rows, _) = rows(&disk);
    assert!(!rows.is_empty() && rows.len() as u64 == recording.tokens, "{recording:?}");
}

#[test]
fn a_pass_with_a_weight_that_is_no_number_is_left_out_and_counted() {
    let disk = Disk::default();
    let gate = Gate { disk: disk.clone(), open: None };
    let mut recorder = Recorder::new(gate, &header(), Queue::default()).unwrap();
    pass(&mut recorder, 5, 0, &[40]);
    for weight in [f32::NAN, f32::INFINITY, 1e9] {
        recorder.fed(&Fed { session: 5, first_position: 1, tokens: &[9], is_prompt: false });
        for layer in [1, 2] {
            recorder.routed(layer, 1, &[0, 1], &[0.5, weight]);
        }
    }
    // This one was cancelled as well: it is no part of the sequence.
    recorder.fed(&Fed { session: 5, first_position: 4, tokens: &[9], is_prompt: false });
    recorder.routed(1, 4, &[0, 1], &[0.5, f32::NAN]);
    pass(&mut recorder, 5, 4, &[44]);
    let recording = recorder.finish();
    assert!(recording.error.is_none(), "the recording went on: {recording:?}");
    let dropped = Dropped { passes: 3, tokens: 3 };
    assert_eq!((recording.tokens, recording.dropped, recording.odd_passes), (2, dropped, 3));
    let (rows, reader) = rows(&disk);
    assert!(rows.len() == 2 && rows[1].starts_sequence, "a gap is before it");
    assert_eq!(reader.dropped(), dropped);
}

#[test]
fn a_recorder_that_is_dropped_ends_its_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut recorder = Recorder::create(file.path(), &header()).unwrap();
    pass(&mut recorder, 1, 0, &[1, 2]);
    drop(recorder);
    let mut reader = Reader::open(file.path()).unwrap();
    assert_eq!(reader.tokens(), Some(2));
    assert!(reader.next(&mut Row::default()).unwrap());
    assert!(Recorder::create(std::path::Path::new("/nowhere/x"), &header()).is_err());
}
