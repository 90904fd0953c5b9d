//! `kernels/cuda/logits.cu` against a sort on the CPU, on the stand-in or a
//! GPU.

mod lab;

use lab::{Lab, set_order};
use pregate_kernels::cuda::logits::{BestLogits, LogitsScratch, MOST_VOCABULARY, argmax, top_k};
use pregate_kernels::cuda::{CudaError, Span};
use pregate_kernels::testing::Random;
use std::cmp::Ordering;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Normal,
    /// A few values, so that the last place is among equals.
    Ties,
    Equal,
    /// Zeros of both signs.
    Zeros,
    Rising,
    Falling,
    SomeNan,
    AllNan,
    SomeInfinite,
    /// Finite ones are fewer than what is wanted.
    MostlyMinusInfinite,
    RandomBits,
}

const KINDS: [Kind; 11] = [
    Kind::Normal,
    Kind::Ties,
    Kind::Equal,
    Kind::Zeros,
    Kind::Rising,
    Kind::Falling,
    Kind::SomeNan,
    Kind::AllNan,
    Kind::SomeInfinite,
    Kind::MostlyMinusInfinite,
    Kind::RandomBits,
];

fn values(kind: Kind, count: usize, random: &mut Random) -> Vec<f32> {
    (0..count)
        .map(|i| match kind {
            Kind::Ties => random.pick(&[1.0, 2.0, 2.5]),
            Kind::Equal => -3.0,
            Kind::Zeros => random.pick(&[0.0, -0.0]),
            Kind::Rising => i as f32 - 1000.0,
            Kind::Falling => 1000.0 - i as f32,
            Kind::SomeNan if random.below(5) == 0 => f32::NAN,
            Kind::AllNan => {
                f32::from_bits(f32::NAN.to_bits() | (random.bits() as u32 & 0x8000_00ff))
            }
            Kind::SomeInfinite if random.below(9) == 0 => {
                random.pick(&[f32::INFINITY, f32::NEG_INFINITY])
            }
            Kind::MostlyMinusInfinite if random.below(97) != 0 => f32::NEG_INFINITY,
            Kind::RandomBits => f32::from_bits(random.bits() as u32),
            _ => 4.0 * random.normal(),
        })
        .collect()
}

/// Larger logits first, then lower ids, NaN last; `zeros_are_equal` as `<` has
/// it, or by `total_cmp`.
fn sorted(logits: &[f32], zeros_are_equal: bool) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| {
        let (left, right) = (logits[a], logits[b]);
        match (left.is_nan(), right.is_nan()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            _ if zeros_are_equal => right.partial_cmp(&left).unwrap(),
            _ => right.total_cmp(&left),
        }
    });
    ids
}

fn scratch(lab: &Lab, rows: usize) -> LogitsScratch {
    let arena = lab.arena(LogitsScratch::bytes(rows));
    LogitsScratch::new(&arena, lab.device.compute(), rows).unwrap()
}

/// The `wanted` best of each of `rows`, or the largest one; compared with
/// the sort.
fn check(lab: &Lab, scratch: &LogitsScratch, rows: &[Vec<f32>], wanted: Option<usize>, what: &str) {
    let cells = rows.len() * wanted.unwrap_or(1);
    let (ids, best) = (lab.cells(cells), lab.cells(cells));
    let has_nan = lab.cells(rows.len());
    let call = BestLogits {
        scratch,
        rows: rows.len(),
        vocabulary: rows[0].len(),
        logits: &lab.floats(&rows.concat()),
        ids: &ids,
        best: &best,
        has_nan: &has_nan,
    };
    let stream = lab.device.compute();
    match wanted {
        Some(wanted) => top_k(&lab.device, stream, call, wanted).unwrap(),
        None => argmax(&lab.device, stream, call).unwrap(),
    }
    let (ids, has_nan) = (lab.read_ints(&ids), lab.read_ints(&has_nan));
    let best: Vec<u32> = lab.read_floats(&best).into_iter().map(f32::to_bits).collect();
    for (row, logits) in rows.iter().enumerate() {
        let want = &sorted(logits, wanted.is_none())[..wanted.unwrap_or(1)];
        let cells = row * want.len()..(row + 1) * want.len();
        let got: Vec<usize> = ids[cells.clone()].iter().map(|&id| id as usize).collect();
        assert_eq!(got, want, "{what}, row {row}");
        // The very bits, NaN's included: a copy, not arithmetic.
        let bits: Vec<u32> = want.iter().map(|&id| logits[id].to_bits()).collect();
        assert_eq!(best[cells], bits, "{what}, row {row}");
        let expected = i32::from(logits.iter().any(|logit| logit.is_nan()));
        assert_eq!(has_nan[row], expected, "{what}, row {row}");
    }
}

#[test]
fn the_best_are_those_of_a_sort() {
    let mut random = Random::new(21);
    for vocabulary in [1, 3, 7, 257, 2048, 2051, 8200] {
        let Some(lab) = Lab::open() else { return };
        let scratch = scratch(&lab, 1);
        for kind in KINDS {
            let logits = [values(kind, vocabulary, &mut random)];
            let what = format!("{kind:?} {vocabulary}");
            check(&lab, &scratch, &logits, None, &what);
            for wanted in [1, 2, 40, 256] {
                if wanted <= vocabulary && (wanted != 2 || vocabulary < 300) {
                    let what = format!("{what} top {wanted}");
                    check(&lab, &scratch, &logits, Some(wanted), &what);
                }
            }
        }
    }
}

#[test]
fn large_vocabularies_are_searched_whole() {
    let mut random = Random::new(22);
    for (vocabulary, wanted) in [(32_003, 64), (151_936, 20), (MOST_VOCABULARY, 256)] {
        let Some(lab) = Lab::open() else { return };
        let scratch = scratch(&lab, 1);
        // The best are the last; the search must come to the end of a row.
        let mut logits = values(Kind::Normal, vocabulary, &mut random);
        logits[vocabulary - 1] = 50.0;
        logits[vocabulary - 2] = 50.0;
        let logits = [logits];
        check(&lab, &scratch, &logits, None, "largest");
        check(&lab, &scratch, &logits, Some(wanted), "best");
    }
}

#[test]
fn rows_are_independent_and_launches_can_be_replayed() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(23);
    let scratch = scratch(&lab, 3);
    for order in 0..4 {
        set_order(order);
        // Rows that do not start at multiples of 16 bytes.
        let kinds = [Kind::Normal, Kind::SomeNan, Kind::Ties];
        let rows = kinds.map(|kind| values(kind, 4099, &mut random));
        check(&lab, &scratch, &rows, None, "largest");
        check(&lab, &scratch, &rows, Some(33), "best");
        // Another number of blocks and rows on the same counters.
        check(&lab, &scratch, &rows[..1], Some(256), "best of one row");
        let short = kinds.map(|kind| values(kind, 300, &mut random));
        check(&lab, &scratch, &short, None, "largest of few");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(lab) = Lab::open() else { return };
    let stream = lab.device.compute();
    let scratch = scratch(&lab, 1);
    let logits = lab.floats(&[0.0; 104]);
    let launch = |rows, vocabulary, logits: &Span, cells: usize, wanted| {
        let (ids, best) = (lab.floats(&vec![0.0; cells]), lab.floats(&vec![0.0; cells]));
        let has_nan = &lab.floats(&[0.0]);
        let (ids, best) = (&ids, &best);
        let call = BestLogits { scratch: &scratch, rows, vocabulary, logits, ids, best, has_nan };
        top_k(&lab.device, stream, call, wanted)
    };
    assert!(launch(1, 104, &logits, 5, 5).is_ok());
    for refused in [
        launch(2, 52, &logits, 10, 5),
        launch(1, 104, &logits, 4, 5),
        launch(1, 104, &logits, 105, 105),
        launch(1, 104, &logits, 257, 257),
        launch(1, 103, &logits, 5, 5),
        // Of the right size, and not at a multiple of 16 bytes.
        launch(1, 103, &logits.part(4..416), 5, 5),
        launch(1, 104, &logits, 1, 0),
        launch(0, 104, &logits, 1, 1),
    ] {
        assert!(matches!(refused, Err(CudaError::Shape { .. })), "{refused:?}");
    }
}
