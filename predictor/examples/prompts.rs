#[path = "../tests/support/rtrace.rs"]
mod rtrace;
use pregate_predictor::{Cache, Event, ExpertId, NoOutlook, Shape, policy};
use rtrace::Trace;
use std::path::Path;

fn run(trace: &Trace, cache: &mut Cache, tokens: std::ops::Range<usize>) -> (u64, u64) {
    let (mut hits, mut all) = (0, 0);
    for token in tokens {
        cache.next_token();
        for layer in 0..trace.layers {
            let experts: Vec<u32> = trace.experts(token, layer).collect();
            let ids = experts.iter().map(|&e| ExpertId::new(layer, e));
            let missing: Vec<ExpertId> = ids.filter(|&id| !cache.contains(id)).collect();
            hits += (experts.len() - missing.len()) as u64;
            all += experts.len() as u64;
            cache.used(&Event { layer, experts: &experts, counts: &vec![1; experts.len()], tokens: 1 });
            for id in missing { cache.admit(id, &|_| false, &NoOutlook); }
        }
    }
    (hits, all)
}
fn chunk(trace: &Trace, cache: &mut Cache, tokens: std::ops::Range<usize>) {
    cache.next_token();
    for layer in 0..trace.layers {
        let mut counts = vec![0u32; trace.experts];
        for token in tokens.clone() { for e in trace.experts(token, layer) { counts[e as usize] += 1; } }
        let experts: Vec<u32> = (0..trace.experts as u32).filter(|&e| counts[e as usize] > 0).collect();
        let of: Vec<u32> = experts.iter().map(|&e| counts[e as usize]).collect();
        cache.used(&Event { layer, experts: &experts, counts: &of, tokens: tokens.len() });
        let tail: usize = std::env::var("TAIL").map_or(0, |t| t.parse().unwrap());
        for token in tokens.end - tail..tokens.end { cache.used_last(layer, &trace.experts(token, layer).collect::<Vec<_>>()); }
        let (here, missing): (Vec<u32>, Vec<u32>) = experts.iter().partition(|&&e| cache.contains(ExpertId::new(layer, e)));
        for e in here { cache.computed(ExpertId::new(layer, e)); }
        for e in missing { let id = ExpertId::new(layer, e); cache.computed(id); cache.admit(id, &|_| false, &NoOutlook); }
    }
}
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let trace = Trace::open(Path::new(&args[0]));
    let size: usize = args[1].parse().unwrap();
    let policies: Vec<&str> = if args.len() > 2 { vec![&args[2]] } else { vec!["forecast-aware", "lru"] };
    for name in policies { for fraction in [0.25, 0.5, 0.75] {
        let slots = trace.top_k.max((fraction * trace.experts as f64) as usize);
        // [before, back after prompt, same after prompt, same after one by one, back without]
        let mut sums = [[(0u64, 0u64); 2]; 5];
        let stride = 900.max(320 + 2 * size);
        let mut at = 0;
        while at + stride + 600 + size < trace.tokens {
            let (a, b) = (at, (at + trace.tokens / 2) % (trace.tokens - size - 200));
            for case in 0..4 {
                let mut cache = Cache::new(&Shape::uniform(trace.layers, trace.experts, trace.top_k, 1), &vec![slots; trace.layers], policy::by_name(name).unwrap()).unwrap();
                run(&trace, &mut cache, a..a + 256);
                let before = run(&trace, &mut cache, a + 256..a + 320);
                let parts = |cache: &mut Cache, from: usize| [run(&trace, cache, from..from + 16), run(&trace, cache, from + 16..from + 80)];
                let (row, got) = match case {
                    0 => { chunk(&trace, &mut cache, b..b + size); (1, parts(&mut cache, a + 320)) }
                    1 => { chunk(&trace, &mut cache, b..b + size); (2, parts(&mut cache, b + size)) }
                    2 => { run(&trace, &mut cache, b..b + size); (3, parts(&mut cache, b + size)) }
                    _ => (4, parts(&mut cache, a + 320)),
                };
                for (sum, got) in sums[row].iter_mut().zip(got) { sum.0 += got.0; sum.1 += got.1; }
                if case == 0 { sums[0][0].0 += before.0; sums[0][0].1 += before.1; sums[0][1] = sums[0][0]; }
            }
            at += stride;
        }
        let r = sums.map(|s| s.map(|s| s.0 as f64 / s.1 as f64));
        println!("{name:15} {fraction:.2}: before {:.3} | back: none {:.3} {:.3} prompt {:.3} {:.3} | same: decoded {:.3} {:.3} prompt {:.3} {:.3}", r[0][0], r[4][0], r[4][1], r[1][0], r[1][1], r[3][0], r[3][1], r[2][0], r[2][1]);
    } }
}
