//! The machine as it was asked for, and how many experts it has room for.

use super::{
    args::{ReplayArgs, SlotsArg},
    subject::Subject,
};
use crate::{exit::Failure, output::bytes};
use pregate_traces::replay::{Figure, Machine, MachineError, Slots, presets};
use std::path::Path;

/// The machine where none is named: without a GPU, whose misses the processor
/// may compute and leave outside the slots, so that hits are the policy's
/// alone.
const USUAL: &str = "cpu-ddr5";

/// The machines of the command line, with its changes.
pub fn machines(args: &ReplayArgs) -> Result<Vec<Machine>, Failure> {
    let mut machines = match args.machine.is_empty() {
        true => vec![find(USUAL)?],
        false => args.machine.iter().map(|name| find(name)).collect::<Result<_, _>>()?,
    };
    for machine in &mut machines {
        change(machine, args)?;
    }
    tell_apart(&mut machines, &args.machine);
    Ok(machines)
}

/// Machines of one name get what the command line calls them behind it.
fn tell_apart(machines: &mut [Machine], asked: &[String]) {
    let names: Vec<String> = machines.iter().map(|machine| machine.name.clone()).collect();
    for (machine, asked) in machines.iter_mut().zip(asked) {
        if names.iter().filter(|name| **name == machine.name).count() > 1 {
            machine.name = format!("{} ({asked})", machine.name);
        }
    }
}

/// A preset, or a file.
fn find(name: &str) -> Result<Machine, Failure> {
    if let Some(machine) = presets::preset(name) {
        return Ok(machine);
    }
    let path = Path::new(name);
    let is_file = path.extension().is_some_and(|extension| extension == "toml");
    if !is_file && !path.is_file() {
        let known: Vec<&str> = presets::names().collect();
        return Err(Failure::Usage(format!(
            "--machine {name}: no such machine; known: {}; or a .toml file, which `pregate doctor \
             --machine-file` writes",
            known.join(", ")
        )));
    }
    presets::read(path).map_err(|error| match error {
        MachineError::Io { source, .. } => Failure::io(name, source),
        other => Failure::File(other.to_string()),
    })
}

/// `--vram`, `--ram`, `--disk`.
fn change(machine: &mut Machine, args: &ReplayArgs) -> Result<(), Failure> {
    let mut changes = Vec::new();
    let mut set = |figure: &mut Figure, value: f64, words: String| {
        *figure = Figure::new(value, "given on the command line");
        changes.push(words);
    };
    if let Some(size) = args.vram {
        let Some(gpu) = &mut machine.gpu else {
            let default = if args.machine.is_empty() { ", which is the default," } else { "" };
            return Err(Failure::Usage(format!(
                "--vram: the machine {}{default} has no GPU; name one that has with --machine, \
                 such as rtx4070 (--list shows all)",
                machine.name
            )));
        };
        set(&mut gpu.vram_bytes, size as f64, format!("{} of VRAM", bytes(size)));
    }
    if let Some(size) = args.ram {
        set(&mut machine.ram_bytes, size as f64, format!("{} of RAM", bytes(size)));
    }
    if let Some(rate) = args.disk {
        set(&mut machine.disk.gbs, rate, format!("a disk of {rate} GB/s"));
    }
    if !changes.is_empty() {
        machine.name = format!("{} with {}", machine.name, changes.join(", "));
    }
    Ok(())
}

/// What a machine keeps of a model's experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Room {
    pub slots: Slots,
    /// Of a GPU's experts, the share that RAM has a copy of; `None`: all.
    pub ram_share: Option<f64>,
    /// Slots of each layer that the machine has memory for.
    pub most: usize,
}

/// Frames that are no slots, as the runtime has them.
fn ring(top_k: usize) -> u64 {
    (2 * top_k as u64).max(4)
}

impl Room {
    /// For one of `--slots`.
    pub fn of(
        machine: &Machine,
        subject: &Subject,
        size: &SlotsArg,
        context: u64,
    ) -> Result<Self, Failure> {
        let ram = machine.ram_bytes.value;
        let all = subject.expert_bytes() as f64;
        let ram_share = machine.gpu.as_ref().filter(|_| all > ram).map(|_| ram / all);
        let fitting = fitting(machine, subject, context);
        let (slots, most) = match size {
            SlotsArg::Of(slots) => (slots.clone(), fitting.unwrap_or(0)),
            SlotsArg::Fit => fitting.map(|slots| (Slots::Each(slots), slots))?,
        };
        Ok(Self { slots, ram_share, most })
    }
}

/// Slots of each layer that the memory has room for where experts are
/// computed: VRAM, or RAM without a GPU.
fn fitting(machine: &Machine, subject: &Subject, context: u64) -> Result<usize, Failure> {
    let (memory, name) = match &machine.gpu {
        Some(gpu) => (gpu.vram_bytes.value, "VRAM"),
        None => (machine.ram_bytes.value, "RAM"),
    };
    let shape = &subject.header.shape;
    let layers = shape.moe().count().max(1) as u64;
    let largest = shape.moe().map(|(_, layer)| layer.expert_bytes).max().unwrap_or(0).max(1);
    let top_k = shape.moe().map(|(_, layer)| layer.top_k).max().unwrap_or(1);
    let experts = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(1);
    let fixed = subject.weights.other_bytes.unwrap_or(0) + context * subject.weights.kv_bytes;
    let least = layers * top_k as u64 + ring(top_k);
    let frames = ((memory - fixed as f64) / largest as f64).max(0.0) as u64;
    if frames < least {
        return Err(Failure::Resources(format!(
            "{}: {} of {name} are too little for {}: {} of other weights and KV cache and {} for \
             {least} experts; --slots 10% asks what that would give all the same",
            machine.name,
            bytes(memory as u64),
            subject.name,
            bytes(fixed),
            bytes(least * largest),
        )));
    }
    let slots = (frames - ring(top_k)) / layers;
    Ok(usize::try_from(slots).unwrap_or(experts).min(experts))
}

#[cfg(test)]
mod tests {
    use super::super::subject::Weights;
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use pregate_predictor::Shape;
    use pregate_traces::Header;

    fn args(more: &[&str]) -> ReplayArgs {
        let all = ["pregate", "replay", "t.json"].iter().chain(more);
        match Cli::parse_from(all).command {
            Some(Command::Replay(args)) => args,
            _ => unreachable!("the command is replay"),
        }
    }

    fn subject() -> Subject {
        let shape = Shape::uniform(10, 64, 4, 10_000_000);
        Subject {
            path: "t.json".into(),
            name: "t.json".to_string(),
            header: Header { shape, ..Header::default() },
            tokens: 0,
            weights: Weights {
                words: String::new(),
                other_bytes: Some(1_000_000_000),
                kv_bytes: 1000,
            },
        }
    }

    #[test]
    fn what_fits_is_what_is_left_beside_everything_else() {
        let small = args(&["--machine", "rtx4090", "--vram", "2980MB", "--ram", "3200MB"]);
        let machine = &machines(&small).unwrap()[0];
        // 1980 MB less a cache of 1 MB are 197 experts, 8 of which are the ring.
        let room = Room::of(machine, &subject(), &SlotsArg::Fit, 1000).unwrap();
        assert_eq!(room.slots, Slots::Each(18));
        assert_eq!(room.ram_share, Some(0.5), "of 6.4 GB");
        let plenty = &machines(&args(&["--machine", "rtx5090"])).unwrap()[0];
        let room = Room::of(plenty, &subject(), &SlotsArg::Fit, 1000).unwrap();
        assert_eq!((room.slots, room.ram_share), (Slots::Each(64), None));
        let host = &machines(&args(&["--machine", "cpu-ddr4", "--ram", "2980MB"])).unwrap()[0];
        let room = Room::of(host, &subject(), &SlotsArg::Fit, 1000).unwrap();
        assert_eq!((room.slots, room.ram_share), (Slots::Each(18), None));
        let little = &machines(&args(&["--ram", "1200MB"])).unwrap()[0];
        let words = Room::of(little, &subject(), &SlotsArg::Fit, 1000).unwrap_err().to_string();
        assert!(words.contains("too little") && words.contains("48 experts"), "{words}");
    }

    #[test]
    fn changes_are_part_of_the_name() {
        let changed = &machines(&args(&["--machine", "rtx4090", "--vram", "8GB", "--disk", "3.5"]));
        let machine = &changed.as_ref().unwrap()[0];
        assert_eq!(machine.name, "rtx4090 with 8.0 GB of VRAM, a disk of 3.5 GB/s");
        assert_eq!(machine.disk.gbs, Figure::new(3.5, "given on the command line"));
        let words = machines(&args(&["--machine", "cpu-ddr5", "--vram", "8G"])).unwrap_err();
        assert!(words.to_string().contains("no GPU"));
        let default = machines(&args(&["--vram", "8G"])).unwrap_err().to_string();
        assert!(default.contains("default") && default.contains("rtx4070"), "{default}");
    }

    #[test]
    fn machines_of_one_name_are_told_apart() {
        let two = machines(&args(&["--machine", "rtx4090,rtx4070"])).unwrap();
        assert_eq!([&*two[0].name, &*two[1].name], ["rtx4090", "rtx4070"]);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.toml");
        std::fs::write(&file, presets::preset("rtx4090").unwrap().to_toml()).unwrap();
        let asked = format!("rtx4090,{}", file.display());
        let two = machines(&args(&["--machine", &asked])).unwrap();
        assert_ne!(two[0].name, two[1].name);
        assert!(two[1].name.contains("a.toml"), "{}", two[1].name);
    }

    #[test]
    fn an_unknown_machine_lists_the_known_ones() {
        let words = find("rtx9999").unwrap_err().to_string();
        assert!(presets::names().all(|name| words.contains(name)), "{words}");
        assert!(matches!(find("/nowhere/m.toml"), Err(Failure::Io { .. })));
    }
}
