//! `pregate chat`.

use crate::{
    cli::ChatArgs, demo, device::Device, exit::Failure, line_chat, local::Local, model,
    plan::Needs, record::Record, tui,
};
use std::io::{IsTerminal, stdin, stdout};

pub fn run(args: &ChatArgs) -> Result<u8, Failure> {
    let path = model::path_or_demo(args.model.model.as_deref())?;
    let is_demo = args.model.model.is_none();
    let device = Device::open(&args.model.device)?;
    device.announce();
    let needs = Needs::new(&args.memory, args.session.options());
    let model::Loaded { model, session, .. } = model::load(&path, &device, &needs)?;
    let mut engine = Local::new(session, &args.sampling, is_demo)?;
    let record = Record::start(args.record.as_deref(), &model, &path, &args.memory)?;
    engine.record(record.clone());
    let examples = if is_demo { demo::EXAMPLES.map(str::to_string).to_vec() } else { Vec::new() };
    let about = engine.about(&device, &path, examples);
    let system = args.system.clone();
    let code = match why_line_by_line() {
        None => tui::chat(Box::new(engine), about, system),
        Some(why) => line_chat::chat(Box::new(engine), &about, system, why),
    };
    record.iter().for_each(Record::finish);
    code
}

/// Why the full-screen chat cannot be used here.
fn why_line_by_line() -> Option<&'static str> {
    if !stdin().is_terminal() {
        return Some("standard input is not a terminal");
    }
    if !stdout().is_terminal() {
        return Some("standard output is not a terminal");
    }
    match std::env::var("TERM").as_deref() {
        Ok("dumb") => Some("TERM=dumb"),
        Ok("") | Err(_) if cfg!(unix) => Some("TERM is not set"),
        _ => None,
    }
}
