//! Replays a trace of which some tokens come as a chunk.

use super::rtrace::Trace;
use pregate_predictor::{Ahead, Cache, ExpertId, Planner, Request, Retire, Shape, policy};
use std::ops::Range;

/// Tokens that are decoded behind a prompt.
const FIRST: usize = 16;
const THEN: usize = 64;

/// What is decoded behind a prompt, and what this is held against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Behind {
    /// There was no prompt, and the text goes on.
    NoPrompt,
    /// The text from before the prompt goes on.
    OtherText,
    /// The prompt's text goes on; it was decoded itself.
    OneByOne,
    /// The prompt's text goes on.
    OwnText,
}

impl Behind {
    #[allow(dead_code)]
    pub const ALL: [Behind; 4] =
        [Behind::NoPrompt, Behind::OtherText, Behind::OneByOne, Behind::OwnText];
}

/// Hit ratios of the first tokens, and of those that follow.
#[derive(Clone, Copy, Debug)]
pub struct Ratios {
    pub first: f64,
    #[allow(dead_code)]
    pub then: f64,
}

/// Over rounds from all parts of the trace, each with a cold cache, in which
/// `before` tokens are decoded and others are a prompt of `tokens`.
pub fn ratios(
    trace: &Trace,
    (slots, policy): (usize, &str),
    [before, tokens]: [usize; 2],
    behind: Behind,
) -> Ratios {
    let mut sums = [(0, 0); 2];
    let room = tokens + FIRST + THEN;
    for at in (0..trace.tokens - before - FIRST - THEN).step_by(room / 2) {
        let other = (at + trace.tokens / 2) % (trace.tokens - room);
        let prompt = other..other + tokens;
        let mut replay = Replay::new(trace, slots, policy);
        replay.decode(at..at + before);
        match behind {
            Behind::NoPrompt => {}
            Behind::OneByOne => drop(replay.decode(prompt.clone())),
            Behind::OtherText | Behind::OwnText => drop(replay.pass(prompt.clone())),
        }
        let next = match behind {
            Behind::NoPrompt | Behind::OtherText => at + before,
            Behind::OneByOne | Behind::OwnText => prompt.end,
        };
        let parts = [next..next + FIRST, next + FIRST..next + FIRST + THEN];
        for (sum, part) in sums.iter_mut().zip(parts) {
            let (hits, uses) = replay.decode(part);
            *sum = (sum.0 + hits, sum.1 + uses);
        }
    }
    let [first, then] = sums.map(|(hits, uses)| hits as f64 / uses as f64);
    Ratios { first, then }
}

/// A planner without forecasts whose fills land at once.
struct Replay<'a> {
    trace: &'a Trace,
    planner: Planner,
    request: Request,
    retire: Retire,
}

impl<'a> Replay<'a> {
    fn new(trace: &'a Trace, slots: usize, policy: &str) -> Self {
        let shape = Shape::uniform(trace.layers, trace.experts, trace.top_k, 1);
        let policy = policy::by_name(policy).expect("a policy");
        let cache = Cache::new(&shape, &vec![slots; trace.layers], policy).unwrap();
        let planner = Planner::new(&shape, cache, None, Ahead::default());
        Self { trace, planner, request: Request::default(), retire: Retire::default() }
    }

    /// Hits and uses.
    fn decode(&mut self, tokens: Range<usize>) -> (usize, usize) {
        let mut sum = (0, 0);
        for token in tokens {
            let (hits, uses) = self.pass(token..token + 1);
            sum = (sum.0 + hits, sum.1 + uses);
        }
        sum
    }

    /// One token, or more as a chunk.
    fn pass(&mut self, tokens: Range<usize>) -> (usize, usize) {
        let Self { trace, planner, request, retire } = self;
        let (mut hits, mut uses) = (0, 0);
        match tokens.len() {
            1 => planner.begin_token(0),
            count => planner.begin_chunk(&vec![0; count]),
        }
        for layer in 0..trace.layers {
            let mut experts: Vec<u32> = Vec::new();
            for token in tokens.clone() {
                let chosen: Vec<u32> = trace.experts(token, layer).collect();
                planner.routed(layer, &chosen, &vec![1.0; chosen.len()]);
                experts.extend(chosen);
            }
            if tokens.len() > 1 {
                experts.sort_unstable();
                experts.dedup();
            }
            planner.request(layer, &experts, request);
            hits += request.resident.len();
            uses += experts.len();
            request.resident.iter().for_each(|&id| planner.computed(id));
            for &id in &request.missing {
                land(planner, id);
            }
            planner.end(layer, 0, 0, retire);
        }
        (hits, uses)
    }
}

fn land(planner: &mut Planner, id: ExpertId) {
    planner.filling(id);
    let _ = planner.arrived(id, pregate_predictor::Landing::Ready);
    let _ = planner.admit(id, &|_| false);
}
