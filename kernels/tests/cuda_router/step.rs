//! One token: `router_step`.

use crate::lab::{Lab, assert_same_bits, set_order};
use crate::support::{Logits, Router, logits, ranked, routed, rules, selection_bias};
use pregate_kernels::cuda::CudaError;
use pregate_kernels::cuda::router::{
    Ahead, Chosen, MOST_EXPERTS, RouterNormKind, RouterScratch, RouterStep, RouterTable,
    router_step,
};
use pregate_kernels::testing::{Inputs, Random, Weights, inputs};
use pregate_kernels::{Format, RoutingRule};

/// What a launch left behind.
struct Answer {
    ids: Vec<i32>,
    weights: Vec<f32>,
    ahead_ids: Vec<i32>,
    ahead_scores: Vec<f32>,
    /// `[targets][experts]`
    logits: Vec<Vec<f32>>,
}

/// Routers on the device and what launches need.
struct Run<'a> {
    lab: &'a Lab,
    routers: &'a [Router],
    table: RouterTable,
    scratch: RouterScratch,
}

impl<'a> Run<'a> {
    fn new(lab: &'a Lab, routers: &'a [Router]) -> Self {
        let stream = lab.device.compute();
        let layers = routers.iter().map(|router| router.upload(lab)).collect();
        let table =
            RouterTable::new(&lab.arena(1 << 20), stream, routers[0].hidden, layers).unwrap();
        let scratch = RouterScratch::new(&lab.arena(1 << 20), stream).unwrap();
        Self { lab, routers, table, scratch }
    }

    fn launch(
        &self,
        state: &[f32],
        chosen: Option<usize>,
        ahead: &[usize],
        experts: usize,
    ) -> Answer {
        let Self { lab, routers, table, scratch } = self;
        let top_k = chosen.map_or(1, |layer| routers[layer].rule.top_k());
        let state = lab.floats(state);
        let (ids, weights) = (lab.cells(top_k), lab.cells(top_k));
        let cells = (ahead.len() * experts).max(1);
        let (ahead_ids, ahead_scores) = (lab.cells(cells), lab.cells(cells));
        let call = RouterStep {
            table,
            scratch,
            state: &state,
            chosen: chosen.map(|layer| Chosen { layer, ids: &ids, weights: &weights }),
            ahead: (!ahead.is_empty()).then_some(Ahead {
                layers: ahead,
                experts,
                ids: &ahead_ids,
                scores: &ahead_scores,
            }),
        };
        router_step(&lab.device, lab.device.compute(), call).unwrap();
        let all = lab.read_floats(&scratch.logits);
        let targets = chosen.iter().chain(ahead);
        let logits = targets
            .zip(all.chunks(MOST_EXPERTS))
            .map(|(&target, row)| row[..routers[target].experts()].to_vec())
            .collect();
        Answer {
            ids: lab.read_ints(&ids),
            weights: lab.read_floats(&weights),
            ahead_ids: lab.read_ints(&ahead_ids),
            ahead_scores: lab.read_floats(&ahead_scores),
            logits,
        }
    }

    /// Launches and compares everything with the CPU.
    fn check(&self, state: &[f32], chosen: Option<usize>, ahead: &[usize], experts: usize) {
        let answer = self.launch(state, chosen, ahead, experts);
        let mut logits = answer.logits.iter();
        if let Some(layer) = chosen {
            let router = &self.routers[layer];
            let want = router.logits(state);
            assert_same_bits(logits.next().unwrap(), &want, &"logits");
            let (ids, weights) = routed(router.rule, &want, router.selection_bias.as_deref());
            assert_eq!(answer.ids, ids, "{:?}", router.rule);
            assert_same_bits(&answer.weights, &weights, &format!("{:?}", router.rule));
        }
        for (row, &layer) in ahead.iter().enumerate() {
            let router = &self.routers[layer];
            let want = router.logits(state);
            assert_same_bits(logits.next().unwrap(), &want, &"logits ahead");
            let bias = router.selection_bias.as_deref();
            let (ids, scores) = ranked(router.rule, &want, bias, experts);
            let cells = row * experts..(row + 1) * experts;
            assert_eq!(answer.ahead_ids[cells.clone()], ids, "{:?}", router.rule);
            assert_same_bits(&answer.ahead_scores[cells], &scores, &format!("{:?}", router.rule));
        }
    }
}

const SOFTMAX: (RoutingRule, bool) = (RoutingRule::SoftmaxOfTopK { top_k: 4 }, false);

#[test]
fn every_rule_and_width_chooses_as_the_cpu_does() {
    let mut random = Random::new(1);
    for experts in [8, 60, 64, 128, 256, 512] {
        let Some(lab) = Lab::open() else { return };
        let hidden = 64;
        let routers: Vec<Router> = rules(experts)
            .into_iter()
            .map(|rule| {
                Router::random(Format::F32, Weights::Usual, (experts, hidden), rule, &mut random)
            })
            .collect();
        let run = Run::new(&lab, &routers);
        for layer in 0..routers.len() {
            let state: Vec<f32> =
                inputs(Inputs::Normal, hidden, &mut random).iter().map(|x| 9.0 * x).collect();
            let ahead: Vec<usize> = (1..=layer % 5).map(|i| (layer + i) % routers.len()).collect();
            run.check(&state, Some(layer), &ahead, [1, 6, 40][layer % 3]);
        }
    }
}

#[test]
fn hard_logits_are_chosen_and_ranked_as_on_the_cpu() {
    let mut random = Random::new(2);
    for experts in [8, 64, 256] {
        for kind in Logits::ALL {
            let Some(lab) = Lab::open() else { return };
            let routers: Vec<Router> = rules(experts)
                .into_iter()
                .map(|rule| {
                    let answers = logits(kind, experts, &mut random);
                    Router::constant(answers, 2, rule, &mut random)
                })
                .collect();
            let run = Run::new(&lab, &routers);
            for (index, ahead) in (0..routers.len()).collect::<Vec<_>>().chunks(4).enumerate() {
                run.check(&[1.0, -2.0], Some(index), ahead, 12);
            }
        }
    }
}

#[test]
fn rows_of_every_width_have_the_contracts_bits() {
    let mut random = Random::new(3);
    for format in [Format::F32, Format::F16, Format::Bf16, Format::Q8_0] {
        // One element, ends of the 64 lanes, an odd number, several loads of
        // 16, and more than a tile of 4096.
        let widths: &[usize] = match format.block_len() {
            1 => &[1, 2, 63, 64, 66, 191, 1088, 4096, 4097, 4230],
            _ => &[32, 96, 288, 4096 + 96],
        };
        for &hidden in widths {
            let Some(lab) = Lab::open() else { return };
            let mut router =
                Router::random(format, Weights::Usual, (7, hidden), SOFTMAX, &mut random);
            router.bias = Some(inputs(Inputs::Normal, 7, &mut random));
            let routers = [router];
            let run = Run::new(&lab, &routers);
            run.check(&inputs(Inputs::Outliers, hidden, &mut random), Some(0), &[], 1);
        }
    }
}

#[test]
fn hard_weights_and_states_have_the_contracts_bits() {
    let mut random = Random::new(4);
    for format in [Format::F32, Format::F16, Format::Bf16, Format::Q8_0] {
        let Some(lab) = Lab::open() else { return };
        let routers: Vec<Router> = Weights::ALL
            .into_iter()
            .map(|kind| Router::random(format, kind, (9, 256), SOFTMAX, &mut random))
            .collect();
        let run = Run::new(&lab, &routers);
        for kind in Inputs::ALL {
            let state = inputs(kind, 256, &mut random);
            for layer in 0..routers.len() {
                run.check(&state, Some(layer), &[(layer + 1) % routers.len()], 9);
            }
        }
    }
}

#[test]
fn layer_norms_have_the_cpus_bits() {
    let mut random = Random::new(5);
    for (hidden, has_bias) in [(130, true), (64, false), (4200, true)] {
        let Some(lab) = Lab::open() else { return };
        let mut router =
            Router::random(Format::Bf16, Weights::Usual, (16, hidden), SOFTMAX, &mut random);
        router.norm = RouterNormKind::Layer;
        router.epsilon = 1e-5;
        router.norm_bias = has_bias.then(|| inputs(Inputs::Normal, hidden, &mut random));
        let routers = [router];
        let run = Run::new(&lab, &routers);
        let state: Vec<f32> =
            inputs(Inputs::Normal, hidden, &mut random).iter().map(|x| x + 3.0).collect();
        run.check(&state, Some(0), &[0], 5);
    }
}

#[test]
fn a_launch_can_be_replayed_in_any_order_of_threads() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(6);
    let rules = rules(60);
    // Layers of other sizes end their counts at other numbers.
    let routers: Vec<Router> = [(60, 0), (8, 1), (61, 3)]
        .into_iter()
        .map(|(experts, rule)| {
            let (rule, biased) = rules[rule];
            let shape = (experts, 128);
            Router::random(Format::F16, Weights::Usual, shape, (rule, biased), &mut random)
        })
        .collect();
    let run = Run::new(&lab, &routers);
    for order in 0..5 {
        set_order(order);
        let state = inputs(Inputs::Normal, 128, &mut random);
        run.check(&state, Some(0), &[1, 2], 8);
    }
    // Another grid on the same counters.
    let state = inputs(Inputs::Normal, 128, &mut random);
    run.check(&state, Some(2), &[0, 1, 2, 0], 61);
    run.check(&state, None, &[1, 2], 3);
    run.check(&state, Some(1), &[], 1);
}

#[test]
fn formats_may_differ_between_the_layers_of_a_launch() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(7);
    let formats = [Format::Bf16, Format::Q8_0, Format::F16, Format::F32, Format::Q6K];
    let routers: Vec<Router> = formats
        .into_iter()
        .map(|format| Router::random(format, Weights::Usual, (12, 512), SOFTMAX, &mut random))
        .collect();
    let run = Run::new(&lab, &routers);
    run.check(&inputs(Inputs::Outliers, 512, &mut random), Some(0), &[1, 2, 3, 0], 12);

    let (state, four) = (lab.floats(&vec![1.0; 512]), lab.cells(4));
    let (table, scratch) = (&run.table, &run.scratch);
    let chosen = Some(Chosen { layer: 4, ids: &four, weights: &four });
    let call = RouterStep { table, scratch, state: &state, chosen, ahead: None };
    let refused = router_step(&lab.device, lab.device.compute(), call);
    assert!(matches!(refused, Err(CudaError::Unsupported { .. })), "{refused:?}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(8);
    let stream = lab.device.compute();
    let good = Router::random(Format::F32, Weights::Usual, (8, 64), SOFTMAX, &mut random);
    let refused = |change: &dyn Fn(&mut Router)| {
        let mut router =
            Router::random(Format::F32, Weights::Usual, (8, 64), SOFTMAX, &mut Random::new(8));
        change(&mut router);
        let table = RouterTable::new(&lab.arena(1 << 20), stream, 64, vec![router.upload(&lab)]);
        matches!(table, Err(CudaError::Shape { .. }))
    };
    assert!(!refused(&|_| ()));
    assert!(refused(&|router| router.hidden = 32));
    assert!(refused(&|router| router.norm_weight.truncate(63)));
    assert!(refused(&|router| router.norm_bias = Some(vec![0.0; 64])));
    assert!(refused(&|router| router.bias = Some(vec![0.0; 9])));
    assert!(
        refused(&|router| router.selection_bias = Some(selection_bias(8, &mut Random::new(1))))
    );
    assert!(refused(&|router| router.rule = RoutingRule::SoftmaxOfTopK { top_k: 9 }));
    assert!(refused(&|router| router.rule = RoutingRule::SoftmaxOfTopK { top_k: 0 }));
    assert!(refused(&|router| {
        router.rule = rules(60).last().unwrap().0; // 30 groups
    }));

    let run = Run::new(&lab, std::slice::from_ref(&good));
    let (state, odd) = (lab.floats(&vec![1.0; 64]), lab.floats(&vec![1.0; 65]));
    let (four, five) = (lab.cells(4), lab.cells(5));
    let launch = |state, layer, ids, weights| {
        let (table, scratch) = (&run.table, &run.scratch);
        let chosen = Some(Chosen { layer, ids, weights });
        let call = RouterStep { table, scratch, state, chosen, ahead: None };
        router_step(&lab.device, stream, call)
    };
    assert!(launch(&state, 0, &four, &four).is_ok());
    for refused in [
        launch(&state, 1, &four, &four),
        launch(&state, 0, &five, &four),
        launch(&state, 0, &four, &five),
        launch(&state.part(4..256), 0, &four, &four),
        launch(&odd.part(4..260), 0, &four, &four),
    ] {
        assert!(matches!(refused, Err(CudaError::Shape { .. })), "{refused:?}");
    }
}

#[test]
fn the_bytes_are_those_of_the_routers() {
    let Some(lab) = Lab::open() else { return };
    let mut random = Random::new(9);
    let router = Router::random(Format::F16, Weights::Usual, (8, 64), SOFTMAX, &mut random);
    let routers = [router];
    let run = Run::new(&lab, &routers);
    let (state, four) = (lab.floats(&vec![1.0; 64]), lab.cells(4));
    let call = RouterStep {
        table: &run.table,
        scratch: &run.scratch,
        state: &state,
        chosen: Some(Chosen { layer: 0, ids: &four, weights: &four }),
        ahead: Some(Ahead { layers: &[0], experts: 4, ids: &four, scores: &four }),
    };
    let router = 8 * 64 * 2 + 64 * 4;
    assert_eq!(call.bytes(), 2 * router + 64 * 4 + 4 * 16);
}
