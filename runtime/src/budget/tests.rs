use super::*;
use pregate_predictor::Shape;
use proptest::prelude::*;

const CLASSES: [u64; 3] = [4096, 8192, 20480];

fn experts(experts: usize, top_k: usize, class: usize) -> Option<LayerShape> {
    Some(LayerShape { experts, top_k, expert_bytes: CLASSES[class] - 100, class })
}

fn sizes(whole_bytes: u64, dense_bytes: u64, layers: Vec<Option<LayerShape>>) -> Sizes {
    let shape = Shape { layers };
    let class_bytes = CLASSES[..shape.classes()].to_vec();
    Sizes { whole_bytes, dense_bytes, shape, class_bytes }
}

fn request(budget_bytes: u64) -> Request {
    Request { budget_bytes, process_bytes: 30, kv_bytes: 50, scratch_bytes: 20, ring: None }
}

/// Two dense layers of five, two classes.
fn mixed() -> Sizes {
    let layers = vec![None, experts(8, 2, 0), experts(16, 2, 1), None, experts(8, 2, 0)];
    sizes(400_000, 10_000, layers)
}

#[test]
fn a_model_that_fits_is_left_where_it_is() {
    let plan = divide(&mixed(), &request(400_100)).unwrap();
    assert_eq!(plan.placement, Placement::Whole);
    assert_eq!((plan.parts.weights_bytes, plan.left_bytes), (400_000, 0));
    assert!(!divide(&mixed(), &request(400_099)).unwrap().is_whole());
}

#[test]
fn one_byte_less_than_the_smallest_plan_is_refused_with_that_byte() {
    // Two layers of two small frames, one of two large ones, a ring frame of
    // each size.
    let smallest = 100 + 10_000 + (4 + 1) * 4096 + (2 + 1) * 8192;
    let plan = divide(&mixed(), &request(smallest)).unwrap();
    assert_eq!(plan.slots(), Some(&[0, 2, 2, 0, 2][..]));
    assert_eq!(plan.left_bytes, 0);
    let refusal = divide(&mixed(), &request(smallest - 1)).unwrap_err();
    assert_eq!((refusal.missing_bytes(), refusal.parts.total()), (1, smallest));
    let text = refusal.to_string();
    assert!(text.contains("0.1 MB too small"), "{text}");
    assert!(text.contains("the 6 experts of one token in 3 layers"), "{text}");
}

#[test]
fn rings_grow_first_then_the_emptiest_layer() {
    let rings = 100 + 10_000 + (4 + 4) * 4096 + (2 + 4) * 8192;
    let plan = divide(&mixed(), &request(rings)).unwrap();
    let (slots, of) = (vec![0, 2, 2, 0, 2], |frame_bytes, slots| ClassPlan { frame_bytes, slots });
    let classes = vec![of(4096, 4), of(8192, 2)];
    assert_eq!(plan.placement, Placement::Streaming { slots, ring: 4, classes });
    // 2 of 16 is less than 2 of 8: the large layer catches up.
    let plan = divide(&mixed(), &request(rings + 2 * 8192 + 4096)).unwrap();
    assert_eq!(plan.slots(), Some(&[0, 3, 4, 0, 2][..]));
}

#[test]
fn a_model_without_experts_fits_or_does_not() {
    let sizes = sizes(1000, 900, vec![None; 3]);
    assert!(divide(&sizes, &request(1100)).unwrap().is_whole());
    let refusal = divide(&sizes, &request(1099)).unwrap_err();
    assert!(refusal.is_whole);
    assert_eq!(refusal.parts.total(), 1100);
    assert!(!refusal.to_string().contains("ring"), "{refusal}");
}

#[test]
fn sizes_beyond_any_machine_are_refused_and_not_wrapped() {
    let mut sizes = sizes(u64::MAX, u64::MAX, vec![experts(1 << 40, 1 << 20, 0)]);
    sizes.class_bytes = vec![1 << 62];
    let refusal = divide(&sizes, &request(u64::MAX - 1)).unwrap_err();
    assert_eq!(refusal.parts.total(), u64::MAX);
}

#[test]
fn figures_in_messages_are_rounded_up() {
    assert_eq!(Megabytes(1_000_000).to_string(), "1.0 MB");
    assert_eq!(Megabytes(1_000_001).to_string(), "1.1 MB");
    assert_eq!(Megabytes(u64::MAX).to_string(), "18446744073709.6 MB");
}

fn any_sizes() -> impl Strategy<Value = Sizes> {
    let layer = (1usize..40, 1usize..10, 0..CLASSES.len(), any::<bool>());
    (prop::collection::vec(layer, 1..12), 0u64..200_000, 0u64..100_000).prop_map(
        |(layers, dense_bytes, embedding)| {
            let layers = layers.into_iter().map(|(more, top_k, class, is_moe)| {
                if is_moe { experts(top_k + more - 1, top_k, class) } else { None }
            });
            let sizes = sizes(0, dense_bytes, layers.collect());
            let experts = sizes.shape.moe().map(|(_, l)| l.experts as u64 * l.expert_bytes);
            Sizes { whole_bytes: dense_bytes + embedding + experts.sum::<u64>(), ..sizes }
        },
    )
}

/// What must hold of every plan.
fn check(sizes: &Sizes, request: &Request, plan: &Plan) {
    assert_eq!(plan.budget_bytes, request.budget_bytes);
    assert_eq!(plan.parts.total() + plan.left_bytes, plan.budget_bytes, "every byte has a place");
    assert_eq!(plan.parts.process_bytes, request.process_bytes);
    assert_eq!(plan.parts.kv_bytes, request.kv_bytes);
    assert_eq!(plan.parts.scratch_bytes, request.scratch_bytes);
    let Placement::Streaming { slots, ring, classes } = &plan.placement else {
        assert_eq!(plan.parts.weights_bytes, sizes.whole_bytes);
        return;
    };
    assert_eq!(plan.parts.weights_bytes, sizes.dense_bytes);
    assert_eq!((slots.len(), classes.len()), (sizes.shape.layers.len(), sizes.class_bytes.len()));
    assert!(*ring >= 1);
    let mut counted = vec![0; classes.len()];
    let mut bytes = 0;
    for (slots, layer) in slots.iter().zip(&sizes.shape.layers) {
        let Some(layer) = layer else {
            assert_eq!(*slots, 0);
            continue;
        };
        assert!((layer.top_k..=layer.experts).contains(slots), "{slots} of {layer:?}");
        counted[layer.class] += slots;
        bytes += CLASSES[layer.class] * *slots as u64;
    }
    assert_eq!(classes.iter().map(|class| class.slots).collect::<Vec<_>>(), counted);
    assert_eq!(plan.parts.slots_bytes, bytes);
    let ring_step: u64 = sizes.class_bytes.iter().sum();
    assert_eq!(plan.parts.ring_bytes, ring_step * *ring as u64);
    // What is left would not hold one more expert, if any is without a slot.
    let all_in = sizes.shape.moe().all(|(index, layer)| slots[index] == layer.experts);
    assert!(all_in || plan.left_bytes < ring_step.max(CLASSES[CLASSES.len() - 1]));
}

proptest! {
    #[test]
    fn plans_account_for_every_byte_and_grow_with_the_budget(
        sizes in any_sizes(),
        (from, more) in (0u64..800_000, 0u64..200_000),
        ring in prop::option::of(0usize..12),
    ) {
        let request = |budget_bytes| Request { ring, ..request(budget_bytes) };
        let (small, large) = (request(from), request(from + more));
        let plans = (divide(&sizes, &small), divide(&sizes, &large));
        if let Ok(plan) = &plans.1 {
            check(&sizes, &large, plan);
        }
        match plans {
            (Err(refusal), _) => {
                let needed = refusal.parts.total();
                prop_assert!(needed > from);
                let smallest = request(needed);
                let plan = divide(&sizes, &smallest).expect("the budget that the refusal named");
                check(&sizes, &smallest, &plan);
                prop_assert_eq!(plan.left_bytes, 0);
                prop_assert!(divide(&sizes, &request(needed - 1)).is_err());
            }
            (Ok(_), Err(_)) => prop_assert!(false, "more memory was refused"),
            (Ok(small), Ok(large)) => match (small.slots(), large.slots()) {
                (Some(less), Some(slots)) => {
                    prop_assert!(less.iter().zip(slots).all(|(less, slots)| less <= slots));
                    prop_assert!(small.parts.ring_bytes <= large.parts.ring_bytes);
                }
                (None, Some(_)) => prop_assert!(false, "more memory is not whole any more"),
                (_, None) => {}
            },
        }
    }
}

#[test]
fn what_streaming_takes_is_what_was_counted() {
    use crate::{LoadOptions, OpenedModel};
    use std::{path::Path, sync::Arc};
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    for name in ["gguf/qwen3_moe_k256.Q4_K_M.gguf", "gguf/deepseek_v3.Q8_0.gguf", "hf/gpt_oss"] {
        let opened = OpenedModel::open(&root.join(name), &mut |_| {}).unwrap();
        let sizes = Sizes::of(&opened);
        let base = request(0);
        let smallest = divide(&sizes, &base).unwrap_err().parts.total();
        // Tiny models may be smaller than the frames of their experts.
        let budget_bytes = smallest.min(sizes.whole_bytes + 99);
        let Ok(plan) = divide(&sizes, &Request { budget_bytes, ..base }) else { continue };
        let backend = Arc::new(pregate_kernels::Reference);
        let residency = plan.residency();
        let model = opened.load(LoadOptions { backend, residency }, &mut |_| {}).unwrap();
        let frames = model.store().expect("streamed").frames().clone();
        let bytes: u64 =
            frames.classes().map(|class| (class.frames * class.frame_bytes) as u64).sum();
        assert_eq!(bytes, plan.parts.slots_bytes + plan.parts.ring_bytes, "{name}");
        assert_eq!(model.files().held_bytes() as u64, plan.parts.weights_bytes, "{name}");
    }
}
