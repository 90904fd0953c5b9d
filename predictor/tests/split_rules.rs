//! What the split promises whatever the machine is: the answers' form, hostile
//! values, copies under way, prompts, the report, and memory.

#[path = "../../runtime/tests/support/counting_allocator.rs"]
mod counting_allocator;

use counting_allocator::peak_bytes;
use pregate_predictor::split::{
    Asked, Choice, Chunk, ChunkOutcome, Keep, Miss, Options, Outcome, Place, Reason, Seed, Spare,
    Split,
};
use pregate_predictor::{Admission, ExpertId, LayerShape, Shape};
use proptest::prelude::*;

#[global_allocator]
static ALLOCATOR: counting_allocator::Counting = counting_allocator::Counting;

/// ns of an expert in these tests: on the CPU, and of its copy.
const CPU_NS: u64 = 100_000;
const COPY_NS: u64 = 300_000;

/// Two shapes and a dense layer.
fn shape() -> Shape {
    let layer = |expert_bytes| LayerShape { experts: 64, top_k: 4, expert_bytes, class: 0 };
    let [small, large] = [layer(1_000_000), layer(2_000_000)].map(Some);
    Shape { layers: vec![None, small, large, small, small] }
}

/// What the tests' machine is found to be.
fn seed() -> Seed {
    Seed {
        cpu_start_ns: 0.0,
        cpu_ns_per_byte: CPU_NS as f64 / 1e6,
        link_start_ns: 0.0,
        link_ns_per_byte: COPY_NS as f64 / 1e6,
        ..Seed::default()
    }
}

fn misses(count: u32) -> Vec<Miss> {
    (0..count).map(|expert| Miss { expert, remaining_ns: None }).collect()
}

fn asked(layer: usize, misses: &[Miss]) -> Asked<'_> {
    Asked { layer, misses, resident: 32, frames: 64, queue_ns: 0, hidden_ns: 0 }
}

/// What a machine with these prices and no contention does.
fn outcome(choice: &Choice, waited_ns: u64) -> Outcome {
    let [cpu, copies, waits] =
        [Place::Cpu, Place::Link, Place::Wait].map(|place| choice.count(place));
    let [cpu_ns, copy_ns] = [CPU_NS * cpu as u64, COPY_NS * copies as u64];
    let wait_ns = if waits > 0 { waited_ns } else { 0 };
    let wall_ns = cpu_ns.max(copy_ns).max(wait_ns);
    Outcome { cpu, cpu_ns, copies, copy_ns, waits, wait_ns, wall_ns, ..Outcome::default() }
}

/// A split that has seen `tokens` tokens with `count` misses in layer 1.
fn taught(count: u32, tokens: usize) -> (Split, Choice) {
    let mut split = Split::new(&shape(), &seed(), Options::default());
    let mut choice = Choice::default();
    for _ in 0..tokens {
        split.next_token();
        let misses = misses(count);
        split.choose(&asked(1, &misses), &mut choice);
        split.measured(1, &outcome(&choice, 0));
    }
    (split, choice)
}

#[test]
fn both_workers_end_together() {
    // Three on the CPU take as long as one copy.
    let (mut split, mut choice) = taught(4, 64);
    let misses = misses(4);
    split.choose(&asked(1, &misses), &mut choice);
    assert_eq!([choice.count(Place::Cpu), choice.count(Place::Link)], [3, 1], "{}", choice.reason);
    assert!(matches!(choice.reason, Reason::Shared { cpu: 3, link: 1, .. }), "{:?}", choice.reason);
    let off = choice.expected_ns as f64 / (3 * CPU_NS) as f64 - 1.0;
    assert!(off.abs() < 0.1, "{} expected", choice.expected_ns);
}

#[test]
fn a_busy_link_and_missing_frames_leave_all_to_the_cpu() {
    let (mut split, mut choice) = taught(4, 64);
    let misses = misses(4);
    split.choose(&Asked { queue_ns: 10 * COPY_NS, ..asked(1, &misses) }, &mut choice);
    assert_eq!(choice.count(Place::Link), 0, "{}", choice.reason);
    split.choose(&Asked { frames: 0, ..asked(1, &misses) }, &mut choice);
    assert_eq!(choice.count(Place::Link), 0, "{}", choice.reason);
    split.choose(&asked(1, &misses), &mut choice);
    assert_eq!(choice.count(Place::Link), 1, "{}", choice.reason);
}

/// Behind other work of the GPU a copy costs nothing, and what is used again
/// is worth something.
#[test]
fn copies_hide_behind_other_work() {
    let (mut split, mut choice) = taught(4, 64);
    let misses = misses(4);
    for _ in 0..64 {
        split.next_token();
        split.routed(1, &[0, 1, 2, 3]);
        split.choose(&asked(1, &misses), &mut choice);
        split.measured(1, &outcome(&choice, 0));
    }
    split.choose(&Asked { hidden_ns: 10 * COPY_NS, ..asked(1, &misses) }, &mut choice);
    assert_eq!(choice.count(Place::Link), 4, "{}", choice.reason);
    assert_eq!(choice.expected_ns, 10 * COPY_NS);
}

#[test]
fn a_copy_that_lands_soon_is_waited_for_and_a_late_one_is_not() {
    let (mut split, mut choice) = taught(4, 64);
    let soon =
        |ns| [Miss { expert: 9, remaining_ns: Some(ns) }, Miss { expert: 3, remaining_ns: None }];
    split.choose(&asked(1, &soon(CPU_NS / 2)), &mut choice);
    assert_eq!(choice.places, [Place::Wait, Place::Cpu], "{}", choice.reason);
    split.choose(&asked(1, &soon(50 * COPY_NS)), &mut choice);
    assert_eq!(choice.places, [Place::Cpu, Place::Cpu], "{}", choice.reason);
    let alone = [Miss { expert: 9, remaining_ns: Some(CPU_NS / 2) }];
    split.choose(&asked(1, &alone), &mut choice);
    assert!(matches!(choice.reason, Reason::AllWait(_)), "{:?}", choice.reason);
}

#[test]
fn dense_layers_unknown_layers_and_no_misses_are_no_decisions() {
    let (mut split, mut choice) = taught(4, 8);
    let four = misses(4);
    for layer in [0, 5, usize::MAX] {
        split.choose(&asked(layer, &four), &mut choice);
        assert_eq!(choice.places, [Place::Cpu; 4]);
        assert!(matches!(choice.reason, Reason::Nothing));
    }
    split.choose(&asked(1, &[]), &mut choice);
    assert!(choice.places.is_empty() && choice.expected_ns == 0);
    let before = split.report();
    split.measured(0, &Outcome { cpu: 1, cpu_ns: 1, ..Outcome::default() });
    split.measured(99, &Outcome { cpu: 1, cpu_ns: 1, ..Outcome::default() });
    assert_eq!(split.report(), before);
}

/// What is used again soon is worth its copy, what is not is left to the CPU:
/// the same prices, other texts.
#[test]
fn an_expert_that_is_used_again_is_copied() {
    let copies = |again: bool| {
        let prices = Seed { link_ns_per_byte: 1.7 * CPU_NS as f64 / 1e6, ..seed() };
        let mut split = Split::new(&shape(), &prices, Options::default());
        let mut choice = Choice::default();
        let (mut slots, mut copied) = (vec![60, 61, 62, 63], 0);
        for token in 0..256u32 {
            split.next_token();
            // Eight tokens with the same expert, or each with another.
            let expert = if again { token / 8 % 48 } else { token * 7 % 48 };
            split.routed(1, &[expert]);
            if slots.contains(&expert) {
                continue;
            }
            let one = [Miss { expert, remaining_ns: None }];
            split.choose(&Asked { resident: 4, ..asked(1, &one) }, &mut choice);
            let link = choice.count(Place::Link);
            let copy_ns = link as u64 * CPU_NS * 17 / 10;
            let cpu_ns = (1 - link) as u64 * CPU_NS;
            let wall_ns = copy_ns.max(cpu_ns);
            let (cpu, copies) = (1 - link, link);
            split.measured(
                1,
                &Outcome { cpu, cpu_ns, copies, copy_ns, wall_ns, ..Outcome::default() },
            );
            if link == 1 {
                let victim = ExpertId::new(1, slots.remove(0));
                slots.push(expert);
                split.admitted(1, expert, &Admission::Replaced(victim));
                copied += usize::from(token >= 128);
            }
        }
        copied
    };
    // Of 16 experts that come in the second half, seven uses follow each.
    assert!(copies(true) >= 14, "{}", copies(true));
    // Of 128.
    assert!(copies(false) <= 12, "{}", copies(false));
}

/// A split of a machine whose link is far too slow for a demand, and whose
/// tokens miss one expert each: again and again the same, or always others.
/// The answer is what `spare` would keep of the next miss.
fn kept_of(again: bool, spare: Spare<'_>, beside: f64) -> Vec<Keep> {
    let prices = Seed { link_ns_per_byte: 3.0 * CPU_NS as f64 / 1e6, ..seed() };
    let mut split = Split::new(&shape(), &prices, Options::default());
    let (mut choice, mut keeps) = (Choice::default(), Vec::new());
    for token in 0..63u32 {
        split.next_token();
        let expert = if again { 7 } else { token };
        split.routed(1, &[expert]);
        let one = [Miss { expert, remaining_ns: None }];
        // No frame is free when it is missed, but for the first measurements.
        let frames = if token < 16 { 1 } else { 0 };
        split.choose(&Asked { resident: 4, frames, ..asked(1, &one) }, &mut choice);
        let copies = choice.count(Place::Link);
        // Beside the link, which moves something in every other token.
        let busy_ns = u64::from(token % 2) * CPU_NS;
        let times = if busy_ns > 0 { beside } else { 1.0 };
        let (cpu, copy_ns) = (1 - copies, copies as u64 * 3 * CPU_NS);
        let cpu_ns = cpu as u64 * (times * CPU_NS as f64) as u64;
        let wall_ns = cpu_ns.max(copy_ns);
        let told = Outcome { cpu, cpu_ns, copies, copy_ns, busy_ns, wall_ns, ..Outcome::default() };
        split.measured(1, &told);
    }
    let expert = if again { 7 } else { 63 };
    let one = [Miss { expert, remaining_ns: None }];
    split.routed(1, &[expert]);
    split.choose(&Asked { frames: 0, ..asked(1, &one) }, &mut choice);
    split.keep(&Spare { computed: &[expert], ..spare }, &mut keeps);
    let kept = split.report()[0].kept_share;
    assert_eq!(kept > 0.0, !keeps.is_empty(), "{kept}");
    keeps
}

#[test]
fn what_is_used_again_is_kept_where_that_costs_less() {
    let spare = Spare { layer: 1, computed: &[], frames: 2, cpu_share: 0.5 };
    let kept = kept_of(true, spare, 1.0);
    assert_eq!(kept.len(), 1);
    // What a miss costs here is the CPU's time.
    let off = kept[0].saves_ns as f64 / CPU_NS as f64;
    assert!(kept[0].expert == 7 && (0.3..1.5).contains(&off), "{kept:?}");
    assert_eq!(kept_of(false, spare, 1.0), [], "nobody uses it again");
    assert_eq!(kept_of(true, Spare { frames: 0, ..spare }, 1.0), [], "no frame is free");
    assert_eq!(kept_of(true, spare, 20.0), [], "beside a copy the CPU hardly moves");
    assert_eq!(kept_of(true, Spare { layer: 0, ..spare }, 1.0), [], "a dense layer");
}

#[test]
fn a_prompt_streams_what_has_many_tokens() {
    // The CPU takes a quarter of an expert's first token for each more, which
    // no probe says; the link the same for any number.
    let ends = |places: &[Place], tokens: &[u32], share: f64| {
        let of = |place| tokens.iter().zip(places).filter(move |(_, at)| **at == place);
        let cpu = of(Place::Cpu).count();
        let more: u32 = of(Place::Cpu).map(|(count, _)| count - 1).sum();
        let cpu_ns = CPU_NS as f64 * (cpu as f64 + share * f64::from(more));
        let copies = of(Place::Link).count();
        let told = ChunkOutcome {
            cpu,
            cpu_tokens: cpu + more as usize,
            cpu_ns: cpu_ns as u64,
            copies,
            copy_ns: COPY_NS * copies as u64,
        };
        (told, cpu_ns.max(told.copy_ns as f64))
    };
    for share in [0.02, 0.25, 1.0] {
        let mut split = Split::new(&shape(), &seed(), Options::default());
        let mut chunk = Chunk::default();
        let tokens: Vec<u32> = (0..48).map(|at| 1 + at * at % 61).collect();
        for _ in 0..32 {
            split.choose_chunk(1, &tokens, 0, &mut chunk);
            split.measured_chunk(1, &ends(&chunk.places, &tokens, share).0);
        }
        split.choose_chunk(1, &tokens, 0, &mut chunk);
        let (_, found) = ends(&chunk.places, &tokens, share);
        let mut order: Vec<usize> = (0..tokens.len()).collect();
        order.sort_by_key(|&at| std::cmp::Reverse(tokens[at]));
        let best = (0..=tokens.len()).map(|copies| {
            let mut places = vec![Place::Cpu; tokens.len()];
            order[..copies].iter().for_each(|&at| places[at] = Place::Link);
            ends(&places, &tokens, share).1
        });
        let best = best.fold(f64::INFINITY, f64::min);
        assert!(found <= 1.06 * best, "share {share}: {found:.0} of {best:.0}");
        // Who has most tokens comes over the link.
        let least = |place| tokens.iter().zip(&chunk.places).filter(move |(_, at)| **at == place);
        let streamed = least(Place::Link).map(|(count, _)| *count).min().expect("a copy");
        let computed = least(Place::Cpu).map(|(count, _)| *count).max().expect("one on the CPU");
        assert!(streamed >= computed && chunk.threshold == Some(streamed), "{:?}", chunk.threshold);
    }
}

#[test]
fn the_report_says_what_was_chosen_and_why() {
    let (mut split, mut choice) = taught(4, 64);
    let report = split.report();
    assert_eq!(report.iter().map(|line| line.layer).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let line = &report[0];
    assert_eq!([line.decisions, line.misses], [64, 256]);
    assert!((0.6..0.9).contains(&line.cpu_share), "{}", line.cpu_share);
    let text = line.to_string();
    assert!(text.contains("layer 1: 256 misses") && text.contains("ms a copy, CPU: 0.1"), "{text}");
    assert!(text.contains("3 on the CPU while the link brings 1"), "{text}");
    // The other layers of the shape know the prices, and have decided nothing.
    assert_eq!([report[2].decisions, report[2].misses], [0, 0]);
    assert!((report[2].copy_ns / COPY_NS as f64 - 1.0).abs() < 0.1, "{}", report[2].copy_ns);
    let (explored, all) = split.explored_ns();
    assert!(explored > 0 && explored < all / 4, "{explored} of {all}");
    // A link that is ten times slower is named as the reason.
    for _ in 0..64 {
        split.next_token();
        let misses = misses(4);
        split.choose(&asked(1, &misses), &mut choice);
        let told = outcome(&choice, 0);
        let copy_ns = 40 * told.copy_ns;
        split.measured(1, &Outcome { copy_ns, wall_ns: told.wall_ns.max(copy_ns), ..told });
    }
    let text = split.report()[0].to_string();
    assert!(text.contains("without the link, which is"), "{text}");
}

#[test]
fn a_token_allocates_nothing() {
    let mut split = Split::new(&shape(), &seed(), Options::default());
    let (mut choice, four) = (Choice::default(), misses(4));
    let mut keeps = Vec::with_capacity(4);
    let mut token = |split: &mut Split| {
        split.next_token();
        for layer in 0..5 {
            split.routed(layer, &[0, 1, 2, 3]);
            split.choose(&asked(layer, &four), &mut choice);
            split.measured(layer, &outcome(&choice, 0));
            split.copied(layer, COPY_NS);
            let spare = Spare { layer, computed: &[0, 1, 2, 3], frames: 4, cpu_share: 0.5 };
            split.keep(&spare, &mut keeps);
            split.admitted(layer, 2, &Admission::Replaced(ExpertId::new(1, 40)));
        }
    };
    token(&mut split);
    let ((), peak) = peak_bytes(|| (0..200).for_each(|_| token(&mut split)));
    assert_eq!(peak, 0, "bytes on a token's way");
}

/// Any number, with the extreme ones often.
fn any_ns() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>(), 0..1_000_000u64]
}

fn any_price() -> impl Strategy<Value = f64> {
    let odd = [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e308, 1e-308];
    prop_oneof![prop::sample::select(odd.to_vec()), any::<f64>(), 0.0..10.0]
}

fn any_count() -> impl Strategy<Value = usize> {
    prop_oneof![0..40usize, Just(usize::MAX), any::<usize>()]
}

prop_compose! {
    fn any_outcome()(
        counts in (any_count(), any_count(), any_count()),
        ns in prop::array::uniform7(any_ns()),
    ) -> Outcome {
        let (cpu, copies, waits) = counts;
        let [cpu_ns, delay_ns, copy_ns, wait_ns, busy_ns, hidden_ns, wall_ns] = ns;
        Outcome {
            cpu, cpu_ns, copies, delay_ns, copy_ns, waits, wait_ns, busy_ns, hidden_ns, wall_ns,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Nothing that is told makes it panic, and every answer has a place for
    /// every miss: a wait only for a copy under way, a copy only for others.
    #[test]
    fn hostile_values_do_no_harm(
        prices in prop::array::uniform6(any_price()),
        options in (any_price(), any_price(), any_ns(), any_ns()),
        events in prop::collection::vec(
            (
                0..6usize,
                prop::collection::vec((any::<u32>(), prop::option::of(any_ns())), 0..40),
                (any_count(), any_count(), any_ns(), any_ns()),
                any_outcome(),
                (any::<bool>(), any_price()),
            ),
            1..24,
        ),
    ) {
        let [cpu_start_ns, cpu_ns_per_byte, link_start_ns, link_ns_per_byte, a, b] = prices;
        let seed = Seed {
            cpu_start_ns, cpu_ns_per_byte, link_start_ns, link_ns_per_byte,
            cpu_beside_link: a, link_beside_cpu: b,
        };
        let (explore_share, first_explored, retry_tokens, disaster_tokens) = options;
        let options = Options { explore_share, first_explored, retry_tokens, disaster_tokens };
        let mut split = Split::new(&shape(), &seed, options);
        let (mut choice, mut chunk) = (Choice::default(), Chunk::default());
        let mut keeps = Vec::new();
        for (layer, list, asked, told, (honest, cpu_share)) in events {
            let (resident, frames, queue_ns, hidden_ns) = asked;
            split.next_token();
            let misses: Vec<Miss> =
                list.iter().map(|&(expert, remaining_ns)| Miss { expert, remaining_ns }).collect();
            let experts: Vec<u32> = list.iter().map(|one| one.0).collect();
            split.routed(layer, &experts);
            let asked = Asked { layer, misses: &misses, resident, frames, queue_ns, hidden_ns };
            split.choose(&asked, &mut choice);
            prop_assert_eq!(choice.places.len(), misses.len());
            for (miss, place) in misses.iter().zip(&choice.places) {
                match place {
                    Place::Cpu => {}
                    Place::Link => prop_assert!(miss.remaining_ns.is_none()),
                    Place::Wait => prop_assert!(miss.remaining_ns.is_some()),
                }
            }
            prop_assert!(choice.count(Place::Link) <= frames);
            let told = if honest { outcome(&choice, 0) } else { told };
            let spare = Spare { layer, computed: &experts, frames, cpu_share };
            split.keep(&spare, &mut keeps);
            prop_assert!(keeps.len() <= frames.min(experts.len()));
            split.measured(layer, &told);
            split.copied(layer, told.copy_ns);
            for &expert in &experts {
                split.admitted(layer, expert, &Admission::Replaced(ExpertId::new(layer, expert)));
            }
            let tokens: Vec<u32> = list.iter().map(|one| one.0).collect();
            split.choose_chunk(layer, &tokens, queue_ns, &mut chunk);
            prop_assert_eq!(chunk.places.len(), tokens.len());
            split.measured_chunk(layer, &ChunkOutcome {
                cpu: told.cpu, cpu_tokens: told.copies, cpu_ns: told.cpu_ns,
                copies: told.copies, copy_ns: told.copy_ns,
            });
        }
        for line in split.report() {
            prop_assert!(line.copy_ns.is_finite() && line.copy_ns > 0.0);
            prop_assert!(line.cpu_ns.is_finite() && line.cpu_ns > 0.0);
            prop_assert!(!line.to_string().contains("NaN") && !line.to_string().contains("inf"));
        }
        split.changed();
    }
}
