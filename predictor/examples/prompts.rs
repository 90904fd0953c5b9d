//! What a prompt leaves of the cache: hit ratios of the tokens that are
//! decoded right behind it, on recorded routing.
//!
//! `cargo run --release -p pregate-predictor --example prompts -- MANIFEST...`
//! with rtrace-1 manifests. Each round decodes 320 tokens of one place, takes
//! 512 tokens of another as one chunk, and decodes again, 16 tokens and 64
//! more: where the first text left off, as another session would, or behind
//! the prompt. Beside each the best that can be asked for: as if there had been
//! no prompt, and as if it had been decoded token by token.

#[path = "../tests/support/prompt.rs"]
mod prompt;
#[path = "../tests/support/rtrace.rs"]
mod rtrace;

use pregate_predictor::policy;
use prompt::{Behind, Ratios};
use rtrace::Trace;
use std::path::Path;

/// Decoded before a prompt, and of a prompt.
const TOKENS: [usize; 2] = [320, 512];

const FRACTIONS: [f64; 3] = [0.25, 0.5, 0.75];

fn main() {
    let manifests: Vec<String> = std::env::args().skip(1).collect();
    assert!(!manifests.is_empty(), "give the manifests of rtrace-1 files");
    for manifest in &manifests {
        let trace = Trace::open(Path::new(manifest));
        println!("{manifest}: hit ratio of 16 tokens, of 64 more");
        println!(
            "{:24}{:>6}{:>16}{:>16}{:>16}{:>16}",
            "", "slots", "no prompt", "other text", "one by one", "own text"
        );
        for name in [policy::DEFAULT, "lru"] {
            for fraction in FRACTIONS {
                let slots = trace.top_k.max((fraction * trace.experts as f64) as usize);
                print!("{name:24}{slots:>6}");
                for behind in Behind::ALL {
                    let Ratios { first, then } =
                        prompt::ratios(&trace, (slots, name), TOKENS, behind);
                    print!("{first:>9.3}{then:>7.3}");
                }
                println!();
            }
        }
    }
}
