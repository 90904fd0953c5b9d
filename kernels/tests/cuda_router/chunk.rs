//! Many tokens: `chunk_logits`, `chunk_choose`, `chunk_gather`.

use crate::lab::{Lab, assert_same_bits, set_order};
use crate::support::{Logits, Router, logits, ranked, routed, rules};
use pregate_kernels::cuda::CudaError;
use pregate_kernels::cuda::router::RouterTable;
use pregate_kernels::cuda::router_chunk::{
    ChunkChoice, ChunkGather, ChunkLogits, ChunkRank, chunk_choose, chunk_gather, chunk_logits,
    chunk_rank,
};
use pregate_kernels::testing::{Inputs, Random, Weights, inputs};
use pregate_kernels::{Choice, Format, Grouping, Routes, RoutingRule};

fn table(lab: &Lab, router: &Router) -> RouterTable {
    let layers = vec![router.upload(lab)];
    RouterTable::new(&lab.arena(1 << 20), lab.device.compute(), router.hidden, layers).unwrap()
}

#[test]
fn every_rule_chooses_for_hard_logits_as_the_cpu_does() {
    let mut random = Random::new(11);
    for experts in [8, 60, 128, 160, 384, 512] {
        let Some(lab) = Lab::open() else { return };
        for rule in rules(experts) {
            let tokens = Logits::ALL.len() + 1;
            let all: Vec<f32> = (0..tokens)
                .flat_map(|token| {
                    let kind = Logits::ALL[token % Logits::ALL.len()];
                    logits(kind, experts, &mut random)
                })
                .collect();
            let router = Router::constant(vec![0.0; experts], 1, rule, &mut random);
            let top_k = router.rule.top_k();
            let (ids, weights) = (lab.cells(tokens * top_k), lab.cells(tokens * top_k));
            let call = ChunkChoice {
                table: &table(&lab, &router),
                layer: 0,
                tokens,
                logits: &lab.floats(&all),
                ids: &ids,
                weights: &weights,
            };
            assert_eq!(call.bytes() as usize, 4 * tokens * (experts + 2 * top_k));
            chunk_choose(&lab.device, lab.device.compute(), call).unwrap();
            let (ids, weights) = (lab.read_ints(&ids), lab.read_floats(&weights));
            for (token, logits) in all.chunks(experts).enumerate() {
                let kind = Logits::ALL[token % Logits::ALL.len()];
                let what = format!("{experts} experts, {:?}, {kind:?}", rule.0);
                let cells = token * top_k..(token + 1) * top_k;
                let bias = router.selection_bias.as_deref();
                let want = routed(router.rule, logits, bias);
                assert_eq!(ids[cells.clone()], want.0, "{what}");
                assert_same_bits(&weights[cells], &want.1, &what);
            }
        }
    }
}

#[test]
fn every_rule_ranks_hard_logits_as_the_cpu_does() {
    let mut random = Random::new(14);
    for (experts, count) in [(8, 12), (60, 9), (256, 130), (512, 24)] {
        let Some(lab) = Lab::open() else { return };
        for rule in rules(experts) {
            let rows = Logits::ALL.len();
            let all: Vec<f32> =
                Logits::ALL.iter().flat_map(|&kind| logits(kind, experts, &mut random)).collect();
            // The kernel reads a record only: the router may be of any format.
            let mut router = Router::constant(vec![0.0; experts], 32, rule, &mut random);
            router.format = Format::Q4_0;
            router.rows = vec![0; experts * 18];
            let (ids, scores) = (lab.cells(rows * count), lab.cells(rows * count));
            let call = ChunkRank {
                table: &table(&lab, &router),
                layer: 0,
                rows,
                logits: &lab.floats(&all),
                experts: count,
                ids: &ids,
                scores: &scores,
            };
            chunk_rank(&lab.device, lab.device.compute(), call).unwrap();
            let (ids, scores) = (lab.read_ints(&ids), lab.read_floats(&scores));
            for (row, logits) in all.chunks(experts).enumerate() {
                let what = format!("{experts} experts, {:?}, {:?}", rule.0, Logits::ALL[row]);
                let cells = row * count..(row + 1) * count;
                let want = ranked(rule.0, logits, router.selection_bias.as_deref(), count);
                assert_eq!(ids[cells.clone()], want.0, "{what}");
                assert_same_bits(&scores[cells], &want.1, &what);
            }
        }
    }
}

#[test]
fn logits_of_a_chunk_have_the_contracts_bits() {
    let mut random = Random::new(12);
    let rule = (RoutingRule::SoftmaxOfTopK { top_k: 2 }, false);
    for format in [Format::F32, Format::F16, Format::Bf16] {
        for (tokens, experts, hidden) in
            [(1, 8, 64), (7, 60, 130), (8, 9, 512), (9, 16, 1030), (33, 5, 37), (2, 17, 513)]
        {
            let Some(lab) = Lab::open() else { return };
            let shape = (experts, hidden);
            let mut router = Router::random(format, Weights::NotFinite, shape, rule, &mut random);
            router.bias = (tokens % 2 == 1).then(|| inputs(Inputs::Normal, experts, &mut random));
            let x = inputs(Inputs::Outliers, tokens * hidden, &mut random);
            let out = lab.cells(tokens * experts);
            let call = ChunkLogits {
                table: &table(&lab, &router),
                layer: 0,
                tokens,
                x: &lab.floats(&x),
                logits: &out,
            };
            chunk_logits(&lab.device, lab.device.compute(), call).unwrap();
            let want: Vec<f32> =
                x.chunks(hidden).flat_map(|x| router.logits_of_normed(x)).collect();
            let what = format!("{format} {tokens} x {experts} x {hidden}");
            assert_same_bits(&lab.read_floats(&out), &want, &what);
        }
    }
    let Some(lab) = Lab::open() else { return };
    let router = Router::random(Format::Q8_0, Weights::Usual, (8, 64), rule, &mut random);
    let (x, logits) = (lab.cells(64), lab.cells(8));
    let table = table(&lab, &router);
    let call = ChunkLogits { table: &table, layer: 0, tokens: 1, x: &x, logits: &logits };
    let refused = chunk_logits(&lab.device, lab.device.compute(), call);
    assert!(matches!(refused, Err(CudaError::Unsupported { .. })), "{refused:?}");
}

#[test]
fn choices_are_gathered_as_the_cpu_gathers_them() {
    let mut random = Random::new(13);
    for (tokens, per_token, experts, used) in [
        (1, 1, 1, 1),
        (1, 8, 128, 128),
        (31, 4, 8, 8),
        (257, 1, 3, 3),
        (300, 6, 60, 60),
        // One expert has everything, others nothing.
        (200, 2, 16, 2),
        (40, 10, 512, 512),
    ] {
        let Some(lab) = Lab::open() else { return };
        let first = random.below(experts - used + 1);
        let mut routes = Routes::new();
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let choices: Vec<Choice> = (0..per_token)
                .map(|_| Choice { expert: (first + random.below(used)) as u32, weight: 1.0 })
                .collect();
            ids.extend(choices.iter().map(|choice| choice.expert as i32));
            routes.push(&choices);
        }
        let rows = tokens * per_token;
        let spans = [experts + 1, rows, rows, rows].map(|cells| lab.cells(cells));
        let [starts, token_of, choice_of, row_of] = &spans;
        let ids = lab.ints(&ids);
        let call = ChunkGather {
            tokens,
            per_token,
            experts,
            ids: &ids,
            starts,
            token_of,
            choice_of,
            row_of,
        };
        assert_eq!(call.bytes() as usize, 4 * (4 * rows + experts + 1));
        set_order(tokens as u64);
        chunk_gather(&lab.device, lab.device.compute(), call).unwrap();
        let [starts, token_of, choice_of, row_of] = spans.each_ref().map(|s| lab.read_ints(s));

        let mut grouping = Grouping::default();
        grouping.gather(&routes);
        let want: Vec<i32> = (0..rows).map(|choice| grouping.row_of(choice) as i32).collect();
        assert_eq!(row_of, want, "{tokens} x {per_token} of {experts}");
        for (choice, &row) in want.iter().enumerate() {
            assert_eq!(choice_of[row as usize], choice as i32);
            assert_eq!(token_of[row as usize], (choice / per_token) as i32);
        }
        let counts = |expert: i32| {
            routes.all().iter().filter(|choice| (choice.expert as i32) < expert).count() as i32
        };
        let want: Vec<i32> = (0..=experts as i32).map(counts).collect();
        assert_eq!(starts, want);
    }
}

#[test]
fn chunks_that_do_not_fit_are_refused() {
    let Some(lab) = Lab::open() else { return };
    let cells = |count| lab.cells(count);
    let gather = |tokens, ids: usize, starts: usize, rows: usize| {
        let (token_of, choice_of, row_of) = (cells(rows), cells(rows), cells(rows));
        let call = ChunkGather {
            tokens,
            per_token: 2,
            experts: 4,
            ids: &lab.ints(&vec![1; ids]),
            starts: &cells(starts),
            token_of: &token_of,
            choice_of: &choice_of,
            row_of: &row_of,
        };
        chunk_gather(&lab.device, lab.device.compute(), call)
    };
    assert!(gather(3, 6, 5, 6).is_ok());
    for refused in [gather(0, 0, 5, 0), gather(3, 5, 5, 6), gather(3, 6, 4, 6), gather(3, 6, 5, 7)]
    {
        assert!(matches!(refused, Err(CudaError::Shape { .. })), "{refused:?}");
    }
}
