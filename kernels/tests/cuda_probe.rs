//! The kernels that other kernels are measured against do the work that is
//! counted.

use pregate_kernels::cuda::{Args, Device, Grid, Span};
use pregate_kernels::testing::Random;
use pregate_standin::testing;

fn launch(device: &Device, name: &str, blocks: u32, args: Args) {
    let kernel = device.kernel("probe", name).unwrap();
    let grid = Grid { blocks: [blocks, 1, 1], threads: [256, 1, 1], shared_bytes: 0 };
    device.compute().launch(&kernel, grid, args).unwrap();
}

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
        let args = Args::new().span(&to).span(&from).address(words as u64);
        launch(&device, "probe_copy", blocks as u32, args);
        assert_eq!(download(&device, &to), bytes, "{words} words");

        let args = Args::new().span(&sums).span(&from).address(words as u64);
        launch(&device, "probe_read", blocks as u32, args);
        let all = |bytes: &[u8]| {
            let (words, _) = bytes.as_chunks::<4>();
            words.iter().fold(0, |all, word| all ^ u32::from_le_bytes(*word))
        };
        assert_eq!(all(&download(&device, &sums)), all(&bytes), "{words} words");
    }
}

/// 16 x 8 elements of 8 chains are shared by 32 threads, 16 a thread; each
/// round adds the products of `depth` ones to each.
#[test]
fn as_many_products_are_made_as_are_counted() {
    let Some(device) = testing::device() else { return };
    let arena = device.arena(1 << 16).unwrap();
    let out = arena.take(2 * 256 * 4, 16).unwrap();
    for rounds in [1, 3] {
        launch(&device, "probe_mma_s8", 2, Args::new().span(&out).i32(rounds));
        let bytes = download(&device, &out);
        let words = bytes.as_chunks::<4>().0.iter();
        let sums: Vec<i32> = words.map(|word| i32::from_le_bytes(*word)).collect();
        assert_eq!(sums, vec![8 * 4 * 32 * rounds; 512]);
        launch(&device, "probe_mma_f16", 2, Args::new().span(&out).i32(rounds));
        let bytes = download(&device, &out);
        let words = bytes.as_chunks::<4>().0.iter();
        let sums: Vec<f32> = words.map(|word| f32::from_le_bytes(*word)).collect();
        assert_eq!(sums, vec![(8 * 4 * 16 * rounds) as f32; 512]);
    }
}
