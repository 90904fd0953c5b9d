//! The kernels that other kernels are measured against do the work that is
//! counted.

use pregate_kernels::cuda::{Device, ProbeProduct, Span, probe_copy, probe_products, probe_read};
use pregate_kernels::testing::Random;
use pregate_standin::testing;

fn download(device: &Device, span: &Span) -> Vec<u8> {
    let mut bytes = vec![0; span.bytes()];
    device.compute().download(span, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_word_is_copied_and_read_once() {
    let Some(device) = testing::device() else { return };
    let mut random = Random::new(1);
    // Fewer words than threads, a multiple of all of them, and neither.
    for (words, blocks) in [(1, 1), (255, 1), (2048, 2), (5000, 3)] {
        let bytes: Vec<u8> = (0..words * 16).map(|_| random.bits() as u8).collect();
        let arena = device.arena(3 * bytes.len() + 256 * 4 * blocks + 4096).unwrap();
        let (from, to) =
            (arena.take(bytes.len(), 16).unwrap(), arena.take(bytes.len(), 16).unwrap());
        let sums = arena.take(256 * 4 * blocks, 16).unwrap();
        device.compute().upload(&from, &bytes).unwrap();
        probe_copy(&device, device.compute(), blocks as u32, &from, &to).unwrap();
        assert_eq!(download(&device, &to), bytes, "{words} words");

        probe_read(&device, device.compute(), blocks as u32, &from, &sums).unwrap();
        let all = |bytes: &[u8]| {
            let (words, _) = bytes.as_chunks::<4>();
            words.iter().fold(0, |all, word| all ^ u32::from_le_bytes(*word))
        };
        assert_eq!(all(&download(&device, &sums)), all(&bytes), "{words} words");
    }
}

/// The 16 x 8 elements of a product are shared by 32 threads; each round adds
/// the products of `depth` ones to each.
#[test]
fn as_many_products_are_made_as_are_counted() {
    let Some(device) = testing::device() else { return };
    let arena = device.arena(1 << 16).unwrap();
    let out = arena.take(2 * 256 * 4, 16).unwrap();
    for (product, rounds) in [
        (ProbeProduct::Int8, 1),
        (ProbeProduct::Int8, 3),
        (ProbeProduct::F16, 1),
        (ProbeProduct::F16, 3),
    ] {
        probe_products(&device, device.compute(), 2, product, rounds, &out).unwrap();
        let bytes = download(&device, &out);
        let words = bytes.as_chunks::<4>().0.iter();
        let sum: f64 = match product {
            ProbeProduct::Int8 => words.map(|word| f64::from(i32::from_le_bytes(*word))).sum(),
            ProbeProduct::F16 => words.map(|word| f64::from(f32::from_le_bytes(*word))).sum(),
        };
        // Of 2 blocks of 8 warps; each sum stands for a multiplication and an
        // addition.
        let products = 16 * ProbeProduct::IN_ROUND * rounds as u32;
        assert_eq!(sum, f64::from(products * product.operations()) / 2.0, "{product:?}");
    }
}
