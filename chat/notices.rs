//! What the expert store and the session have to say beside the answer.

use crate::ledger;
use pregate_runtime::{Model, Session, store::ExpertStore};

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

/// What slows a session down and was not `told` yet.
pub fn of_session(session: &Session, told: &mut Option<String>) -> Option<String> {
    let warning = session.warning().filter(|why| told.as_ref() != Some(why))?;
    *told = Some(warning.clone());
    Some(warning)
}

/// The same on standard error.
pub fn tell_of_session(session: &Session, told: &mut Option<String>) {
    if let Some(why) = of_session(session, told) {
        eprintln!("warning: {why}");
    }
}

fn tell(notes: &[String]) {
    notes.iter().for_each(|note| eprintln!("note: {note}"));
}
