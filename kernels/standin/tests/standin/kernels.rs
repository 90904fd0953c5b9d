//! The machine computes what a device computes, and finds what a device may
//! get away with: each fault of `standin_faults.cu` is found, and its right
//! twin is not.

use crate::support::{Machine, float, machine, number};
use pregate_standin::Standin;

const ILLEGAL_ADDRESS: u32 = 700;
const MISALIGNED: u32 = 716;
const LAUNCH_FAILED: u32 = 719;

/// Orders of threads and blocks that tests try.
const ORDERS: std::ops::Range<u64> = 0..6;

/// Runs a launch that must be stopped, with this code and these words.
#[track_caller]
fn stopped(machine: &Machine, code: u32, words: &[&str], run: impl FnOnce() -> Result<(), u32>) {
    assert_eq!(run(), Err(code));
    let found = machine.standin.take_violations();
    assert_eq!(found.len(), 1, "{found:?}");
    for word in words {
        assert!(found[0].contains(word), "{:?} is not in: {}", word, found[0]);
    }
}

/// The sanitizer's build ends the process where this one reports, and sees no
/// races.
fn checked() -> Option<Machine> {
    if Standin::has_address_sanitizer() {
        println!("not run: the address sanitizer is in the place of the checks");
        return None;
    }
    let machine = machine()?;
    machine.open().unwrap();
    Some(machine)
}

fn words(values: impl IntoIterator<Item = i32>) -> Vec<u8> {
    values.into_iter().flat_map(i32::to_le_bytes).collect()
}

#[test]
fn a_missing_barrier_is_a_race_in_every_order() {
    let Some(machine) = checked() else { return };
    let n = 96;
    let input = machine.device(&words(0..n));
    let out = machine.device(&words((0..n).map(|_| -1)));
    for order in ORDERS {
        machine.standin.set_order(order);
        let args = |fault: i32| [out, input, number(n), number(fault)];
        machine.run("standin_reverse", [1, n as u32, 0], &args(0)).unwrap();
        assert_eq!(machine.read(out, 4 * n as usize), words((0..n).rev()));
        assert_eq!(machine.standin.races(), 0);
        let faulty = || machine.run("standin_reverse", [1, n as u32, 0], &args(1));
        assert_eq!(faulty(), Err(LAUNCH_FAILED));
        assert_eq!(machine.standin.races(), 1);
        machine.standin.take_violations();
        let words = ["standin_reverse", "block (0,0,0)", "race", "byte", "standin_faults.cu:"];
        stopped(&machine, LAUNCH_FAILED, &words, faulty);
    }
}

#[test]
fn lanes_are_ordered_by_syncwarp_and_not_by_shuffles() {
    let Some(machine) = checked() else { return };
    let out = machine.device(&words(0..32));
    for order in ORDERS {
        machine.standin.set_order(order);
        machine.run("standin_neighbours", [1, 32, 0], &[out, 0]).unwrap();
        assert_eq!(machine.read(out, 128), words((0..32).map(|lane| (lane + 1) % 32)));
        for mode in [1, 2] {
            stopped(&machine, LAUNCH_FAILED, &["race"], || {
                machine.run("standin_neighbours", [1, 32, 0], &[out, mode])
            });
        }
    }
}

#[test]
fn a_buffer_that_is_written_before_all_have_read_is_a_race() {
    let Some(machine) = checked() else { return };
    let out = machine.device(&words(0..64));
    for order in ORDERS {
        machine.standin.set_order(order);
        machine.run("standin_rounds", [3, 64, 256], &[out, 5, 0]).unwrap();
        stopped(&machine, LAUNCH_FAILED, &["race", "dynamic"], || {
            machine.run("standin_rounds", [3, 64, 256], &[out, 5, 1])
        });
    }
}

#[test]
fn a_write_after_the_reads_of_others_is_a_race() {
    let Some(machine) = checked() else { return };
    let out = machine.device(&words(0..96));
    // One reader, several of the writer's warp, several of more warps; in
    // index order, where all reads come before the write.
    machine.standin.set_order(0);
    for threads in [2, 32, 96] {
        machine.run("standin_readers", [2, threads, 0], &[out, 0]).unwrap();
        stopped(&machine, LAUNCH_FAILED, &["race", "writes", "read with no barrier"], || {
            machine.run("standin_readers", [2, threads, 0], &[out, 1])
        });
    }
}

#[test]
fn reads_outside_an_allocation_are_found_to_the_byte() {
    let Some(machine) = checked() else { return };
    let (input, other) = (machine.device(&words(0..40)), machine.device(&words(0..32)));
    let out = machine.device(&words(0..32));
    let read =
        |from: u64, at: i32| machine.run("standin_read", [1, 32, 0], &[out, from, number(at)]);
    read(input, 8).unwrap();
    assert_eq!(machine.read(out, 128), words(8..40));
    stopped(&machine, ILLEGAL_ADDRESS, &["reads 4 bytes", "of an allocation of 160 bytes"], || {
        read(input, 9)
    });
    stopped(&machine, ILLEGAL_ADDRESS, &["reads 4 bytes"], || read(input, -1));
    machine.free(other).unwrap();
    stopped(&machine, ILLEGAL_ADDRESS, &["that was freed"], || read(other, 0));
    stopped(&machine, ILLEGAL_ADDRESS, &["null pointer"], || read(0, 0));
    // Memory of the host that the driver does not know.
    let host = vec![0u8; 4096];
    stopped(&machine, ILLEGAL_ADDRESS, &["no memory of the device"], || {
        read(host.as_ptr() as u64, 0)
    });
    read(input, 8).unwrap();
}

#[test]
fn shared_arrays_have_bounds() {
    let Some(machine) = checked() else { return };
    let out = machine.device(&words(0..1));
    let write = |at: i32, how: i32| {
        machine.run("standin_shared_bounds", [1, 1, 32], &[out, number(at), number(how)])
    };
    for (how, end) in [(0, 64), (1, 64), (2, 32)] {
        write(0, how).unwrap();
        write(end - 4, how).unwrap();
        stopped(&machine, ILLEGAL_ADDRESS, &["out of bounds"], || write(end, how));
        stopped(&machine, ILLEGAL_ADDRESS, &["out of bounds"], || write(end + 64, how));
        stopped(&machine, ILLEGAL_ADDRESS, &["out of bounds"], || write(-4, how));
    }
}

#[test]
fn without_checks_accesses_are_not_looked_at() {
    let Some(machine) = checked() else { return };
    let n = 96;
    let input = machine.device(&words(0..n));
    let out = machine.device(&words((0..n).map(|_| -1)));
    let reverse = |fault: i32| {
        let args = [out, input, number(n), number(fault)];
        machine.run("standin_reverse", [1, n as u32, 0], &args)
    };
    let write =
        |at: i32| machine.run("standin_shared_bounds", [1, 1, 32], &[out, number(at), number(1)]);
    machine.standin.set_checks(false);
    reverse(1).unwrap();
    // Between two arrays, where nothing lies.
    write(64).unwrap();
    assert_eq!(machine.standin.races(), 0);
    assert_eq!(machine.standin.take_violations(), [""; 0]);
    // The rest of the machine is as it was.
    for order in ORDERS {
        machine.standin.set_order(order);
        reverse(0).unwrap();
        assert_eq!(machine.read(out, 4 * n as usize), words((0..n).rev()));
    }
    machine.standin.set_checks(true);
    stopped(&machine, LAUNCH_FAILED, &["race"], || reverse(1));
    stopped(&machine, ILLEGAL_ADDRESS, &["out of bounds"], || write(64));
    machine.standin.set_checks(false);
    machine.standin.reset();
    machine.standin.set_print(false);
    machine.open().unwrap();
    let out = machine.device(&words(0..1));
    let args = [out, number(64), number(1)];
    stopped(&machine, ILLEGAL_ADDRESS, &["out of bounds"], || {
        machine.run("standin_shared_bounds", [1, 1, 32], &args)
    });
}

#[test]
fn barriers_that_not_all_reach_are_found() {
    let Some(machine) = checked() else { return };
    let out = machine.device(&words(0..64));
    let run =
        |limit: u64, how: u64| machine.run("standin_barriers", [2, 64, 0], &[out, limit, how]);
    for order in ORDERS {
        machine.standin.set_order(order);
        run(64, 0).unwrap();
        for (how, expected) in [
            (0, &["__syncthreads", "ended"][..]),
            (1, &["divergent barrier"]),
            (2, &["deadlock", "__syncthreads", "__shfl_xor_sync"]),
            (3, &["__shfl_xor_sync", "ended"]),
            (4, &["0x0000ffff"]),
        ] {
            stopped(&machine, LAUNCH_FAILED, expected, || run(40, how));
        }
    }
    // A shuffle in a warp that the block does not fill.
    stopped(&machine, LAUNCH_FAILED, &["warp of 8 lanes"], || {
        machine.run("standin_barriers", [1, 40, 0], &[out, 40, 3])
    });
}

#[test]
fn misaligned_accesses_are_found() {
    let Some(machine) = checked() else { return };
    let input = machine.device(&(0..64).collect::<Vec<u8>>());
    let out = machine.device(&[0; 16]);
    for (kernel, bytes) in [("standin_word_at", 4), ("standin_vector_at", 16)] {
        for at in 0..20 {
            let run = || machine.run(kernel, [1, 1, 0], &[out, input, number(at)]);
            if at % bytes == 0 {
                run().unwrap();
            } else {
                assert!(matches!(run(), Err(ILLEGAL_ADDRESS | MISALIGNED)), "{kernel} {at}");
                let found = machine.standin.take_violations();
                assert!(found[0].contains("misaligned"), "{found:?}");
            }
        }
    }
}

#[test]
fn asynchronous_copies_land_at_the_wait_and_not_before() {
    let Some(machine) = checked() else { return };
    if Standin::is_turing() {
        println!("not run: copies are not asynchronous on this target");
        return;
    }
    let n = 64u32;
    let values = || (0..4 * n).map(|i| i as f32 * 0.5);
    let input = machine.device(&values().flat_map(f32::to_le_bytes).collect::<Vec<u8>>());
    let out = machine.device(&vec![0; 16 * n as usize]);
    for order in ORDERS {
        machine.standin.set_order(order);
        let run =
            |fault: i32| machine.run("standin_copies", [1, n, 0], &[out, input, number(fault)]);
        run(0).unwrap();
        let mut expected: Vec<f32> = values().map(|x| 2.0 * x).collect();
        expected.rotate_left(4);
        let expected: Vec<u8> = expected.into_iter().flat_map(f32::to_le_bytes).collect();
        assert_eq!(machine.read(out, 16 * n as usize), expected);
        for (fault, words) in [
            (1, &["race", "on its way"][..]),
            (2, &["race"]),
            (3, &["in flight"]),
            (4, &["race", "on its way"]),
            (5, &["race"]),
        ] {
            stopped(&machine, LAUNCH_FAILED, words, || run(fault));
        }
    }
}

#[test]
fn device_memory_that_another_thread_wrote_needs_an_order() {
    let Some(machine) = checked() else { return };
    let (out, scratch) = (machine.device(&[0; 4 * 128]), machine.device(&[0; 4 * 128]));
    for order in ORDERS {
        machine.standin.set_order(order);
        let run = |mode: u64| {
            let count = machine.device(&[0; 4]);
            machine.run("standin_global", [4, 32, 0], &[out, scratch, count, mode])
        };
        run(0).unwrap();
        stopped(&machine, LAUNCH_FAILED, &["race", "nothing orders"], || run(1));
        stopped(&machine, LAUNCH_FAILED, &["race", "of block"], || run(2));
        for mode in [3, 6] {
            run(mode).unwrap();
            assert_eq!(machine.read_words(out, 32), (0..32).map(|i| 4 * i).collect::<Vec<u32>>());
        }
        stopped(&machine, LAUNCH_FAILED, &["standin_global", "atomicInc"], || run(7));
        run(4).unwrap();
        stopped(&machine, LAUNCH_FAILED, &["race", "writes 4 bytes"], || run(5));
    }
}

#[test]
fn what_a_cpu_and_a_device_answer_differently_is_found() {
    let Some(machine) = checked() else { return };
    let out = machine.device(&[0; 8]);
    let run =
        |by: i32, x: f32| machine.run("standin_undefined", [1, 1, 0], &[out, number(by), float(x)]);
    run(31, -7.9).unwrap();
    assert_eq!(machine.read_words(out, 2), [1 << 31, -7i32 as u32]);
    stopped(&machine, ILLEGAL_ADDRESS, &["shift", "standin_faults.cu:"], || run(32, 0.0));
    stopped(&machine, ILLEGAL_ADDRESS, &["does not fit"], || run(0, 3e9));
    stopped(&machine, ILLEGAL_ADDRESS, &["does not fit"], || run(0, f32::NAN));
}

/// Set for the process that does the fault.
const VICTIM: &str = "PREGATE_STANDIN_VICTIM";

#[test]
fn the_address_sanitizer_ends_a_process_that_touches_what_it_may_not() {
    if !Standin::has_address_sanitizer() {
        println!("not run: this build has checks of its own");
        return;
    }
    if let Ok(fault) = std::env::var(VICTIM) {
        let machine = running().unwrap();
        let input = machine.device(&words(0..32));
        let out = machine.device(&words(0..32));
        let ran = match fault.as_str() {
            "nothing" => machine.run("standin_read", [1, 32, 0], &[out, input, 0]),
            "device" => machine.run("standin_read", [1, 32, 0], &[out, input, 1]),
            "shared" => machine.run("standin_shared_bounds", [1, 1, 32], &[out, 64, 1]),
            _ => machine.run("standin_shared_bounds", [1, 1, 32], &[out, 32, 2]),
        };
        return ran.unwrap();
    }
    for fault in ["nothing", "device", "shared", "dynamic"] {
        let name = "kernels::the_address_sanitizer_ends_a_process_that_touches_what_it_may_not";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(VICTIM, fault)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), fault == "nothing", "{fault}: {said}");
        assert_eq!(
            said.contains("AddressSanitizer: use-after-poison"),
            fault != "nothing",
            "{said}"
        );
    }
}

fn running() -> Option<Machine> {
    let machine = machine()?;
    machine.open().unwrap();
    Some(machine)
}

#[test]
fn kernels_of_macros_and_bounds_are_registered() {
    let Some(machine) = running() else { return };
    let input = machine.device(&[1, 2, 3, 250]);
    let out = machine.device(&[0; 5]);
    machine.run("standin_add_u8", [1, 32, 0], &[out, input, 7, 4]).unwrap();
    assert_eq!(machine.read(out, 4), [8, 9, 10, 1]);
    let row = machine.device(&[0; 4 * 64]);
    machine.run("standin_bounded", [1, 64, 0], &[row]).unwrap();
    assert_eq!(machine.run("standin_bounded", [1, 65, 0], &[row]), Err(1));
    assert_eq!(machine.run("standin_bounded", [1, 0, 0], &[row]), Err(1));
}

#[test]
fn shuffles_move_what_the_guide_says() {
    let Some(machine) = running() else { return };
    let out = machine.device(&[0; 8 * 8 * 32]);
    for order in ORDERS {
        machine.standin.set_order(order);
        machine.run("standin_shuffles", [1, 32, 0], &[out]).unwrap();
        let bytes = machine.read(out, 8 * 8 * 32);
        let found: Vec<i64> =
            bytes.chunks(8).map(|word| i64::from_le_bytes(word.try_into().unwrap())).collect();
        let thirds: i64 = (0..32).filter(|lane| lane % 3 == 0).map(|lane| 1 << lane).sum();
        for lane in 0..32i64 {
            let expected = [
                3 * ((lane * 7 + 3) & 31),
                3 * if lane >= 5 { lane - 5 } else { lane },
                3 * if lane < 27 { lane + 5 } else { lane },
                3 * (lane ^ 9),
                3 * if lane % 8 < 5 { lane + 3 } else { lane },
                (3 * (lane ^ 1)) << 33,
                thirds,
                3,
            ];
            for (row, expected) in expected.into_iter().enumerate() {
                assert_eq!(found[row * 32 + lane as usize], expected, "row {row}, lane {lane}");
            }
        }
    }
}

#[test]
fn matrix_products_are_those_of_the_manual() {
    let Some(machine) = running() else { return };
    let byte = |i: usize, seed: usize| ((i * 37 + seed * 101) % 256) as u8;
    let a: Vec<u8> = (0..16 * 32).map(|i| byte(i, 1)).collect();
    let b: Vec<u8> = (0..8 * 32).map(|i| byte(i * 3, 2)).collect();
    let (left, right) = (machine.device(&a), machine.device(&b));
    let c = machine.device(&words(0..128));
    machine.run("standin_mma_s8", [1, 32, 0], &[c, left, right]).unwrap();
    let found = machine.read_words(c, 128);
    for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
        let sum: i32 = (0..32)
            .map(|k| i32::from(a[row * 32 + k] as i8) * i32::from(b[column * 32 + k] as i8))
            .sum();
        let at = row * 8 + column;
        assert_eq!(found[at] as i32, at as i32 + sum, "{row} {column}");
    }

    // Small integers in f16: every sum is exact, in any order.
    let half = |value: i32| -> u16 {
        let size = value.unsigned_abs();
        let exponent = size.checked_ilog2().unwrap_or(0);
        let bits = if size == 0 {
            0
        } else {
            ((exponent + 15) << 10) | ((size << (10 - exponent)) & 0x3ff)
        };
        bits as u16 | if value < 0 { 0x8000 } else { 0 }
    };
    let value = |i: usize| (i * 29 % 41) as i32 - 20;
    let halves = |n: usize| (0..n).flat_map(|i| half(value(i)).to_le_bytes()).collect::<Vec<u8>>();
    let (left, right) = (machine.device(&halves(256)), machine.device(&halves(128)));
    let c = machine.device(&vec![0; 4 * 128]);
    machine.run("standin_mma_f16", [1, 32, 0], &[c, left, right]).unwrap();
    let found = machine.read_words(c, 128);
    for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
        let sum: i32 = (0..16).map(|k| value(row * 16 + k) * value(column * 16 + k)).sum();
        assert_eq!(f32::from_bits(found[row * 8 + column]), sum as f32, "{row} {column}");
    }
}

#[test]
fn seeds_change_the_order_of_threads_and_blocks_and_nothing_else() {
    let Some(machine) = running() else { return };
    let order_of = |seed: u64| {
        machine.standin.set_order(seed);
        let (order, count) = (machine.device(&[0; 4 * 96]), machine.device(&[0; 4]));
        machine.run("standin_order", [3, 32, 0], &[order, count]).unwrap();
        machine.read_words(order, 96)
    };
    let in_order = order_of(0);
    assert!(in_order.is_sorted(), "{in_order:?}");
    let (first, second) = (order_of(1), order_of(2));
    assert_ne!(first, second);
    for shuffled in [first, second] {
        assert!(!shuffled.is_sorted());
        let mut sorted = shuffled.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, in_order);
        let blocks: Vec<u32> = shuffled.iter().map(|thread| thread / 32).collect();
        let changes = blocks.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert_eq!(changes, 2, "blocks run one after the other");
    }
}

#[test]
fn shared_memory_holds_poison_in_every_block() {
    let Some(machine) = running() else { return };
    let out = machine.device(&vec![0; 4 * 64 * 3]);
    machine.standin.set_order(0);
    machine.run("standin_unwritten", [3, 64, 0], &[out]).unwrap();
    assert!(machine.read_words(out, 64 * 3).iter().all(|word| *word == 0xcdcd_cdcd));
    // Other seeds know other poisons, but never what another block has left.
    machine.standin.set_order(3);
    machine.run("standin_unwritten", [3, 64, 0], &[out]).unwrap();
    let bytes = machine.read(out, 4 * 64 * 3);
    assert!(bytes.iter().all(|byte| [0xcd, 0xff, 0x7f, 0x00].contains(byte)));
}

#[test]
fn halves_convert_exactly_and_round_to_even() {
    let Some(machine) = running() else { return };
    let (wide, back) = (machine.device(&vec![0; 4 << 16]), machine.device(&vec![0; 2 << 16]));
    machine.run("standin_halves", [256, 256, 0], &[wide, back]).unwrap();
    let (wide, back) = (machine.read_words(wide, 1 << 16), machine.read(back, 2 << 16));
    for half in 0..=u16::MAX {
        let (sign, exponent, rest) = (half >> 15, (half >> 10) & 31, half & 1023);
        let size = match exponent {
            0 => f64::from(rest) * 2f64.powi(-24),
            31 if rest == 0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1.0 + f64::from(rest) / 1024.0) * 2f64.powi(i32::from(exponent) - 15),
        };
        let expected = if sign == 1 { -size } else { size };
        let found = f32::from_bits(wide[usize::from(half)]);
        let again =
            u16::from_le_bytes([back[2 * usize::from(half)], back[2 * usize::from(half) + 1]]);
        if expected.is_nan() {
            assert!(found.is_nan() && again & 0x7c00 == 0x7c00 && again & 1023 != 0);
        } else {
            assert_eq!(f64::from(found).to_bits(), expected.to_bits(), "{half:04x}");
            assert_eq!(again, half);
        }
    }
    let cases = [
        (65504.0f32, 0x7bff),
        (65519.996, 0x7bff),
        (65520.0, 0x7c00),
        (-1e30, 0xfc00),
        (2f32.powi(-25), 0x0000),
        (2f32.powi(-25) * 1.5, 0x0001),
        (2f32.powi(-24) * 1.5, 0x0002),
        (6.1e-5, 0x03ff),
        (1.0 + 2f32.powi(-11), 0x3c00),
        (1.0 + 3.0 * 2f32.powi(-11), 0x3c02),
        (-0.0, 0x8000),
    ];
    let input =
        machine.device(&cases.iter().flat_map(|case| case.0.to_le_bytes()).collect::<Vec<u8>>());
    let out = machine.device(&vec![0; 2 * cases.len()]);
    let n = number(cases.len() as i32);
    machine.run("standin_to_half", [1, 32, 0], &[out, input, n]).unwrap();
    let found = machine.read(out, 2 * cases.len());
    for (case, found) in cases.iter().zip(found.chunks(2)) {
        assert_eq!(u16::from_le_bytes([found[0], found[1]]), case.1, "{}", case.0);
    }
}

#[test]
fn nothing_is_fused_unless_it_says_so() {
    let Some(machine) = running() else { return };
    let out = machine.device(&[0; 8]);
    // The product rounds to 1: the fused sum keeps what that loses.
    let (b, c) = (1.0 + f32::EPSILON, 1.0 - f32::EPSILON);
    machine.run("standin_roundings", [1, 1, 0], &[out, float(-1.0), float(b), float(c)]).unwrap();
    let found = machine.read_words(out, 2).into_iter().map(f32::from_bits).collect::<Vec<_>>();
    assert_eq!(found, [-1.0 + b * c, b.mul_add(c, -1.0)]);
    assert_ne!(found[0], found[1]);
}
