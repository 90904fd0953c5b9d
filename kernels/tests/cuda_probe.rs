//! The kernels that other kernels are measured against do the work that is
//! counted.

mod lab;

use lab::Lab;
use pregate_kernels::cuda::{ProbeProduct, probe_copy, probe_products, probe_read};
use pregate_kernels::testing::Random;

#[test]
fn every_word_is_copied_and_read_once() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(1);
    // Fewer words than threads, a multiple of all of them, and neither.
    for (words, blocks) in [(1, 1), (255, 1), (2048, 2), (5000, 3)] {
        let bytes: Vec<u8> = (0..words * 16).map(|_| random.bits() as u8).collect();
        let (from, to) = (lab.bytes(&bytes), lab.space(bytes.len()));
        let sums = lab.space(256 * 4 * blocks);
        let (device, stream) = (&lab.device, lab.device.compute());
        probe_copy(device, stream, blocks as u32, &from, &to).unwrap();
        assert_eq!(lab.read(&to), bytes, "{words} words");

        probe_read(device, stream, blocks as u32, &from, &sums).unwrap();
        let all = |bytes: &[u8]| {
            let (words, _) = bytes.as_chunks::<4>();
            words.iter().fold(0, |all, word| all ^ u32::from_le_bytes(*word))
        };
        assert_eq!(all(&lab.read(&sums)), all(&bytes), "{words} words");
    }
}

/// The 16 x 8 elements of a product are shared by 32 threads; each round adds
/// the products of `depth` ones to each.
#[test]
fn as_many_products_are_made_as_are_counted() {
    let Some(lab) = Lab::open() else { return };
    let out = lab.space(2 * 256 * 4);
    for product in [ProbeProduct::Int8, ProbeProduct::F16] {
        for rounds in [1, 3] {
            probe_products(&lab.device, lab.device.compute(), 2, product, rounds, &out).unwrap();
            let sum: f64 = match product {
                ProbeProduct::Int8 => lab.read_ints(&out).into_iter().map(f64::from).sum(),
                ProbeProduct::F16 => lab.read_floats(&out).into_iter().map(f64::from).sum(),
            };
            // Of 2 blocks of 8 warps; each sum stands for a multiplication and
            // an addition.
            let products = 16 * ProbeProduct::IN_ROUND * rounds as u32;
            assert_eq!(sum, f64::from(products * product.operations()) / 2.0, "{product:?}");
        }
    }
}
