//! Trains the tables of one model
//! (`pregate_predictor::policy::learned::fitted`), the network staying as it
//! is: Adagrad on the same cross-entropy, one event after the other.

use super::samples::{Random, targets};
use crate::Row;
use pregate_predictor::Shape;
use pregate_predictor::policy::Event;
use pregate_predictor::policy::learned::fitted::{KEPT, TABLES, Table, lengths};
use pregate_predictor::policy::learned::{Fitted, HORIZONS, Network, Past};

/// An expert that is not used for so many tokens counts as never used again.
pub const FARTHEST: usize = 150;

/// How [`fit`] works.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    pub passes: usize,
    /// Of the events of a pass, this share is learned from.
    pub share: f64,
    /// Adagrad's.
    pub rate: f32,
    pub seed: u64,
}

impl Default for Fit {
    fn default() -> Self {
        Self { passes: 3, share: 0.34, rate: 0.02, seed: 1 }
    }
}

/// One layer's tables while they are trained.
struct Layer {
    experts: usize,
    tables: [Vec<f32>; TABLES + 1],
    /// Sums of squared slopes.
    squares: [Vec<f32>; TABLES + 1],
    /// `[experts]` each: averages of "was used".
    averages: [Vec<f32>; 2],
}

/// Trains tables on the tokens of one model. `progress` hears of each pass
/// and its mean squared error, before and with the tables.
pub fn fit(
    rows: &[Row],
    shape: &Shape,
    fingerprint: Option<[u8; 32]>,
    network: &Network,
    options: Fit,
    progress: &mut dyn FnMut(usize, [f64; 2]),
) -> Fitted {
    let sizes = shape.layers.iter().map(|layer| layer.as_ref().map_or(0, |l| l.experts));
    let mut layers: Vec<Layer> = (sizes.zip(lengths(shape)))
        .map(|(experts, lengths)| Layer {
            experts,
            tables: lengths.map(|length| vec![0.0; length]),
            squares: lengths.map(|length| vec![1e-2; length]),
            averages: [vec![0.0; experts], vec![0.0; experts]],
        })
        .collect();
    let mut random = Random(options.seed);
    for pass in 0..options.passes {
        let mut past = Past::default();
        past.prepare(shape);
        let mut errors = [0.0; 2];
        let mut count = 0.0;
        for (token, row) in rows.iter().enumerate() {
            if row.starts_sequence {
                past.new_sequence();
            }
            past.next_token();
            let mut before: Vec<usize> = Vec::new();
            for layer in (0..row.layers()).filter(|&layer| !row.experts(layer).is_empty()) {
                let experts: Vec<u32> = row.experts(layer).iter().map(|&e| u32::from(e)).collect();
                let counts = vec![1; experts.len()];
                past.used(&Event { layer, experts: &experts, counts: &counts, tokens: 1 });
                let now: Vec<usize> = experts.iter().map(|&expert| expert as usize).collect();
                let state = &mut layers[layer];
                state.used(&now);
                if token + FARTHEST < rows.len() && random.uniform() < options.share {
                    let wanted = next_uses(&rows[token + 1..][..FARTHEST], layer, state.experts);
                    let answers = (network, &past, layer);
                    let found = state.learn(&now, &before, &wanted, answers, options.rate);
                    errors.iter_mut().zip(found).for_each(|(sum, error)| *sum += error);
                    count += (state.experts * HORIZONS.len()) as f64;
                }
                before = now;
            }
        }
        layers.iter_mut().for_each(|layer| layer.averages.iter_mut().for_each(|a| a.fill(0.0)));
        progress(pass, errors.map(|error| error / count));
    }
    let tables =
        layers.iter().map(|layer| layer.tables.each_ref().map(|table| Table::rounded(table)));
    Fitted::new(shape, fingerprint, tables.collect())
}

/// `[experts]`: after how many tokens each is used first, from 1 on.
fn next_uses(rows: &[Row], layer: usize, experts: usize) -> Vec<usize> {
    let mut next = vec![usize::MAX; experts];
    let mut left = experts;
    for (ahead, row) in rows.iter().enumerate().filter(|(_, row)| layer < row.layers()) {
        for &expert in row.experts(layer) {
            let next = &mut next[usize::from(expert)];
            if *next == usize::MAX {
                *next = ahead + 1;
                left -= 1;
            }
        }
        if left == 0 {
            break;
        }
    }
    next
}

impl Layer {
    fn used(&mut self, now: &[usize]) {
        for (kept, averages) in KEPT.into_iter().zip(&mut self.averages) {
            averages.iter_mut().for_each(|average| *average *= kept);
            now.iter().for_each(|&expert| averages[expert] += 1.0 - kept);
        }
    }

    /// Squared errors of the network, and of the network with the tables.
    fn learn(
        &mut self,
        now: &[usize],
        before: &[usize],
        next: &[usize],
        (network, past, layer): (&Network, &Past, usize),
        rate: f32,
    ) -> [f64; 2] {
        let experts = self.experts;
        let of_averages = |index: usize| -> Vec<(usize, f32)> {
            let used = self.averages[index].iter().copied().enumerate();
            used.filter(|&(_, average)| average > 2e-3).collect()
        };
        let ones = |experts: &[usize]| experts.iter().map(|&e| (e, 1.0)).collect::<Vec<_>>();
        let inputs = [ones(now), ones(before), of_averages(0), of_averages(1), vec![(0, 1.0)]];
        let mut says = vec![0.0f32; experts];
        for (table, inputs) in self.tables.iter().zip(&inputs) {
            for &(from, weight) in inputs {
                let row = &table[from * experts..][..experts];
                says.iter_mut().zip(row).for_each(|(says, number)| *says += weight * number);
            }
        }
        let mut errors = [0.0; 2];
        let mut slopes = vec![0.0f32; experts];
        for expert in 0..experts {
            let hidden = network.hidden(&past.features(layer, expert as u32));
            let targets = match next[expert] {
                usize::MAX => [0.0; HORIZONS.len()],
                ahead => targets(ahead as u64),
            };
            for (horizon, target) in targets.into_iter().enumerate() {
                let error = |also| network.answer(&hidden, horizon, also) - target;
                let (plain, with) = (error(0.0), error(says[expert]));
                errors[0] += f64::from(plain * plain);
                errors[1] += f64::from(with * with);
                slopes[expert] += with / HORIZONS.len() as f32;
            }
        }
        let squares = self.squares.iter_mut();
        for ((table, squares), inputs) in self.tables.iter_mut().zip(squares).zip(&inputs) {
            for &(from, weight) in inputs {
                let row = table[from * experts..][..experts].iter_mut();
                let squares = &mut squares[from * experts..][..experts];
                for ((number, square), slope) in row.zip(squares).zip(&slopes) {
                    let slope = weight * slope;
                    *square += slope * slope;
                    *number -= rate * slope / square.sqrt();
                }
            }
        }
        errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers, top-1 of 8: the second layer's expert of a token is that
    /// of the first plus one, and the next token's first is at random.
    fn rows(tokens: usize) -> Vec<Row> {
        let mut random = Random(9);
        let mut last = 0;
        let row = |_| {
            let mut row = Row::default();
            // What comes next hangs on what was: 3 of 4 times two on.
            last = if random.uniform() < 0.75 { (last + 2) % 8 } else { random.below(8) as u16 };
            row.push_layer(&[last], &[]);
            row.push_layer(&[(last + 1) % 8], &[]);
            row
        };
        (0..tokens).map(row).collect()
    }

    #[test]
    fn tables_say_what_follows_what() {
        let shape = Shape::uniform(2, 8, 1, 1);
        let network = Network::universal();
        let rows = rows(1500);
        let mut errors = Vec::new();
        let options = Fit { share: 1.0, ..Fit::default() };
        let run = |errors: &mut Vec<[f64; 2]>| {
            fit(&rows, &shape, Some([7; 32]), &network, options, &mut |_, error| errors.push(error))
        };
        let fitted = run(&mut errors);
        let [plain, with] = errors[errors.len() - 1];
        assert!(with < 0.9 * plain, "{errors:?}");
        assert_eq!(fitted, run(&mut Vec::new()));
        let bytes = fitted.to_bytes();
        let read = |bytes: &[u8], shape: &Shape, mark| Fitted::from_bytes(bytes, shape, mark);
        let again = read(&bytes, &shape, Some([7; 32])).unwrap();
        assert_eq!(again.to_bytes(), bytes);
        assert!(read(&bytes, &shape, None).is_ok());
        assert!(read(&bytes, &shape, Some([8; 32])).is_err());
        assert!(read(&bytes, &Shape::uniform(2, 9, 1, 1), None).is_err());
        assert!(read(&bytes, &Shape::uniform(3, 8, 1, 1), None).is_err());
        assert!(!again.fits(&Shape::uniform(2, 9, 1, 1)));
        for cut in 0..bytes.len() {
            assert!(read(&bytes[..cut], &shape, None).is_err(), "{cut} bytes");
        }
        assert!(read(&[&bytes[..], &[0]].concat(), &shape, None).is_err());
    }
}
