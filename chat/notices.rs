//! What the expert store has to say beside the answer.

use crate::ledger;
use pregate_runtime::{Model, store::ExpertStore};

/// What happened to the model's files or their disk since the last call.
pub fn of_disk(model: &Model) -> Vec<String> {
    let notices = model.store().map(ExpertStore::notices);
    notices.iter().flatten().map(ToString::to_string).collect()
}

/// The same on standard error.
pub fn tell_of_disk(model: &Model) {
    tell(&of_disk(model));
}

/// What forecasts did that they must not do, on standard error.
pub fn tell_of_forecasts(model: &Model) {
    tell(&ledger::faults(model));
}

fn tell(notes: &[String]) {
    notes.iter().for_each(|note| eprintln!("note: {note}"));
}
