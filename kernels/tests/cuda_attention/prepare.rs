//! Heads on their way to attention, against the operations of the forward
//! pass.

use crate::lab::{Lab, assert_same_bits, numbers};
use crate::support::{FORMATS, angles, cell_bytes, cell_values};
use half::f16;
use pregate_kernels::cuda::{
    At, CellFormat, DeviceCells, HeadNorms, Pairs, PrepareHeads, PrepareLatent, Rotation,
    prepare_heads, prepare_latent,
};
use pregate_kernels::ops;
use pregate_kernels::testing::Random;

/// Rotation of the forward pass (`runtime/src/model/rope.rs`).
fn rotate(pairs: Pairs, angles: &[f32], head: &mut [f32]) {
    let half = angles.len() / 2;
    for (i, angle) in angles.as_chunks::<2>().0.iter().enumerate() {
        let [cos, sin] = *angle;
        let (at_a, at_b) = match pairs {
            Pairs::Halves => (i, i + half),
            Pairs::Neighbours => (2 * i, 2 * i + 1),
        };
        let (a, b) = (head[at_a], head[at_b]);
        head[at_a] = a * cos - b * sin;
        head[at_b] = b * cos + a * sin;
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Norm {
    None,
    Head,
    Whole,
}

#[derive(Clone, Copy, Debug)]
struct Heads {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    half: usize,
    pairs: Pairs,
    norm: Norm,
    is_gated: bool,
    limit: Option<f32>,
}

#[test]
fn heads_are_prepared_with_the_bits_of_the_forward_pass() {
    let Some(lab) = Lab::open() else { return };
    use Norm::{Head, Whole};
    use Pairs::{Halves, Neighbours};
    let case = |tokens, heads, kv_heads, width, half, pairs, norm| Heads {
        tokens,
        heads,
        kv_heads,
        width,
        half,
        pairs,
        norm,
        is_gated: false,
        limit: None,
    };
    let cases = [
        case(1, 8, 2, 128, 64, Halves, Head),
        case(3, 4, 4, 64, 32, Halves, Whole),
        Heads { limit: Some(1.25), ..case(2, 16, 16, 128, 64, Halves, Whole) },
        case(2, 6, 2, 64, 32, Neighbours, Norm::None),
        Heads { is_gated: true, ..case(3, 4, 1, 256, 32, Halves, Head) },
        // Odd shapes: half a round of lanes, nothing turned, an odd share.
        case(5, 3, 1, 40, 12, Neighbours, Head),
        Heads { limit: Some(0.5), ..case(1, 1, 1, 80, 0, Halves, Norm::None) },
        case(1, 2, 1, 33, 16, Halves, Whole),
    ];
    let mut rng = Random::new(11);
    for (n, case) in cases.into_iter().enumerate() {
        for format in FORMATS {
            prepare_case(&lab, case, format, n * 7, &mut rng);
        }
    }
}

fn prepare_case(lab: &Lab, case: Heads, format: CellFormat, first: usize, rng: &mut Random) {
    let Heads { tokens, heads, kv_heads, width, half, pairs, norm, is_gated, limit } = case;
    let q_each = if is_gated { 2 * width } else { width };
    let mut q_raw = numbers(tokens * heads * q_each, rng);
    let mut k_raw = numbers(tokens * kv_heads * width, rng);
    let mut v_raw = numbers(tokens * kv_heads * width, rng);
    for raw in [&mut q_raw, &mut k_raw, &mut v_raw] {
        let at = rng.below(raw.len());
        raw[at] = rng.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    }
    let norm_widths = match norm {
        Norm::Whole => (heads * width, kv_heads * width),
        _ => (width, width),
    };
    let weights = (numbers(norm_widths.0, rng), numbers(norm_widths.1, rng));
    let table = angles(tokens, half, rng);
    let epsilon = 1e-6;

    // Reference.
    let mut q: Vec<f32> =
        q_raw.chunks_exact(q_each).flat_map(|head| &head[..width]).copied().collect();
    let (mut k, mut v) = (k_raw.clone(), v_raw.clone());
    if let Some(limit) = limit {
        for values in [&mut q, &mut k, &mut v] {
            values.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
        }
    }
    if norm != Norm::None {
        q.chunks_exact_mut(norm_widths.0)
            .for_each(|x| ops::rms_norm_in_place(x, &weights.0, epsilon));
        k.chunks_exact_mut(norm_widths.1)
            .for_each(|x| ops::rms_norm_in_place(x, &weights.1, epsilon));
    }
    for (values, count) in [(&mut q, heads), (&mut k, kv_heads)] {
        for (token, row) in values.chunks_exact_mut(count * width).enumerate() {
            let angles = &table[token * 2 * half..(token + 1) * 2 * half];
            row.chunks_exact_mut(width).for_each(|head| rotate(pairs, angles, head));
        }
    }

    // Keys lie head by head, values position by position, both with gaps.
    let capacity = first + tokens + 2;
    let cells = |is_key: bool| DeviceCells {
        format,
        span: lab.space(kv_heads * capacity * (width + 3) * format.bytes()),
        head_stride: if is_key { capacity * (width + 3) } else { width + 3 },
        position_stride: if is_key { width + 3 } else { kv_heads * (width + 3) },
        width,
    };
    let (keys, values) = (cells(true), cells(false));
    let q_out = lab.space(4 * tokens * heads * width);
    let (q_norm, k_norm) = (lab.floats(&weights.0), lab.floats(&weights.1));
    let call = PrepareHeads {
        q_raw: &lab.floats(&q_raw),
        is_gated,
        k_raw: &lab.floats(&k_raw),
        v_raw: &lab.floats(&v_raw),
        norms: (norm != Norm::None).then_some(HeadNorms {
            q: &q_norm,
            k: &k_norm,
            is_whole: norm == Norm::Whole,
            epsilon,
        }),
        limit,
        rotation: Rotation { table: &lab.floats(&table), half, pairs },
        q: &q_out,
        keys: &keys,
        values: &values,
        tokens,
        heads,
        kv_heads,
        width,
        at: At::Host(first),
    };
    let heads_bytes = 4 * tokens * width * 2 * (heads + kv_heads) + 8 * tokens * half;
    let cell_count = 2 * tokens * kv_heads * width;
    assert_eq!(call.bytes(), (heads_bytes + cell_count * format.bytes()) as u64);
    prepare_heads(&lab.device, lab.device.compute(), call).unwrap();

    let what = format!("{case:?}, {format:?}");
    assert_same_bits(&lab.read_floats(&q_out), &q, &what);
    for (cells, rows) in [(&keys, &k), (&values, &v)] {
        // The whole cache: what lies between is left alone.
        let mut want = vec![0xffu8; cells.span.bytes()];
        for (i, row) in rows.chunks_exact(width).enumerate() {
            let (token, head) = (i / kv_heads, i % kv_heads);
            let at = head * cells.head_stride + (first + token) * cells.position_stride;
            let bytes = cell_bytes(format, row);
            want[at * format.bytes()..][..bytes.len()].copy_from_slice(&bytes);
        }
        let got = lab.read(&cells.span);
        assert_same_bits(&cell_values(format, &got), &cell_values(format, &want), &what);
    }
}

#[test]
fn rounding_to_half_cells_is_to_nearest_even() {
    let Some(lab) = Lab::open() else { return };
    // Ties, overflow to infinity, subnormal halves, zeros of both signs.
    let mut values: Vec<f32> = vec![
        1.0 + 1.0 / 2048.0,
        1.0 + 3.0 / 2048.0,
        -(1.0 + 1.0 / 2048.0),
        65519.0,
        65520.0,
        -65520.0,
        6e-8,
        2.98e-8,
        2.99e-8,
        f32::MIN_POSITIVE,
        -0.0,
        f32::INFINITY,
    ];
    let mut rng = Random::new(3);
    values.resize_with(128, || f32::from_bits(rng.bits() as u32 & 0x7fff_ffff));
    let width = values.len();
    let cells = || DeviceCells {
        format: CellFormat::F16,
        span: lab.space(2 * width),
        head_stride: 0,
        position_stride: width,
        width,
    };
    let (keys, cells) = (cells(), cells());
    let raw = lab.floats(&values);
    prepare_heads(
        &lab.device,
        lab.device.compute(),
        PrepareHeads {
            q_raw: &raw,
            is_gated: false,
            k_raw: &raw,
            v_raw: &raw,
            norms: None,
            limit: None,
            rotation: Rotation { table: &lab.zeros(16), half: 0, pairs: Pairs::Halves },
            q: &lab.space(4 * width),
            keys: &keys,
            values: &cells,
            tokens: 1,
            heads: 1,
            kv_heads: 1,
            width,
            at: At::Host(0),
        },
    )
    .unwrap();
    let want: Vec<f32> = values.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
    assert_eq!(want[..3], [1.0, 1.0 + 1.0 / 512.0, -1.0]);
    for span in [&keys.span, &cells.span] {
        let got = cell_values(CellFormat::F16, &lab.read(span));
        assert_same_bits(&got, &want, &"rounding");
    }
}

#[test]
fn latent_rows_are_prepared_with_the_bits_of_the_forward_pass() {
    let Some(lab) = Lab::open() else { return };
    let mut rng = Random::new(12);
    // tokens, heads, nope, rope, rank, half, pairs
    let cases = [
        (1, 16, 128, 64, 512, 32, Pairs::Neighbours),
        (3, 4, 16, 8, 32, 4, Pairs::Neighbours),
        (2, 5, 24, 40, 96, 16, Pairs::Halves),
    ];
    for (tokens, heads, nope, rope, rank, half, pairs) in cases {
        for format in FORMATS {
            let (q_head, row) = (nope + rope, rank + rope);
            let q_raw = numbers(tokens * heads * q_head, &mut rng);
            let mut kv_raw = numbers(tokens * row, &mut rng);
            kv_raw[rng.below(row)] = f32::NAN;
            let weight = numbers(rank, &mut rng);
            let table = angles(tokens, half, &mut rng);
            let (epsilon, first) = (1e-5, 9);

            let turn = |token: usize, part: &mut [f32]| {
                rotate(pairs, &table[token * 2 * half..(token + 1) * 2 * half], part);
            };
            let mut want_q = vec![f32::NAN; tokens * heads * row];
            for (i, want) in want_q.chunks_exact_mut(row).enumerate() {
                want[rank..].copy_from_slice(&q_raw[i * q_head + nope..(i + 1) * q_head]);
                turn(i / heads, &mut want[rank..]);
            }
            let mut want_rows = kv_raw.clone();
            for (token, row) in want_rows.chunks_exact_mut(row).enumerate() {
                ops::rms_norm_in_place(&mut row[..rank], &weight, epsilon);
                turn(token, &mut row[rank..]);
            }

            let absorbed = lab.space(4 * tokens * heads * row);
            let cells = DeviceCells {
                format,
                span: lab.space((first + tokens) * row * format.bytes()),
                head_stride: 0,
                position_stride: row,
                width: row,
            };
            let call = PrepareLatent {
                q_raw: &lab.floats(&q_raw),
                kv_raw: &lab.floats(&kv_raw),
                kv_norm: &lab.floats(&weight),
                epsilon,
                rotation: Rotation { table: &lab.floats(&table), half, pairs },
                absorbed: &absorbed,
                cells: &cells,
                tokens,
                heads,
                nope,
                rope,
                rank,
                at: At::Host(first),
            };
            prepare_latent(&lab.device, lab.device.compute(), call).unwrap();
            let what = format!("{heads} heads of {nope} + {rope}, rank {rank}, {format:?}");
            let got = lab.read_floats(&absorbed);
            assert_same_bits(&got, &want_q, &what);
            let got = cell_values(format, &lab.read(&cells.span));
            let want = cell_values(format, &cell_bytes(format, &want_rows));
            assert_same_bits(&got[first * row..], &want, &what);
            assert!(got[..first * row].iter().all(|x| x.is_nan()), "{what}: earlier rows");
        }
    }
}
