//! Damaged files never panic, never allocate out of proportion, and whatever
//! is accepted keeps the promises of [`TensorInfo`]. More than 200,000
//! mutations of good files from a fixed seed; a failure names its case.

#[path = "support/badfiles.rs"]
mod badfiles;
#[path = "support/counting_allocator.rs"]
mod counting_allocator;
#[path = "support/gguf_builder.rs"]
mod gguf_builder;
#[path = "support/scratch.rs"]
mod scratch;

use badfiles::{good_gguf, good_safetensors, safetensors};
use counting_allocator::peak_bytes;
use gguf_builder::{Gguf, string};
use pregate_runtime::{
    Error,
    files::{self, ElementType, ModelFiles, TensorTable},
};
use scratch::Scratch;
use std::{collections::HashSet, ops::Range, path::Path};

#[global_allocator]
static ALLOCATOR: counting_allocator::Counting = counting_allocator::Counting;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// A part of `0..len`, short more often than long.
    fn range(&mut self, len: usize) -> Range<usize> {
        let start = self.below(len + 1);
        let most = 1 << self.below(10);
        start..len.min(start + self.below(most + 1))
    }

    fn extreme(&mut self, len: usize) -> u64 {
        const EXTREMES: [u64; 14] = [
            0,
            1,
            13,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 32,
            1 << 61,
            i64::MAX as u64,
            1 << 63,
            u64::MAX / 4,
            u64::MAX - 31,
            u64::MAX,
        ];
        match self.below(EXTREMES.len() + 2) {
            14 => len as u64,
            15 => (len as u64).wrapping_add(self.next() % 64).wrapping_sub(32),
            index => EXTREMES[index],
        }
    }
}

fn overwrite(bytes: &mut [u8], at: usize, with: &[u8]) {
    for (target, &byte) in bytes.iter_mut().skip(at).zip(with) {
        *target = byte;
    }
}

/// One change; `other` is a good file to splice from.
fn mutate(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let len = bytes.len();
    let at = random.below(len);
    match random.below(11) {
        0 => bytes.truncate(at),
        1 => overwrite(bytes, at, &[random.next() as u8]),
        2 => {
            let bit = 1 << random.below(8);
            bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= bit);
        }
        3 => overwrite(bytes, at, &random.extreme(len).to_le_bytes()),
        4 => overwrite(bytes, at, &(random.extreme(len) as u32).to_le_bytes()),
        5 => drop(bytes.drain(random.range(len))),
        6 => {
            let copy = bytes[random.range(len)].to_vec();
            bytes.splice(at..at, copy);
        }
        7 => {
            let copy = bytes[random.range(len)].to_vec();
            overwrite(bytes, at, &copy);
        }
        8 => {
            let (into, from) = (random.range(len), random.range(other.len()));
            bytes.splice(into, other[from].iter().copied());
        }
        9 => {
            // Two neighbouring sections change places.
            let section = random.range(len);
            let middle = random.below(section.len() + 1);
            bytes[section].rotate_left(middle);
        }
        _ => number_in_text(random, bytes, at),
    }
}

/// Replaces the digits behind `at` by another number: what the mutations of
/// binary integers are for JSON.
fn number_in_text(random: &mut Random, bytes: &mut Vec<u8>, at: usize) {
    let Some(start) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else { return };
    let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
    let number = random.extreme(bytes.len());
    let text = match random.below(4) {
        0 => format!("-{number}"),
        1 => format!("{number}.5e{}", random.below(400)),
        2 => (number % 64).to_string(),
        _ => number.to_string(),
    };
    bytes.splice(start..end, text.into_bytes());
}

/// What must hold for a file that was accepted.
fn promises(bytes: &[u8], tensors: &TensorTable, data_offset: u64) {
    assert!(data_offset <= bytes.len() as u64);
    let mut end = data_offset;
    let mut names = HashSet::new();
    for tensor in tensors.all() {
        assert!(tensor.offset >= end, "tensors overlap");
        end = tensor.offset.checked_add(tensor.bytes as u64).unwrap();
        let (cols, rows) = match tensor.shape.split_last() {
            Some((&cols, outer)) => (cols, outer.iter().product::<usize>()),
            None => (1, 1),
        };
        let row = match tensor.element {
            ElementType::Format(format) => format.row_bytes(cols).unwrap(),
            ElementType::U8 => cols,
        };
        assert!(row > 0 && rows * row == tensor.bytes, "{tensor:?}");
        assert!(names.insert(&tensor.name), "a name twice");
        assert_eq!(tensors.get(&tensor.name).unwrap().offset, tensor.offset);
    }
    assert!(end <= bytes.len() as u64, "a tensor outside the file");
}

fn check_message(error: &Error) {
    let message = error.to_string();
    assert!(message.contains("damaged"), "which file? {message}");
    assert!(message.len() < 1500 && !message.contains(char::is_control), "{message:?}");
    let whole = ["; allowed: ", "; supported: "].iter().any(|part| message.contains(part));
    assert!(whole, "what is allowed? {message}");
}

type Parse = fn(&[u8], &mut TensorTable) -> Result<u64, Error>;

/// Parses `cases` mutations of `seeds`.
fn survive(cases: usize, seed: u64, seeds: &[Vec<u8>], parse: Parse) {
    let mut random = Random(seed);
    let mut accepted = 0;
    for case in 0..cases {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        let other = &seeds[random.below(seeds.len())];
        for _ in 0..=random.below(4) {
            mutate(&mut random, &mut bytes, other);
        }
        let outcome = std::panic::catch_unwind(|| {
            let mut tensors = TensorTable::new();
            let (result, peak) = peak_bytes(|| parse(&bytes, &mut tensors));
            let bound = (64 << 10) + 16 * bytes.len();
            assert!(peak <= bound, "{peak} bytes allocated for a file of {}", bytes.len());
            match &result {
                Ok(data_offset) => promises(&bytes, &tensors, *data_offset),
                Err(error) => check_message(error),
            }
            result.is_ok()
        });
        match outcome {
            Ok(ok) => accepted += usize::from(ok),
            Err(_) => panic!("case {case} of seed {seed}: {}", bytes.escape_ascii()),
        }
    }
    // Mutations that are all refused at once, or none, would test nothing.
    assert!(accepted > cases / 100 && accepted < cases / 2, "{accepted} of {cases} accepted");
}

#[test]
fn damaged_gguf_files() {
    let small = Gguf::new().key("general.architecture", string("olmoe")).f32_tensor(
        "token_embd.weight",
        &[2, 2],
        &[1.0; 4],
    );
    let mut second_version = good_gguf();
    second_version.version = 2;
    let seeds = [good_gguf().build(), second_version.build(), small.build()];
    survive(130_000, 1, &seeds, |bytes, tensors| {
        files::gguf::parse(Path::new("damaged"), 0, bytes, tensors).map(|header| header.data_offset)
    });
}

#[test]
fn damaged_safetensors_files() {
    let tensor = r#"{"dtype":"F16","shape":[3],"data_offsets":[0,6]}"#;
    let seeds = [good_safetensors(), safetensors(format!(r#"{{"w":{tensor}}}"#), &[0; 6])];
    survive(70_000, 2, &seeds, |bytes, tensors| {
        files::safetensors::parse(Path::new("damaged"), 0, bytes, tensors)
            .map(|header| header.data_offset)
    });
}

/// `config.json` and the index have no entry point without a disk.
#[test]
fn damaged_folders() {
    let scratch = Scratch::new("damaged");
    let config = br#"{"model_type":"qwen3_moe","rope":{"type":"yarn","factor":[1,2.5]},"n":8}"#;
    let index = br#"{"metadata":{"total_size":6},"weight_map":{"v":"v.safetensors"}}"#;
    let tensor = r#"{"dtype":"F16","shape":[3],"data_offsets":[0,6]}"#;
    scratch.write("v.safetensors", &safetensors(format!(r#"{{"v":{tensor}}}"#), &[0; 6]));
    let mut random = Random(3);
    let mut accepted = 0;
    for case in 0..3000 {
        let (mut config, mut index) = (config.to_vec(), index.to_vec());
        let (damaged, other) =
            if case % 2 == 0 { (&mut config, index.clone()) } else { (&mut index, config.clone()) };
        mutate(&mut random, damaged, &other);
        scratch.write("config.json", &config);
        scratch.write("model.safetensors.index.json", &index);
        let (result, peak) = peak_bytes(|| ModelFiles::open(scratch.path()));
        assert!(peak < 1 << 20, "{peak}");
        match result {
            Ok(opened) => {
                assert_eq!(opened.tensors().len(), 1);
                accepted += 1;
            }
            // A changed file name need not be there: an error of the system.
            Err(error @ Error::Io { .. }) => assert!(error.to_string().contains("safetensors")),
            Err(error) => check_message(&error),
        }
    }
    assert!((300..2700).contains(&accepted), "{accepted}");
}
