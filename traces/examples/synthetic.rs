//! Fits the generator to traces at their own shape, and prints target beside
//! reached: `cargo run --release -p pregate-traces --example synthetic TRACE...`

use pregate_traces::synthetic::{Figures, Generator, Weights, fit, lengths};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let mut source = pregate_traces::open(Path::new(&path))?;
        let target = Figures::of_first(source.as_mut(), 1500)?;
        let lengths = lengths(source.as_mut())?;
        let shape = source.header().shape.clone();
        let (_, layer) = shape.moe().next().ok_or("no MoE layers")?;
        let shape = (shape.moe().count(), *layer);
        let mut generator = Generator::new(shape, Weights::default(), (1500, &lengths), (&path, 1));
        let found = fit(&mut generator, Weights::default(), &target, &mut |trials, most| {
            eprint!("{trials}/{most} \r")
        })?;
        println!("{path}: {:?}", found.weights);
        for (index, name) in Figures::NAMES.iter().enumerate() {
            let (wanted, reached) = (target.values[index], found.reached.values[index]);
            let words = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.3}"));
            println!("  {name:<18} {} {}", words(wanted), words(reached));
        }
    }
    Ok(())
}
