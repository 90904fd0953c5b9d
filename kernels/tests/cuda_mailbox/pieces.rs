//! The kernels one by one.

use crate::lab::assert_same_bits;
use crate::machine::{Drain, EXPERTS, HIDDEN, K, LAYERS, Machine, Token, UPDATES, open};
use pregate_kernels::contract;
use pregate_kernels::cuda::{
    BeginStep, Combine, Decision, HostRows, MailboxLayout, Post, StepLayout, begin_step, combine,
    post,
};
use pregate_kernels::testing::Random;

fn finish(machine: &Machine) {
    machine.lab.device.compute().synchronize().unwrap();
}

#[test]
fn a_step_begins_with_its_inputs_and_updates() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let mut random = Random::new(1);
    // One block of threads, many, none at all.
    for (step, (updates, words, entries)) in
        [(0, 0, 1), (1, 3, 5), (300, 1, 700), (5000, 3000, 4000), (7, 9000, 7)].iter().enumerate()
    {
        let layout = StepLayout { updates: *updates, input_bytes: 4 * words };
        let block = lab.device.mapped(layout.bytes()).unwrap();
        let bytes: Vec<u8> = (0..4 * words).map(|_| random.bits() as u8).collect();
        block.write(layout.inputs_at(), &bytes);
        let mut wanted: Vec<i32> = (0..*entries).map(|i| 1000 + i).collect();
        // Two more than there are entries.
        wanted.extend([-1, -1]);
        let (slots, inputs) = (lab.ints(&wanted), lab.space(4 * words));
        let step_words = lab.cells(4);
        // Every index once at most, in no order; some are no index.
        let mut indices: Vec<u32> = (0..*entries as u32 + 2).collect();
        let mut list = Vec::new();
        while list.len() < *updates && !indices.is_empty() {
            let index = indices.swap_remove(random.below(indices.len()));
            list.push((index, random.bits() as u32));
        }
        for (index, entry) in &list {
            if let Some(slot) = wanted[..*entries as usize].get_mut(*index as usize) {
                *slot = entry.cast_signed();
            }
        }
        let (step, position) = (step as u32 + 1, 31 * step + 5);
        layout.write(&block, step, position, &list).unwrap();
        let call = BeginStep {
            layout,
            block: &block.span(),
            slot_of: &slots.part(0..4 * *entries as usize),
            words: &step_words,
            inputs: &inputs,
        };
        begin_step(&lab.device, lab.device.compute(), call).unwrap();
        assert_eq!(lab.read_ints(&step_words), [step as i32, position as i32, 0, 0]);
        assert!(lab.read(&inputs) == bytes, "{words} words");
        assert_eq!(lab.read_ints(&slots), wanted, "{updates} updates");
    }
}

#[test]
fn a_count_of_updates_is_no_larger_than_their_room() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let machine = Machine::new(lab, &mut Random::new(2));
    let token = Token::random(&mut Random::new(3));
    // All the room is used: what lies behind it is no update.
    let index = |i: u32| if i < 12 { i } else { 100 + i };
    let updates: Vec<_> = (0..UPDATES as u32).map(|i| (index(i), 50 + i)).collect();
    machine.prepare(1, &token, &updates);
    for count in [u32::MAX, 1 << 31, UPDATES as u32 + 1] {
        machine.block.write(8, &count.to_ne_bytes());
        machine.begin().unwrap();
        let slots = machine.lab.read_ints(&machine.slot_of);
        assert_eq!(slots, (50..62).collect::<Vec<i32>>(), "{count}");
    }
}

#[test]
fn what_is_no_block_or_no_expert_is_missing() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let machine = Machine::new(lab, &mut Random::new(4));
    let mut token = Token::random(&mut Random::new(5));
    let stream = machine.lab.device.compute();
    let last = (machine.arena.bytes() - machine.block_bytes) / 256;
    let base = machine.arena.address();
    let cases = [
        // Entries, ids, the mask.
        ([1, 2, last as u32 + 1], [0, 1, 2], 0),
        ([1, 2, last as u32 + 2], [2, 0, 1], 0b001),
        ([0, u32::MAX, 1 << 31], [0, 1, 2], 0b111),
        ([1, 2, 3], [0, -1, 2], 0b010),
        ([1, 2, 3], [EXPERTS as i32, i32::MIN, i32::MAX], 0b111),
    ];
    for (step, (entries, ids, mask)) in (1..).zip(cases) {
        token.ids[0] = ids;
        let updates: Vec<(u32, u32)> = (0..).zip(entries).collect();
        machine.prepare(step, &token, &updates);
        let blank = vec![0x5a; LAYERS * machine.mailbox.bytes()];
        machine.mailboxes.write(0, &blank);
        let before = machine.read_tables()[0].clone();
        machine.begin().unwrap();
        assert!(!machine.mailbox.is_posted(&machine.mailboxes, 0, step));
        machine.post(0).unwrap();
        stream.synchronize().unwrap();
        let mut posted = machine.mailbox.posted();
        assert!(machine.mailbox.read(&machine.mailboxes, 0, step, &mut posted));
        assert_eq!((posted.missing, posted.ids.as_slice()), (mask, &ids[..]), "{entries:?}");
        assert_eq!(machine.read_masks()[0], mask);
        // Entries of ids that were not chosen stay as they are.
        let mut table = before;
        for (choice, id) in ids.iter().enumerate() {
            if let Some(entry) = usize::try_from(*id).ok().filter(|id| *id < EXPERTS) {
                let is_missing = mask >> choice & 1 == 1;
                table[entry] =
                    if is_missing { 0 } else { base + 256 * (u64::from(entries[entry]) - 1) };
            }
        }
        assert_eq!(machine.read_tables()[0], table, "{entries:?}, {ids:?}");
        let mut bytes = vec![0; machine.mailbox.bytes()];
        machine.mailboxes.read(0..bytes.len(), &mut bytes);
        let blanks = bytes.iter().filter(|byte| **byte == 0x5a).count();
        assert_eq!(blanks >= 4 * HIDDEN, mask == 0, "the state goes where it is needed");
        // A decision does not help an id that is none.
        for choice in 0..K {
            Decision::Resident(1).tell(&machine.decisions, choice, step);
        }
        machine.settle(0).unwrap();
        finish(&machine);
        let [_, late] = machine.read_tables();
        for (choice, id) in ids.iter().enumerate() {
            if let Some(address) = usize::try_from(*id).ok().and_then(|id| late.get(id)) {
                let is_late = mask >> choice & 1 == 1;
                assert_eq!(*address, if is_late { base } else { 0 }, "{ids:?}");
            }
        }
        assert_eq!(machine.read_masks()[1], 0);
    }
}

#[test]
fn a_layer_without_forecasts_and_of_other_sizes_is_posted() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let mut random = Random::new(6);
    for (step, (k, hidden, experts)) in
        [(1, 1, 1), (32, 700, 40), (8, 256, 128), (5, 3, 512)].iter().copied().enumerate()
    {
        let layout = MailboxLayout { k, hidden, ahead: 0, experts: 0 };
        let mailbox = lab.device.mapped(layout.bytes()).unwrap();
        let x: Vec<f32> = (0..hidden).map(|_| random.normal()).collect();
        let weights: Vec<f32> = (0..k).map(|_| random.normal()).collect();
        let mut all: Vec<i32> = (0..experts as i32).collect();
        let ids: Vec<i32> = (0..k).map(|_| all.swap_remove(random.below(all.len()))).collect();
        let slots: Vec<i32> = (0..experts).map(|_| random.below(3) as i32).collect();
        let arena = lab.zeros(1000);
        let step = step as u32 + 1;
        let (table, missing) = (lab.zeros(8 * experts), lab.cells(1));
        let call = Post {
            layout,
            mailbox: &mailbox.span(),
            words: &lab.ints(&[step as i32, 0, 0, 0]),
            ids: &lab.ints(&ids),
            weights: &lab.floats(&weights),
            slot_of: &lab.ints(&slots),
            arena: pregate_kernels::cuda::ExpertArena { span: &arena, block_bytes: 300 },
            table: &table,
            missing: &missing,
            ahead: None,
            x: &lab.floats(&x),
        };
        post(&lab.device, lab.device.compute(), call).unwrap();
        lab.device.compute().synchronize().unwrap();
        let mut posted = layout.posted();
        assert!(layout.read(&mailbox, 0, step, &mut posted));
        assert!(!layout.is_posted(&mailbox, 0, step + 1));
        let absent = (0..k).filter(|choice| slots[ids[*choice] as usize] == 0);
        assert_eq!(posted.missing, absent.map(|choice| 1 << choice).sum::<u32>());
        assert_eq!(lab.read_ints(&missing), [posted.missing.cast_signed()]);
        assert_eq!(posted.ids, ids);
        assert_same_bits(&posted.weights, &weights, &k);
        if posted.missing != 0 {
            assert_same_bits(&posted.x, &x, &hidden);
        }
    }
}

#[test]
fn combine_takes_the_rows_of_the_host_where_it_is_told_to() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let mut random = Random::new(7);
    for (k, hidden) in [(1, 1), (3, 128), (8, 300), (32, 129)] {
        let mut floats = |count: usize| (0..count).map(|_| random.normal()).collect::<Vec<_>>();
        let (answers, host, weights) = (floats(k * hidden), floats(k * hidden), floats(k));
        let rows = lab.device.mapped(4 * k * hidden).unwrap();
        rows.write_floats(0, &host);
        let full = u32::MAX >> (32 - k);
        for mask in [0, full, random.bits() as u32 & full, random.bits() as u32 & full] {
            let out = lab.space(4 * hidden);
            let call = Combine {
                tokens: 1,
                k,
                hidden,
                answers: &lab.floats(&answers),
                weights: &lab.floats(&weights),
                shared: None,
                residual: None,
                out: Some(&out),
                host: Some(HostRows {
                    rows: &rows.span(),
                    from_host: &lab.ints(&[mask.cast_signed()]),
                }),
            };
            combine(&lab.device, lab.device.compute(), call).unwrap();
            let row = |choice: usize| {
                let from = if mask >> choice & 1 == 1 { &host } else { &answers };
                (weights[choice], from[choice * hidden..][..hidden].to_vec())
            };
            let mut sums = vec![0.0; hidden];
            contract::combine(&(0..k).map(row).collect::<Vec<_>>(), &mut sums);
            assert_same_bits(&lab.read_floats(&out), &sums, &format!("{k}, {mask:b}"));
        }
    }
}
