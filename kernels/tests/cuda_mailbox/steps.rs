//! Whole steps: the answers are the CPU's, whatever was resident, came in the
//! step, or was computed by the host.

use crate::lab::assert_same_bits;
use crate::machine::{
    AHEAD, DRAINS, Drain, EXPERTS, HIDDEN, K, LAYERS, Machine, PITCH, Token, open, position,
};
use pregate_kernels::contract;
use pregate_kernels::cuda::{
    Decision, Graph, Link, LinkOptions, Part, Posted, StepError, Transfer, Urgency,
};
use pregate_kernels::testing::Random;
use std::thread;
use std::time::Duration;

/// What the host knows, and decides at random.
pub struct Host {
    random: Random,
    /// `[LAYERS * EXPERTS]`: what `slot_of` must hold in this step.
    slots: Vec<u32>,
    posted: Posted,
}

impl Host {
    pub fn new(machine: &Machine, seed: u64) -> Self {
        let slots = vec![0; LAYERS * EXPERTS];
        Self { random: Random::new(seed), slots, posted: machine.mailbox.posted() }
    }

    /// Changes some entries; what `begin_step` is told.
    fn updates(&mut self, machine: &Machine, step: u32) -> Vec<(u32, u32)> {
        let mut updates = Vec::new();
        for index in 0..LAYERS * EXPERTS {
            let entry = machine.entry(index / EXPERTS, index % EXPERTS);
            // Now and then everything is resident, or nothing.
            let wanted = match (step % 8, self.random.below(4)) {
                (5, _) => entry,
                (6, _) => 0,
                (_, 0) => entry - self.slots[index],
                _ => self.slots[index],
            };
            if wanted != self.slots[index] || self.random.below(6) == 0 {
                updates.push((index as u32, wanted));
            }
            self.slots[index] = wanted;
        }
        updates
    }

    /// Answers a layer that was posted, which is checked; what the layer makes
    /// of `x`.
    fn answer(&mut self, machine: &Machine, layer: usize, token: &Token, x: &[f32]) -> Vec<f32> {
        let Posted { step, missing, ids, weights, ahead, .. } = &self.posted;
        let what = format!("step {step}, layer {layer}");
        assert_eq!(ids[..], token.ids[layer], "{what}");
        assert_same_bits(weights, &token.weights[layer], &what);
        for row in 0..AHEAD {
            let wanted = &token.logits[layer][row * PITCH..][..EXPERTS];
            assert_same_bits(&ahead[row * EXPERTS..][..EXPERTS], wanted, &what);
        }
        let slots = &self.slots[layer * EXPERTS..];
        let absent = |choice: usize| u32::from(slots[ids[choice] as usize] == 0) << choice;
        assert_eq!(*missing, (0..K).map(absent).sum::<u32>(), "{what}");
        if *missing != 0 {
            assert_same_bits(&self.posted.x, x, &what);
        }
        let mut rows: Vec<_> = (0..K)
            .map(|choice| machine.answer(layer, token.ids[layer][choice] as usize, x))
            .collect();
        let mut order: Vec<usize> = (0..K).filter(|choice| missing >> choice & 1 == 1).collect();
        while !order.is_empty() {
            let choice = order.swap_remove(self.random.below(order.len()));
            let word = layer * K + choice;
            if self.random.below(2) == 0 {
                let entry = machine.entry(layer, token.ids[layer][choice] as usize);
                Decision::Resident(entry).tell(&machine.decisions, word, *step);
                continue;
            }
            // Not what the device would have computed.
            rows[choice].iter_mut().for_each(|value| *value += 0.5);
            machine.rows.write_floats(machine.row_at(layer, choice), &rows[choice]);
            Decision::Host.tell(&machine.decisions, word, *step);
        }
        let mut sums = vec![0.0; HIDDEN];
        let parts: Vec<_> = token.weights[layer].into_iter().zip(rows).collect();
        contract::combine(&parts, &mut sums);
        x.iter().zip(sums).map(|(x, sum)| x + sum).collect()
    }

    /// A whole step; `idle` is what it does while it waits.
    fn run(&mut self, machine: &Machine, step: u32, token: &Token, idle: impl Fn()) -> Vec<f32> {
        let mut x = token.x.clone();
        for layer in 0..LAYERS {
            let at = layer * machine.mailbox.bytes();
            while !machine.mailbox.read(&machine.mailboxes, at, step, &mut self.posted) {
                idle();
            }
            assert_eq!(self.posted.step, step);
            x = self.answer(machine, layer, token, &x);
        }
        x
    }
}

/// One step; `beside`: another thread waits for the device meanwhile, and the
/// host does not ask for it. Only this thread is at the mapped blocks.
pub fn run_step(
    machine: &Machine,
    graph: Option<&Graph>,
    host: &mut Host,
    step: u32,
    beside: bool,
) {
    let token = Token::random(&mut host.random);
    let updates = host.updates(machine, step);
    machine.prepare(step, &token, &updates);
    let stream = machine.lab.device.compute();
    match graph {
        Some(graph) => graph.launch(stream).unwrap(),
        None => machine.launch().unwrap(),
    }
    let wanted = if beside {
        thread::scope(|scope| {
            let device = scope.spawn(|| stream.synchronize().unwrap());
            let wanted = host.run(machine, step, &token, thread::yield_now);
            device.join().unwrap();
            wanted
        })
    } else {
        host.run(machine, step, &token, || assert!(!stream.query().unwrap(), "it waits"))
    };
    let what = format!("step {step}, graph {}, beside {beside}", graph.is_some());
    assert_same_bits(&machine.lab.read_floats(&machine.x()), &wanted, &what);
    assert_eq!(machine.read_words(), [step.cast_signed(), position(step) as i32, 0, 0], "{what}");
    let slots: Vec<u32> =
        machine.lab.read_ints(&machine.slot_of).into_iter().map(i32::cast_unsigned).collect();
    assert_eq!(slots, host.slots, "{what}");
    assert_eq!(StepError::read(&machine.error, 0), None, "{what}");
}

#[test]
fn a_captured_step_serves_every_token() {
    for drain in DRAINS {
        let Some((standin, lab)) = open(drain) else { return };
        let machine = Machine::new(lab, &mut Random::new(1));
        let graph = machine.capture();
        let mut host = Host::new(&machine, 2);
        for step in 1..=16 {
            run_step(&machine, Some(&graph), &mut host, step, step % 2 == 0);
        }
        // From the largest number on: it is compared for equality alone.
        run_step(&machine, Some(&graph), &mut host, u32::MAX, false);
        if let Some(standin) = &standin {
            assert_eq!(standin.launches_of("settle"), 17 * LAYERS as u64, "{drain:?}");
            assert_eq!(standin.violations(), Vec::<String>::new(), "{drain:?}");
        }
    }
}

#[test]
fn launches_one_by_one_do_the_same() {
    for drain in DRAINS {
        let Some((standin, lab)) = open(drain) else { return };
        let machine = Machine::new(lab, &mut Random::new(3));
        let mut host = Host::new(&machine, 4);
        for step in 1..=8 {
            run_step(&machine, None, &mut host, step, step % 2 == 0);
        }
        if let Some(standin) = &standin {
            assert_eq!(standin.violations(), Vec::<String>::new(), "{drain:?}");
        }
    }
}

/// Whether the mailbox of a layer has this step within some questions.
fn comes(machine: &Machine, layer: usize, step: u32) -> bool {
    let at = layer * machine.mailbox.bytes();
    (0..200).any(|_| {
        machine.lab.device.compute().query().unwrap();
        machine.mailbox.is_posted(&machine.mailboxes, at, step)
    })
}

#[test]
fn a_layer_waits_for_the_decision_of_every_missing_choice() {
    for drain in DRAINS {
        let Some((standin, lab)) = open(drain) else { return };
        // A GPU goes on without questions.
        if standin.is_none() {
            return;
        }
        let machine = Machine::new(lab, &mut Random::new(5));
        let graph = machine.capture();
        let token = Token::random(&mut Random::new(6));
        for step in 1..=3 {
            machine.prepare(step, &token, &[]);
            graph.launch(machine.lab.device.compute()).unwrap();
            assert!(comes(&machine, 0, step));
            for choice in 0..K {
                assert!(!comes(&machine, 1, step), "{drain:?}: {choice} of {K} were decided");
                // A decision of another step is none.
                Decision::Host.tell(&machine.decisions, choice, step + 1);
                assert!(!comes(&machine, 1, step), "{drain:?}");
                Decision::Host.tell(&machine.decisions, choice, step);
            }
            assert!(comes(&machine, 1, step), "{drain:?}");
            Decision::give_up(&machine.decisions, K..2 * K, step);
            machine.lab.device.compute().synchronize().unwrap();
        }
    }
}

#[test]
fn a_block_that_is_published_meanwhile_is_resident_for_later_layers() {
    for drain in DRAINS {
        let Some((standin, lab)) = open(drain) else { return };
        let machine = Machine::new(lab, &mut Random::new(7));
        let graph = machine.capture();
        let mut link = Link::new(
            &machine.lab.device,
            &LinkOptions { chunk_bytes: 4096, thread: false, ..LinkOptions::default() },
        )
        .unwrap();
        for step in 1..=3 {
            let token = Token::random(&mut Random::new(8 + u64::from(step)));
            // Nothing is resident, and what was in the blocks is no number.
            let none: Vec<_> = (0..(LAYERS * EXPERTS) as u32).map(|index| (index, 0)).collect();
            machine.prepare(step, &token, &none);
            machine.lab.device.compute().fill(&machine.arena, 0xff).unwrap();
            // No memory is taken while the device waits.
            let memory: Vec<_> = (token.ids[1].iter())
                .map(|_| machine.lab.device.pinned(machine.block_bytes).unwrap())
                .collect();
            graph.launch(machine.lab.device.compute()).unwrap();
            let mut posted = machine.mailbox.posted();
            while !machine.mailbox.read(&machine.mailboxes, 0, step, &mut posted) {
                machine.lab.device.compute().query().unwrap();
            }
            assert_eq!(posted.missing, 7);
            // Layer 0 waits; layer 1's experts come.
            for (id, mut memory) in token.ids[1].into_iter().zip(memory) {
                memory.copy_from_slice(&machine.contents(1, id as usize));
                let word = 4 * id as usize..4 * id as usize + 4;
                link.submit(Transfer {
                    key: id as u64,
                    memory,
                    parts: vec![Part { from: 0..machine.block_bytes, to: 0 }],
                    destination: machine.arena.part(machine.place(1, id as usize)),
                    urgency: Urgency::Demand,
                    after: None,
                    publish: Some((machine.slots(1).part(word), machine.entry(1, id as usize))),
                });
            }
            // Nor is it freed.
            let mut memory = Vec::new();
            while let Some(landed) = link.next(u64::MAX) {
                landed.result.unwrap();
                memory.push(landed.memory);
            }
            let mut x = token.x.clone();
            for choice in 0..K {
                let row = vec![0.0; HIDDEN];
                machine.rows.write_floats(machine.row_at(0, choice), &row);
                Decision::Host.tell(&machine.decisions, choice, step);
            }
            machine.lab.device.compute().synchronize().unwrap();
            let mut sums = vec![0.0; HIDDEN];
            let rows = token.ids[1].map(|id| machine.answer(1, id as usize, &x));
            let parts: Vec<_> = token.weights[1].into_iter().zip(rows).collect();
            contract::combine(&parts, &mut sums);
            x.iter_mut().zip(sums).for_each(|(x, sum)| *x += sum);
            assert_same_bits(&machine.lab.read_floats(&machine.x()), &x, &format!("{drain:?}"));
            assert_eq!(machine.read_masks(), [0, 0]);
        }
        if let Some(standin) = &standin {
            assert_eq!(standin.violations(), Vec::<String>::new(), "{drain:?}");
        }
    }
}

#[test]
fn a_host_that_does_not_answer_ends_the_step_with_an_error() {
    let Some((standin, lab)) = open(Drain::Lazy) else { return };
    let mut machine = Machine::new(lab, &mut Random::new(9));
    // On the stand-in, how often a launch goes on; two tenths of a second.
    machine.patience = Duration::from_nanos(if standin.is_some() { 100 } else { 200_000_000 });
    let graph = machine.capture();
    let token = Token::random(&mut Random::new(10));
    let stream = machine.lab.device.compute();
    machine.prepare(1, &token, &[]);
    graph.launch(stream).unwrap();
    // One of three is not decided.
    for choice in [0, 2] {
        Decision::Host.tell(&machine.decisions, choice, 1);
    }
    let questions = (1..).find(|_| stream.query().unwrap());
    if standin.is_some() {
        // The second layer does not wait again.
        assert!((100..190).contains(&questions.unwrap()), "{questions:?}");
    }
    assert_eq!(StepError::read(&machine.error, 0), Some(StepError::Late { step: 1 }));
    assert_eq!(machine.read_masks(), [7, 7], "all are the host's");
    // The next step is one as any other.
    let mut host = Host::new(&machine, 11);
    machine.error.store_release(0, 0);
    run_step(&machine, Some(&graph), &mut host, 2, true);
    // An error of another step takes no step's patience.
    machine.error.store_release(0, 2 << 32 | 1);
    machine.prepare(3, &token, &[(0, 0)]);
    graph.launch(stream).unwrap();
    if standin.is_some() {
        let questions = (1..300).find(|_| stream.query().unwrap());
        assert!(questions.is_some_and(|questions| questions > 100), "{questions:?}");
    }
    stream.synchronize().unwrap();
}

#[test]
fn a_step_that_is_given_up_ends() {
    for drain in DRAINS {
        let Some((_standin, lab)) = open(drain) else { return };
        let machine = Machine::new(lab, &mut Random::new(14));
        let graph = machine.capture();
        let token = Token::random(&mut Random::new(15));
        let stream = machine.lab.device.compute();
        machine.prepare(1, &token, &[]);
        graph.launch(stream).unwrap();
        assert!(!stream.query().unwrap());
        Decision::give_up(&machine.decisions, 0..LAYERS * K, 1);
        stream.synchronize().unwrap();
        assert_eq!(StepError::read(&machine.error, 0), None);
        assert!(comes(&machine, LAYERS - 1, 1));
        let mut host = Host::new(&machine, 16);
        run_step(&machine, Some(&graph), &mut host, 2, false);
    }
}

#[test]
fn a_decision_for_a_block_outside_the_arena_is_an_error() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let machine = Machine::new(lab, &mut Random::new(12));
    let token = Token::random(&mut Random::new(13));
    let last = (machine.arena.bytes() - machine.block_bytes) / 256 + 1;
    for (step, entry) in [(1, last as u32 + 1), (2, u32::MAX), (3, u32::MAX - 1)] {
        machine.prepare(step, &token, &[]);
        machine.launch().unwrap();
        for choice in 0..LAYERS * K {
            let row = vec![0.25; HIDDEN];
            machine.rows.write_floats(4 * choice * HIDDEN, &row);
            Decision::Resident(entry).tell(&machine.decisions, choice, step);
        }
        machine.lab.device.compute().synchronize().unwrap();
        assert_eq!(StepError::read(&machine.error, 0), Some(StepError::BadEntry { step }));
        assert_eq!(machine.read_masks(), [7, 7]);
        let x = machine.lab.read_floats(&machine.x());
        assert!(x.iter().all(|value| value.is_finite()), "the host's rows");
    }
}
